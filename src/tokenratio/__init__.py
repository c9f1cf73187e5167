"""TBPO: token-level Bregman preference optimization."""
