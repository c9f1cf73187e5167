"""Tabular token MDPs that check the claims of docs/method.md §1 and §10 by enumeration."""

from tokenratio.theory.mdp import Policy, TokenMdp
from tokenratio.theory.population import Population

__all__ = ["Policy", "Population", "TokenMdp"]
