"""This library's step, as the other cases are written: one function, the only one to know it."""

from collections.abc import Callable
from dataclasses import replace

import torch

from models import Models
from step_case import Step
from tokenratio.losses import LOSSES
from tokenratio.models.reference import Reference
from tokenratio.models.state_baseline import StateBaseline
from tokenratio.models.token_requests import answer_token_requests
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.forward import Forward


def ours(method: str, *, prune: bool = True, share: bool = True) -> Callable[[Models], Step]:
    """A step with the loss `method` of `LOSSES`, through what the trainer itself puts together.

    Args:
        prune: drop what lies past the shorter response before the forward pass.
        share: compute a pair's prompt once, where that pays.
    """

    def make(models: Models) -> Step:
        config = TokenRatioConfig(
            output_dir="unused",
            report_to="none",
            loss=method,
            share_prompt="auto" if share else "never",
        )
        answer_token_requests(models.inner)
        baseline = None
        if LOSSES[method].needs_baseline:
            baseline = StateBaseline(models.inner.config.hidden_size, config.baseline_hidden_size)
            baseline.to(next(models.policy.parameters()).device)
        forward = Forward(config, models.inner, Reference.frozen(models.reference), None, baseline)
        collate, _ = config.objective.collators(0, [models.inner, models.reference])
        if not prune:
            collate = replace(collate, prune=False)

        def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return forward(models.policy, inputs, 1 / len(inputs["row"])).total

        return Step(collate, loss)

    return make
