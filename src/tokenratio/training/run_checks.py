"""Checks before the first step, so that a run does not fail hours later."""

import copy
import difflib
import os
import tempfile
from collections.abc import Iterable
from typing import Any, NoReturn

import huggingface_hub
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import EarlyStoppingCallback, SchedulerType, Trainer, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from tokenratio.errors import TokenRatioError, first_line, reported_as
from tokenratio.names import suggestion
from tokenratio.training.arguments import check_machine
from tokenratio.training.pair_config import PairConfig, is_several

# Optimizers that are built from the model as a whole ask for these.
_OF_THE_MODEL = ("params", "model", "optimizer_dict")


def check_run(
    args: Any, kind: type[PairConfig], eval_dataset: Any, callbacks: Iterable[Any] | None = None
) -> None:
    """Check what can be checked of a run before its model and data are loaded.

    Args:
        kind: the class of settings that the trainer takes.
    Raises:
        TokenRatioError: see `check_machine`, `check_settings`; or the trackers, hub or output
            folder cannot be used from this machine.
    """
    if not isinstance(args, kind):
        raise TokenRatioError(f"args must be a {kind.__name__}, not {type(args).__name__}")
    check_machine(args)
    check_settings(args, eval_dataset, callbacks)
    available = get_available_reporting_integrations()
    for name in args.report_to:
        if isinstance(name, str) and name not in (*available, "none", "all"):
            raise TokenRatioError(
                f"report_to {name}: transformers does not know this tracker, or its package is "
                f"not installed{suggestion(name, [*available, 'none'])}"
            )
    if args.push_to_hub and not (args.hub_token or huggingface_hub.get_token()):
        raise TokenRatioError(
            "push_to_hub needs a token: run `hf auth login`, set HF_TOKEN, or give hub_token"
        )
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise TokenRatioError(
            f"output_dir {args.output_dir} cannot be written to: {error.strerror or error}"
        ) from None


def check_settings(
    args: PairConfig, eval_dataset: Any, callbacks: Iterable[Any] | None = None
) -> None:
    """Refuse settings that would fail, or do nothing, once training has begun.

    Args:
        eval_dataset: what the trainer is given to evaluate on; its rows are not read.
    """
    _check_evaluation(args, eval_dataset, callbacks or [])
    _check_optimizer(args)
    schedule = SchedulerType(args.lr_scheduler_type).value
    with reported_as(
        f"lr_scheduler_type {schedule} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
    ):
        schedule_of(args, steps=100)


def check_trained(model: nn.Module, learning_rate: float) -> None:
    """Refuse a model with nothing to train, or with a trained weight of less than 32 bits.

    Its updates would be rounded away: bfloat16 keeps 8 bits of a weight, so an update of less than
    1/256 of it is lost. Frozen weights may have any dtype.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise TokenRatioError(
            "every weight of the model is frozen, as after PEFT's merge_and_unload: call "
            "model.requires_grad_(True) to train all of them, or add an adapter (peft)"
        )
    for name, parameter in trained:
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            refuse_dtype(parameter.dtype, learning_rate, name)


def refuse_dtype(dtype: torch.dtype, learning_rate: float, parameter: str = "") -> NoReturn:
    """Raise a `TokenRatioError`: weights of this dtype cannot be trained."""
    is_adapter = ".lora_" in parameter or ".modules_to_save." in parameter
    todo = (
        "load the model below the adapter in float32, or leave out modules_to_save and keep "
        "peft's autocast_adapter_dtype"
        if is_adapter
        else "load the model with dtype float32 and set bf16 to true to compute in bfloat16, or "
        "train a LoRA adapter"
    )
    name = str(dtype).removeprefix("torch.")
    raise TokenRatioError(
        f"weights in {name} cannot take updates of {learning_rate:g}, which are rounded away"
        f"{f' ({parameter})' if parameter else ''}: {todo}"
    )


def _check_evaluation(args: PairConfig, eval_dataset: Any, callbacks: Iterable[Any]) -> None:
    strategy = args.eval_strategy.value
    if eval_dataset is None and args.held_out_share is None and strategy != "no":
        raise TokenRatioError(f"eval_strategy {strategy} needs an eval_dataset or held_out_share")
    for name, wanted in (
        ("load_best_model_at_end", args.load_best_model_at_end),
        ("save_strategy best", args.save_strategy.value == "best"),
        ("early stopping", any(isinstance(c, EarlyStoppingCallback) for c in callbacks)),
    ):
        if wanted and strategy == "no":
            raise TokenRatioError(f"{name} needs an eval_strategy (steps or epoch) to compare by")
        if wanted and args.metric_for_best_model is None:
            raise TokenRatioError(f"{name} needs metric_for_best_model")
    if args.metric_for_best_model is not None:
        parts = None
        if is_several(eval_dataset):
            parts = [name for name, part in eval_dataset.items() if part is not None]
        _check_metric(args.metric_for_best_model, args.evaluated_metrics(), parts)


def _check_metric(metric: str, measured: Iterable[str], eval_sets: list[str] | None) -> None:
    """Refuse a metric that no evaluation will report.

    Args:
        eval_sets: the names of several held-out sets; None for a single one.
    """
    known = [
        name if part is None else f"{part}_{name}"
        for part in eval_sets or (None,)
        for name in measured
    ]
    name = metric.removeprefix("eval_")
    if name in known:
        return
    endings = {of.rpartition("/")[2]: of for of in reversed(known)}
    close = difflib.get_close_matches(name, known, n=1) or [
        endings[of] for of in difflib.get_close_matches(name.rpartition("/")[2], endings, n=1)
    ]
    hint = f"; did you mean eval_{close[0]}?" if close else ""
    raise TokenRatioError(
        f"metric_for_best_model {metric} is not measured{hint}; known: "
        f"{', '.join(f'eval_{name}' for name in known)}"
    )


def _check_optimizer(args: PairConfig) -> None:
    name, given = OptimizerNames(args.optim).value, str(args.optim_args or "").replace(" ", "")
    pairs = [pair.partition("=") for pair in given.split(",")] if given else []
    if not all(key and equals and value for key, equals, value in pairs):
        raise TokenRatioError(f"optim_args must be `name=value,name=value`, not {args.optim_args}")
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        if not set(_OF_THE_MODEL) & settings.keys():
            kind([nn.Parameter(torch.zeros(2, 2))], **settings)
    except Exception as error:
        if args.optim_target_modules is not None:
            return  # built from the model itself, when there is one
        raise TokenRatioError(
            f"optim {name}{f' with optim_args {given}' * bool(given)}: {first_line(error)}"
        ) from error
    for key, _, _ in pairs:
        if not _reads(args, key):
            raise TokenRatioError(f"optim_args: {name} has no argument {key}")


def _reads(args: PairConfig, key: str) -> bool:
    """Whether the optimizer takes an argument; transformers ignores unknown ones."""
    probed, bare = copy.copy(args), copy.copy(args)
    probed.optim_args, bare.optim_args = f"{key}=7", None
    try:
        return Trainer.get_optimizer_cls_and_kwargs(probed) != Trainer.get_optimizer_cls_and_kwargs(
            bare
        )
    except Exception:  # not a value for it, so it was read
        return True


def schedule_of(args: PairConfig, steps: int) -> LRScheduler:
    """The learning-rate schedule of a run of so many steps, with an optimizer of its own."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )
