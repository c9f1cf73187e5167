"""A causal language model whose forward returns token statistics instead of logits.

The model's own `forward` takes one more argument, `token_request`. Whatever wraps that forward
(DDP's and FSDP's hooks, PEFT's adapters, autocast, gradient checkpointing) works as usual; only
what happens between the last hidden state and the loss is ours, so `[rows, length, vocabulary]`
logits are never built. Without `token_request` the model behaves as before (generation, saving).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenratio.errors import TokenRatioError
from tokenratio.models.shards import is_sharded, whole
from tokenratio.statistics import Head, StepLoss, head_statistics, step_losses
from tokenratio.types import TokenStatistics


@dataclass(frozen=True)
class StepObjective:
    """A loss that is local to its step; see `step_losses`.

    Attributes:
        log_state_weight: log w_t from the hidden states, for a method with a baseline.
    """

    step_loss: StepLoss
    step_weight: Float[Tensor, "steps"]
    log_state_weight: Callable[[Tensor], Float[Tensor, "steps"]] | None = None


class TokenRequest:
    """Asks a forward pass for the statistics of some tokens, or for a loss on them.

    Not a dataclass: wrappers cast the tensors in those to the precision they compute in, and a
    known log-probability must not be rounded.

    Args:
        states: the positions whose hidden states are wanted: a mask, or indices into the flattened
            rows.
        labels: the token each of them predicts; None to get hidden states only.
        ref_hidden: the reference's hidden states at the same positions.
        ref_head: the reference's head; None for this model's own head without adapters.
        ref_log_probs: log π_ref of the labels, if already known.
        with_kl: also KL(π_ref ‖ π).
        objective: compute this loss, with its gradients, along with the statistics. The states are
            then indices: of the chosen token of every step, then of the rejected ones.
    """

    def __init__(
        self,
        states: Bool[Tensor, "rows length"] | Int[Tensor, "tokens"],
        labels: Int[Tensor, "tokens"] | None = None,
        ref_hidden: Float[Tensor, "tokens hidden"] | None = None,
        ref_head: Head | None = None,
        ref_log_probs: Float[Tensor, "tokens"] | None = None,
        with_kl: bool = False,
        objective: StepObjective | None = None,
    ) -> None:
        self.states, self.labels = states, labels
        self.ref_hidden, self.ref_head, self.ref_log_probs = ref_hidden, ref_head, ref_log_probs
        self.with_kl, self.objective = with_kl, objective

    def answer(self, model: PreTrainedModel, hidden: Tensor) -> dict[str, Tensor]:
        """What was asked for, by name.

        Without labels `hidden`; with labels also `log_probs` and, if known, `ref_log_probs` and
        `kl_ref_policy`. With an objective also `total`, `per_step` and `log_state_weight`, but not
        `hidden`.
        """
        if self.labels is None:
            return {"hidden": hidden}
        head, ref_head = own_head(model), self.ref_head
        if self.ref_hidden is not None and ref_head is None:
            ref_head = own_head(model, adapters=False)
        if ref_head is not None and is_sharded(ref_head.weight):
            bias = None if ref_head.bias is None else whole(ref_head.bias)
            # The policy's is in the precision that both models compute in.
            whole_head = Head(whole(ref_head.weight), bias, ref_head.softcap)
            ref_head = whole_head.to(head.weight.dtype)
        if self.objective is None:
            statistics = head_statistics(
                hidden, head, self.labels, self.ref_hidden, ref_head, with_kl=self.with_kl
            )
            answer = {"hidden": hidden, **_present(statistics)}
            if self.ref_log_probs is not None:
                answer["ref_log_probs"] = self.ref_log_probs.to(statistics.log_probs.dtype)
            return answer
        weigh = self.objective.log_state_weight
        weight = None if weigh is None else weigh(hidden)
        losses = step_losses(
            hidden,
            head,
            self.labels,
            self.objective.step_loss,
            self.objective.step_weight,
            self.ref_hidden,
            ref_head,
            ref_log_probs=self.ref_log_probs,
            log_state_weight=weight,
            with_kl=self.with_kl,
        )
        answer = {"total": losses.total, "per_step": losses.per_step, **_present(losses.tokens)}
        if weight is not None:
            answer["log_state_weight"] = weight.detach()
        return answer


def _present(statistics: TokenStatistics) -> dict[str, Tensor]:
    return {name: value for name, value in vars(statistics).items() if value is not None}


def answer_token_requests(model: PreTrainedModel) -> None:
    """Give the model's forward the argument `token_request`.

    With it the forward returns a dict of tensors: see `TokenRequest.answer`.

    Raises:
        TokenRatioError: not a causal language model of backbone and output head, or a head whose
            adapter would be left untrained.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        raise TokenRatioError(
            f"{type(model).__name__} is not a transformers causal language model with a backbone "
            "and an output head"
        )
    own_head(model)
    # Bound to the instance, so that a deep copy runs its own weights.
    model.forward = MethodType(_answering(cast(Any, type(model))), model)


