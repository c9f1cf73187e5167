r"""From token log-ratios to the pair's log R, and the state weights in it (docs/method.md §2, §4).

A *log-ratio* here is `ρ_t = log π(y_t|s_t) − log π_ref(y_t|s_t)`, in nats. All arrays are aligned
by the index of the token in its response; losses over shared steps ignore values past the end of
either response.
"""

from jaxtyping import Bool, Float
from torch import Tensor


def pair_log_ratio(
    chosen_log_ratio: Float[Tensor, "*steps"],
    rejected_log_ratio: Float[Tensor, "*steps"],
    log_state_weight: Float[Tensor, "*steps"] | float = 0.0,
    *,
    beta: float,
) -> Float[Tensor, "*steps"]:
    """log R_t = β (ρ_t^l − ρ_t^w + log w_t), rejected over chosen: smaller is better.

    See docs/method.md §2. β multiplies all three terms, the state weight included; without
    `log_state_weight` it is the uncorrected ablation.
    """
    return beta * (rejected_log_ratio - chosen_log_ratio + log_state_weight)


def kl_state_weight(
    chosen_kl: Float[Tensor, "*steps"], rejected_kl: Float[Tensor, "*steps"]
) -> Float[Tensor, "*steps"]:
    """TBPO-A's log w_t = KL_t^l − KL_t^w, KL_t = KL(π_ref(.|s_t) ‖ π(.|s_t)), in nats.

    See docs/method.md §2. Gradients flow through both: a detached KL has another minimiser
    (docs/method.md §10).
    """
    return rejected_kl - chosen_kl


def baseline_state_weight(
    chosen_baseline: Float[Tensor, "pairs tokens"],
    rejected_baseline: Float[Tensor, "pairs tokens"],
    pair_mask: Bool[Tensor, "pairs tokens"],
    *,
    center: bool = False,
    clamp: float = 10.0,
) -> Float[Tensor, "pairs tokens"]:
    """TBPO-Q's log w_t = b(s_t^l) − b(s_t^w), b the learned log Z(s) (docs/method.md §2, §4).

    Args:
        pair_mask: True where both responses have a token; the rest comes out as 0.
        center: subtract each pair's mean over its shared tokens, as the released code does. Off by
            default, because it makes log w_1 ≠ 0 and biases the solution (docs/method.md §10).
        clamp: bound on |log w_t|, applied after centring.
    """
    log_weight = (rejected_baseline - chosen_baseline).masked_fill(~pair_mask, 0.0)
    if center:
        mean = log_weight.sum(-1, keepdim=True) / pair_mask.sum(-1, keepdim=True).clamp_min(1)
        log_weight = (log_weight - mean).masked_fill(~pair_mask, 0.0)
    return log_weight.clamp(-clamp, clamp)
