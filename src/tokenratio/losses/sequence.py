"""Losses that compare whole responses."""

from jaxtyping import Float
from torch import Tensor

from tokenratio.bregman import Logistic


def dpo_loss(
    chosen_log_ratio: Float[Tensor, "pairs"],
    rejected_log_ratio: Float[Tensor, "pairs"],
    *,
    beta: float,
) -> Float[Tensor, "pairs"]:
    r"""DPO: −log σ(β (Σρ^w − Σρ^l)) (arXiv 2305.18290, eq. 7; METHOD §6).

    Args:
        chosen_log_ratio: Σ_t ρ_t over the whole chosen response, in nats; `rejected_log_ratio`
            likewise.
        beta: strength of the leash to the reference, > 0.
    """
    return Logistic().loss(beta * (rejected_log_ratio - chosen_log_ratio))
