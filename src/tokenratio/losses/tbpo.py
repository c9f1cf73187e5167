"""TBPO's loss: Bregman ratio matching at every shared token (arXiv 2605.12288)."""

from jaxtyping import Bool, Float
from torch import Tensor

from tokenratio.bregman import BregmanGenerator


def tbpo_loss(
    pair_log_ratio: Float[Tensor, "pairs tokens"],
    pair_mask: Bool[Tensor, "pairs tokens"],
    *,
    generator: BregmanGenerator,
) -> Float[Tensor, "pairs"]:
    r"""Bregman ratio-matching loss of each pair (TBPO, arXiv 2605.12288, eq. 10; METHOD §3).

    Args:
        pair_log_ratio: log R_t in nats, β applied; any value, even NaN, where the mask is False.
        pair_mask: True where both responses have a token.
        generator: the divergence; its `loss` is applied pointwise.
    Returns:
        The mean over each pair's shared tokens, unreduced over pairs; 0 for a pair that shares
        none.
    """
    # The input is masked, not the output: 0 × nan would poison the gradient.
    per_token = generator.loss(pair_log_ratio.masked_fill(~pair_mask, 0.0)) * pair_mask
    return per_token.sum(-1) / pair_mask.sum(-1).clamp_min(1)