@functools.cache
def _answering(model_class: Any) -> Any:
    # `wraps` keeps the signature, which `generate` and `Trainer` inspect.
    @functools.wraps(model_class.forward)
    def forward(self: PreTrainedModel, *args: Any, token_request: Any = None, **kwargs: Any) -> Any:
        if token_request is None:
            return model_class.forward(self, *args, **kwargs)
        # PEFT passes None for arguments it was not given; not every backbone has all of them.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        outputs = self.base_model(*args, **kwargs, use_cache=False)
        hidden, states = outputs.last_hidden_state, token_request.states
        hidden = hidden[states] if states.ndim == 2 else hidden.flatten(0, 1)[states]
        return _answer_inside_head(self, hidden, token_request)

    return forward


def _answer_inside_head(
    model: PreTrainedModel, hidden: Tensor, request: TokenRequest
) -> dict[str, Tensor]:
    """Answer a request inside the call of the output head.

    The hooks of FSDP2 and ZeRO-3 make the head's weights whole for its call only, and reduce their
    gradients after it. The model's own forward always calls the head, so this does too.
    """
    head = _head_module(model)
    before = vars(head).get("forward")
    head.forward = lambda states: request.answer(model, states)
    try:
        return cast(dict[str, Tensor], model.get_output_embeddings()(hidden))
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def own_head(model: nn.Module, *, adapters: bool = True) -> Head:
    """The output head of a causal language model with its soft-cap, as it is or with adapters off.

    Raises:
        TokenRatioError: no head, a quantised one, or one under an adapter other than PEFT's
            `modules_to_save`, whose weights the statistics would not train.
    """
    model = language_model(model)
    head = _head_module(model, adapters=adapters)
    if isinstance(head, BaseTunerLayer):
        raise TokenRatioError(
            "an adapter on the output head (lm_head) is not supported: leave it out of "
            "target_modules, or train the whole head with modules_to_save=['lm_head']; merge one "
            "that is already trained with `tokenratio merge`"
        )
    weight = getattr(head, "weight", None)
    # ZeRO-3 leaves an empty tensor between calls, and notes the shape.
    shape = None if weight is None else getattr(weight, "ds_shape", weight.shape)
    if weight is None or shape is None or len(shape) != 2 or not weight.is_floating_point():
        raise TokenRatioError(
            f"{type(model).__name__} has no output head of the form weight · hidden + bias "
            "(a quantised head is not supported)"
        )
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(weight, getattr(head, "bias", None), softcap)


def _head_module(model: PreTrainedModel, *, adapters: bool = True) -> Any:
    """The module whose weights are the head's: inside PEFT's wrapper, if there is one."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        active = adapters and not head.disable_adapters
        head = head.modules_to_save[head.active_adapters[0]] if active else head.original_module
    return head


def language_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def embedding_weight(model: nn.Module) -> Tensor:
    """The input embeddings of the causal language model inside, one row a token."""
    return cast(Tensor, language_model(model).get_input_embeddings().weight)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to 0; a LoRA adapter's own dropout is kept.

    Some attention modules hold the probability as a plain attribute rather than in `nn.Dropout`.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule is in its previous mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_statistics(model: nn.Module, input_ids: Int[Tensor, "1 length"]) -> None:
    """Compare our log-probabilities with the model's own logits on a few tokens.

    Architectures differ in what they do after the last hidden state (soft-caps, logit scales). An
    unknown one is refused, because it would be trained wrongly.
    """
    mask = torch.ones_like(input_ids)
    states = mask.bool()
    states[:, -1] = False
    labels = input_ids[:, 1:].flatten()
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    with eval_mode(model):
        ours = model(**inputs, token_request=TokenRequest(states, labels))["log_probs"]
        logits = model(**inputs, use_cache=False).logits[0, :-1]
    theirs = logits.to(ours.dtype).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    # The model rounds its logits to its own dtype; ours are float32 at least.
    precision = 0.03 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-4
    tolerance = precision * max(1.0, logits.abs().max().item())
    worst = (ours - theirs).abs().max().item()
    if not worst <= tolerance:
        raise TokenRatioError(
            f"{type(language_model(model)).__name__} is not supported: it transforms its logits "
            "after its last hidden state in an unknown way; log-probabilities differ from the "
            f"model's own by {worst:.3g} nats"
        )


@torch.no_grad()
def check_causal(model: nn.Module, input_ids: Int[Tensor, "1 length"]) -> None:
    """Check that a token does not change the states before it.

    Tokens past the shorter response are left out of the forward pass, so they must not matter.

    Raises:
        TokenRatioError: it does, or the model adds a loss of its own on all tokens.
    """
    config = language_model(model).config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise TokenRatioError(
            "the experts' balancing loss is not supported: set output_router_logits to false in "
            "the model's configuration"
        )
    states = torch.ones_like(input_ids, dtype=torch.bool)
    states[:, -1] = False
    other = input_ids.clone()
    other[:, -1] = input_ids[:, 0]
    with eval_mode(model):
        before, after = (
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                token_request=TokenRequest(states),
            )["hidden"].float()
            for ids in (input_ids, other)
        )
    if not torch.allclose(before, after, rtol=1e-2, atol=1e-3 * before.abs().max().item()):
        raise TokenRatioError(
            f"{type(language_model(model)).__name__} is not causal: a token changes the states "
            "before it"
        )
