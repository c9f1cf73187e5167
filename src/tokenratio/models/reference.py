"""The reference model: a frozen copy, another model, or the policy with its adapter off."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenratio.errors import TokenRatioError
from tokenratio.models.adapters import shared_copy
from tokenratio.models.packing import model_inputs
from tokenratio.models.provenance import Origin
from tokenratio.models.shards import whole
from tokenratio.models.token_requests import (
    TokenRequest,
    answer_token_requests,
    disable_dropout,
    language_model,
    own_head,
)
from tokenratio.statistics import Head
from tokenratio.types import CompletionBatch, StepBatch

Kind: TypeAlias = Literal["copy", "ref_model", "adapter_off"]
_UNKNOWN = Origin("", "")


@dataclass
class Reference:
    """π_ref. Its hidden states are computed as the policy's are, in the same precision.

    Attributes:
        model: the frozen model; None when the policy with its adapter off is the reference.
        kind: `copy`, of the starting policy; `ref_model`, another model; or `adapter_off`.
        origin: what it was assembled from.
        shares_weights: the frozen base of `model` is the policy's own.
        wrapped: `model` in the wrapper that it is run through.
    """

    model: PreTrainedModel | None
    kind: Kind = "ref_model"
    origin: Origin = _UNKNOWN
    shares_weights: bool = False
    wrapped: nn.Module | None = None

    @classmethod
    def frozen(
        cls, model: PreTrainedModel, kind: Kind = "ref_model", origin: Origin = _UNKNOWN
    ) -> "Reference":
        """A model that does not change; its dropout is switched off."""
        answer_token_requests(model)
        disable_dropout(model)
        return cls(model.eval().requires_grad_(False), kind, origin)

    @classmethod
    def copy_of(cls, policy: PreTrainedModel | PeftModel, origin: Origin) -> "Reference":
        """The policy as it is now; if it has an adapter, only the adapter is copied."""
        if isinstance(policy, PeftModel):
            reference = cls.frozen(shared_copy(policy), "copy", origin)
            reference.shares_weights = True
            return reference
        return cls.frozen(copy.deepcopy(policy), "copy", origin)

    @classmethod
    def adapter_off(cls, origin: Origin) -> "Reference":
        """The policy itself whenever its adapter is off."""
        return cls(None, "adapter_off", origin)

    @property
    def description(self) -> str:
        """What it is, in words."""
        return describe_reference(self._record())

    @property
    def models(self) -> list[PreTrainedModel]:
        """The reference's own model, if it has one."""
        return [] if self.model is None else [language_model(self.model)]

    @property
    def head(self) -> Head | None:
        """Its output head; None for the policy's own without adapters."""
        return None if self.model is None else own_head(self.model)

    def prepare(self, wrap: Callable[[PreTrainedModel], nn.Module]) -> None:
        """Give it the policy's device, autocast and wrapper; `wrap` changes the model in place."""
        if self.model is not None:
            self.wrapped = wrap(self.model)

    def leave_device(self) -> None:
        """Move it off the device when no longer needed; weights shared with the policy stay."""
        if self.model is not None and not self.shares_weights:
            self.model.to("cpu")  # type: ignore[arg-type]  # transformers wraps `to` without its types

    @torch.no_grad()
    def hidden(
        self, batch: CompletionBatch | StepBatch, policy: nn.Module, adapters: PeftModel | None
    ) -> Float[Tensor, "tokens hidden"]:
        """Final hidden states at the positions that predict `batch.labels`.

        Args:
            policy: the policy as trained, wrappers included; run with adapters off if `model` is
                None.
            adapters: the PEFT model inside `policy`.
        """
        request = TokenRequest(batch.states)
        if self.model is not None:
            inputs = model_inputs(batch, language_model(self.model))
            return (self.wrapped or self.model)(**inputs, token_request=request)["hidden"]
        assert adapters is not None
        inputs = model_inputs(batch, language_model(adapters))
        with adapters.disable_adapter():
            return policy(**inputs, token_request=request)["hidden"]

    def identity(self, policy: nn.Module) -> dict[str, Any]:
        """What `run.json` records of it."""
        weights = model_digest(policy if self.model is None else self.model)
        return {**self._record(), "sha256": weights}

    def _record(self) -> dict[str, Any]:
        origin = self.origin.as_dict()
        return {"kind": self.kind, "name": origin.pop("path"), **origin}


def describe_reference(identity: Mapping[str, Any]) -> str:
    """In words what `run.json` records of a reference; runs of 0.1.0 recorded the words."""
    if "kind" not in identity:
        return str(identity.get("description"))
    adapters = tuple(identity.get("adapters") or ())
    origin = Origin(str(identity.get("name")), str(identity.get("base")), adapters)
    if identity["kind"] == "copy":
        return f"frozen copy of the starting policy ({origin})"
    if identity["kind"] == "adapter_off":
        return f"the policy with its adapter off ({origin}{', merged' if adapters else ''})"
    return f"ref_model {origin}"


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights, without those of an adapter in PEFT's wrapper."""
    return digest_of_weights(own_weights(model))


def digest_of_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) of named weights: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda named: named[0]):
        tensor = whole(tensor)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model without its adapter, by the names they have without it."""
    prefix = str(model.base_model.prefix) if isinstance(model, PeftModel) else None
    for name, tensor in language_model(model).named_parameters():
        if prefix is not None and (prefix in name or ".modules_to_save." in name):
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


def check_start(
    log_ratio: Float[Tensor, "tokens"], dtype: torch.dtype, *, is_cached: bool = False
) -> None:
    """Check before the first update that every log-ratio is 0, except for rounding.

    Args:
        dtype: what the models compute in.
        is_cached: the reference ran in other batches, so rounding differs: the mean is checked.
    Raises:
        TokenRatioError: policy and reference differ.
    """
    tolerance = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
    sizes = log_ratio.abs()
    worst = (sizes.mean() if is_cached else sizes.max()).item() if sizes.numel() else 0.0
    if not worst <= tolerance:
        raise TokenRatioError(
            "policy and reference differ before the first update: a token's log-ratio is "
            f"{worst:.3g} nats{' on average' if is_cached else ''}. The reference is not the "
            "starting policy: another checkpoint or dtype, or a new adapter that does not start "
            "at zero (init_lora_weights false). If another reference is intended, set "
            "check_reference to false"
        )
