"""Checks that a model computes the same as before, and that its adapter can be switched off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from tokenratio.errors import TokenRatioError
from tokenratio.models.token_requests import embedding_weight, eval_mode, language_model


@torch.no_grad()
def sample_log_probs(model: nn.Module) -> Float[Tensor, "tokens vocabulary"]:
    """A model's log-probabilities after a few tokens, dropout off."""
    weight = embedding_weight(model)
    ids = torch.linspace(0, len(weight) - 1, min(8, len(weight)), device=weight.device).long()
    with eval_mode(model):
        mask = torch.ones_like(ids[None])  # or transformers warns of ids that look like padding
        logits = model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def require_same(
    before: Float[Tensor, "tokens vocabulary"],
    after: Float[Tensor, "tokens vocabulary"],
    what: str,
    *,
    precision: torch.dtype,
) -> None:
    """Refuse a model that computes something else than before.

    Args:
        before, after: what `sample_log_probs` returned.
        what: begins the message.
        precision: what the model computes in.
    """
    tolerance = 5e-2 if precision in (torch.float16, torch.bfloat16) else 1e-4
    worst = (before - after.to(before.device)).abs().max().item()
    if not worst <= tolerance * max(1.0, before.abs().max().item()):
        raise TokenRatioError(
            f"{what}: log-probabilities differ by {worst:.3g} nats from those of the model given"
        )


def check_adapter(
    model: PeftModel, base: Float[Tensor, "tokens vocabulary"] | None, *, is_reference: bool
) -> None:
    """Refuse an adapter that changes the base, or cannot be switched off entirely.

    PEFT switches off the layers it added and the copies of `modules_to_save`. Biases of the base
    (`bias="all"`) and trained token rows stay on.

    Args:
        base: `sample_log_probs` before the adapter was added, if known.
        is_reference: the policy with its adapter off is the reference.
    Raises:
        TokenRatioError: names the first such parameter.
    """
    kind, precision = model.active_peft_config.peft_type.value, language_model(model).dtype
    prefix = str(model.base_model.prefix)
    if is_reference:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and prefix not in name and ".modules_to_save." not in name:
                raise TokenRatioError(
                    f"{name} would be trained and stay on when the adapter is off, so that the "
                    "reference would move with the policy: use bias='none' and no "
                    "trainable_token_indices, or pass ref_model"
                )
    with model.disable_adapter():
        off = sample_log_probs(model)
    if base is not None:
        require_same(
            base, off, f"a {kind} adapter changes the model it is added to", precision=precision
        )
    if not is_reference:
        return
    with _moved(model), model.disable_adapter():
        moved = sample_log_probs(model)
    require_same(off, moved, f"a {kind} adapter cannot be switched off", precision=precision)


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Every trained weight is changed inside, and restored afterwards."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    values = [tensor.clone() for tensor in trained]
    for tensor in trained:
        tensor.mul_(1.5).add_(0.1)
    try:
        yield
    finally:
        for tensor, value in zip(trained, values, strict=True):
            tensor.copy_(value)


def is_fresh(model: PeftModel) -> bool:
    """Whether the adapter changes nothing yet."""
    with model.disable_adapter():
        off = sample_log_probs(model)
    return torch.equal(sample_log_probs(model), off)
