"""Tabular token MDPs on which every claim of
docs/method.md §1 and §10 is checked by exact enumeration."""

from tokenratio.theory.mdp import Policy, TokenMdp
from tokenratio.theory.population import Population

__all__ = ["Policy", "Population", "TokenMdp"]
