"""What each method makes of the same pairs, step by step; all of it from the losses themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenratio.errors import TokenRatioError
from tokenratio.losses import LOSSES, Method, RatioMatching
from tokenratio.ratios import pair_log_ratio
from tokenratio.settings import check_known
from tokenratio.training.method_settings import MethodSettings
from tokenratio.types import PairStatistics

# Shown on every pair unless others are asked for; the run's own method comes first.
USUAL = ("tbpo_a", "tbpo_q", "tdpo1", "dpo")


@dataclass(frozen=True)
class ShownMethod:
    """A method with the settings that it is shown with.

    Attributes:
        name: the value of `loss`.
        settings: the arguments of its `per_pair` and `per_step`.
        is_own: they are those of a run.
    """

    name: str
    method: Method
    settings: Mapping[str, Any]
    is_own: bool = False


@dataclass(frozen=True)
class MethodValues:
    """A method on a set of pairs; arrays [pairs, steps] are 0 where they do not apply.

    Attributes:
        loss: of each pair, [pairs].
        chosen_push, rejected_push: −∂loss/∂log π(y_t|s_t), how strongly a step of gradient descent
            raises (positive) or lowers a token's log-probability; the state weight held fixed.
        steps: for methods with a ratio, by name: `pair_log_ratio`, log R_t; `log_state_weight`,
            log w_t, where the method has one; `slope`, dℓ/du at the step's u (the sum's, for a loss
            of whole responses); and `loss` of each step, where the loss is local to it.
    """

    loss: Float[Tensor, "pairs"]
    chosen_push: Float[Tensor, "pairs steps"]
    rejected_push: Float[Tensor, "pairs steps"]
    steps: Mapping[str, Float[Tensor, "pairs steps"]]


def shown_methods(
    losses: Sequence[str] | None,
    configs: Sequence[Mapping[str, Any]],
    *,
    beta: float | None,
    has_baseline: bool,
) -> tuple[list[ShownMethod], list[str]]:
    """The methods to show, and notes on those left out.

    Args:
        losses: their names; None for those of the runs and the usual ones.
        configs: each run's settings; empty for a model without a run. A method is shown as the
            first run that was trained with it had it.
        beta: of every method that has one; None for the run's own, and the published one of others.
        has_baseline: a learned state baseline is there.
    Raises:
        TokenRatioError: an unknown method, or one that was asked for and cannot be shown.
    """
    own: dict[str, Mapping[str, Any]] = {}
    for config in configs:
        if (loss := config.get("loss")) in LOSSES:
            own.setdefault(loss, config)
    names = losses or [*dict.fromkeys([*own, *USUAL])]
    check_known(names, LOSSES, "loss", listed="`tokenratio methods` describes them")
    found, notes = [], []
    for name in names:
        settings = _settings(name, own.get(name, {}), beta)
        method = settings.method
        why = ""
        if method.needs_contrast:
            why = "it needs token scores"
        elif method.needs_baseline and not has_baseline:
            why = "it needs the state baseline of a run that has trained one"
        if why and losses:
            raise TokenRatioError(f"{name} cannot be shown: {why}; leave it out of --losses")
        if not why:
            found.append(ShownMethod(name, method, settings.loss_settings, name in own))
        elif name in own:
            notes.append(f"{name}, the run's own method, is not shown: {why}")
    return found, notes


def notes_on_settings(
    runs: Mapping[str, Mapping[str, Any]], methods: Sequence[ShownMethod], *, beta: float
) -> list[str]:
    """A note on each run that is shown with settings of another one.

    Args:
        runs: the settings of each that it would be shown with alone, by name.
        methods: as they are shown.
        beta: of the rewards.
    """
    shown = {each.name: each.settings for each in methods}
    notes = []
    for name, config in runs.items():
        found = []
        if config.get("beta") not in (None, beta):
            found.append(f"rewards have β = {beta:g}, not its {config['beta']:g}")
        loss = config.get("loss")
        if loss in LOSSES and loss in shown:
            trained = _settings(loss, config, None).loss_settings
            differing = sorted(key for key in trained if trained[key] != shown[loss].get(key))
            if differing:
                found.append(f"{loss} has another {', '.join(differing)}")
        if found:
            notes.append(f"{name} is not shown with its own settings: {'; '.join(found)}")
    return notes


def _settings(name: str, config: Mapping[str, Any], beta: float | None) -> MethodSettings:
    given = {
        field.name: config[field.name]
        for field in fields(MethodSettings)
        if config.get(field.name) is not None and field.name not in ("sft_weight", "token_scores")
    }
    if beta is not None:
        given["beta"] = beta
    settings = MethodSettings(**{**given, "loss": name})
    settings.resolve_method()
    return settings


def method_values(shown: ShownMethod, pair: PairStatistics) -> MethodValues:
    """A method on pairs: its losses, their gradients, and what it compares at each step."""
    method, settings = shown.method, shown.settings
    leaves = [side.log_probs.detach().requires_grad_() for side in (pair.chosen, pair.rejected)]
    pair = replace(
        pair,
        chosen=replace(pair.chosen, log_probs=leaves[0]),
        rejected=replace(pair.rejected, log_probs=leaves[1]),
    )
    loss = method.per_pair(pair, **settings)
    chosen, rejected = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
    with torch.no_grad():
        steps = (
            _steps(method, settings, pair, rejected) if isinstance(method, RatioMatching) else {}
        )
        pushes = (-chosen * pair.chosen.mask, -rejected * pair.rejected.mask)
    return MethodValues(loss.detach(), *pushes, steps)


def _steps(
    method: RatioMatching,
    settings: Mapping[str, Any],
    pair: PairStatistics,
    rejected_gradient: Float[Tensor, "pairs steps"],
) -> dict[str, Float[Tensor, "pairs steps"]]:
    steps, shared, beta = pair.steps, pair.pair_mask, settings["beta"]
    mask = shared if method.is_local else pair.chosen.mask | pair.rejected.mask
    found: dict[str, Tensor] = {}
    log_weight: Tensor | float = 0.0
    if method.state_weight != "none":
        log_weight = method.log_state_weight(steps, tdpo_alpha=settings.get("tdpo_alpha"))
        found["log_state_weight"] = log_weight
    found["pair_log_ratio"] = pair_log_ratio(
        steps.chosen_log_ratio, steps.rejected_log_ratio, log_weight, beta=beta
    )
    # u rises by β with the rejected token's log-probability, and a step of T has 1/T of the mean.
    found["slope"] = rejected_gradient / beta
    if method.aggregation == "mean":
        found["slope"] = found["slope"] * shared.sum(-1, keepdim=True)
    if method.is_local:
        per_step = method.per_step(steps[shared], **settings)
        found["loss"] = torch.zeros_like(found["slope"]).masked_scatter(shared, per_step)
    return {name: values.masked_fill(~mask, 0.0) for name, values in found.items()}
