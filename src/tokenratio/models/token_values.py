"""Policy and reference on whole responses: what both say of every token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from tokenratio.errors import TokenRatioError
from tokenratio.models.packing import model_inputs
from tokenratio.models.reference import Reference
from tokenratio.models.token_requests import TokenRequest, language_model, own_head
from tokenratio.models.token_rows import TokenRow, score_rows
from tokenratio.statistics.predictions import Predictions, predictions
from tokenratio.types import CompletionBatch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TokenValues:
    """The tokens of one response, EOS included; arrays [tokens], in nats, None if not asked for.

    Attributes:
        log_probs: log π(y_t|s_t).
        ref_log_probs: log π_ref(y_t|s_t).
        kl_ref_policy: KL(π_ref(.|s_t) ‖ π(.|s_t)).
        baseline: b(s_t), of a learned state baseline.
        predictions: what both models predict at s_t, on the CPU.
    """

    log_probs: Array
    ref_log_probs: Array
    kl_ref_policy: Array | None = None
    baseline: Array | None = None
    predictions: Predictions | None = None

    @property
    def log_ratio(self) -> Array:
        """ρ_t = log π(y_t|s_t) − log π_ref(y_t|s_t)."""
        return self.log_probs - self.ref_log_probs


def token_values(
    model: nn.Module,
    ref_model: nn.Module | None,
    rows: Sequence[TokenRow],
    *,
    with_kl: bool = False,
    baseline: Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens"]] | None = None,
    top: int | None = None,
    batch_size: int,
) -> list[TokenValues]:
    """What policy and reference say of each token of each response, from one pass of both.

    Args:
        ref_model: π_ref; None for a model with a PEFT adapter, which is then switched off.
        with_kl: also KL(π_ref ‖ π).
        baseline: b, from the policy's hidden states (`models.state_baseline.StateBaseline`).
        top: also entropies, and this many of each model's likeliest tokens; None for neither.
        batch_size: rows in one forward pass.
    Returns:
        One for each row, in the order given.
    Raises:
        TokenRatioError: no reference and no adapter, or what `score_rows` refuses.
    """
    base, adapters = language_model(model), None
    if ref_model is None:
        if not isinstance(model, PeftModel):
            raise TokenRatioError(
                "without ref_model the policy must have a PEFT adapter to switch off"
            )
        adapters = model
    models = [model] if ref_model is None else [model, ref_model]
    reference = Reference(ref_model)  # type: ignore[arg-type]

    def values(batch: CompletionBatch) -> list[TokenValues]:
        ref_hidden = reference.hidden(batch, model, adapters)
        request = TokenRequest(
            batch.states,
            batch.labels,
            ref_hidden=ref_hidden,
            ref_head=reference.head,
            with_kl=with_kl,
        )
        answer = model(**model_inputs(batch, base), token_request=request)
        hidden, lengths = answer.pop("hidden"), batch.completion_mask.sum(1).tolist()
        if baseline is not None:
            answer["baseline"] = baseline(hidden)
        of_rows: list[dict[str, Any]] = [{} for _ in lengths]
        for name, flat in answer.items():
            for row, part in zip(of_rows, flat.double().cpu().split(lengths), strict=True):
                row[name] = part.numpy()
        if top is not None:
            ref_head = reference.head or own_head(model, adapters=False)
            found = predictions(hidden, own_head(model), ref_hidden, ref_head, top=top)
            parts = [vars(found)[name].cpu().split(lengths) for name in vars(found)]
            for row, part in zip(of_rows, zip(*parts, strict=True), strict=True):
                row["predictions"] = Predictions(*part)
        return [TokenValues(**row) for row in of_rows]

    return score_rows(models, rows, values, batch_size=batch_size)
