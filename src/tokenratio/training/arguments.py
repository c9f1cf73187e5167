"""Which of transformers' `TrainingArguments` the trainers support, checked before a run."""

import re
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from tokenratio.errors import TokenRatioError
from tokenratio.models.device import can_pin_memory, default_device
from tokenratio.models.pretrained_arguments import read_init_kwargs
from tokenratio.names import require_at_least, require_choice
from tokenratio.training.metrics import greater_is_better
from tokenratio.training.wrappers import check_wrapper, prepare_processes, settle_wrapper

if TYPE_CHECKING:
    from tokenratio.training.pair_config import PairConfig

# Settings that these trainers restrict: the values they may have, and why.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": ((False,), "pairs are not arguments of the model and would be lost"),
    "label_smoothing_factor": ((0, 0.0), "it is for classes; pairs have label_smoothing"),
    "parallelism_config": (
        (None,),
        "every process runs whole rows: a sequence is not split over processes",
    ),
    "neftune_noise_alpha": (
        (None,),
        "noise on the embeddings makes policy and reference differ on the same tokens",
    ),
    "auto_find_batch_size": (
        (False,),
        "it changes the batch size during a run, so a run could not be repeated",
    ),
    "ignore_data_skip": ((False,), "a resumed run would see some rows twice"),
    "fp16_full_eval": ((False,), "evaluation runs in the precision of training"),
    "bf16_full_eval": ((False,), "evaluation runs in the precision of training"),
    "label_names": ((None,), "pairs have no labels"),
    "include_for_metrics": (([], None), "the metrics are computed from the losses"),
    "batch_eval_metrics": ((False,), "metrics are summed batch by batch anyway"),
    "eval_do_concat_batches": ((True,), "metrics cover the whole evaluation"),
    "average_tokens_across_devices": (
        (True,),
        "the loss is a mean over the whole step, whatever the number of processes",
    ),
}
# How transformers prints a member of an enumeration.
_ENUMERATION = re.compile(r"\b(?:\w+Strategy|\w+Type|\w+Names)\.([A-Z_]+)\b")
_CHOICES: dict[str, type[Enum]] = {
    "optim": OptimizerNames,
    "lr_scheduler_type": SchedulerType,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
}


def resolve_arguments(args: "PairConfig", theirs: Callable[[], None]) -> None:
    """Check the settings and let transformers fill in its defaults, without requiring a GPU.

    A recipe for a GPU can thus be checked on a laptop; `check_machine` refuses what the machine
    cannot do when a run is set up.

    Args:
        theirs: `TrainingArguments.__post_init__` of `args`.
    """
    for name, (allowed, why) in _ONLY.items():
        value = getattr(args, name)
        if value not in allowed:
            raise TokenRatioError(f"{name} must be {shown(allowed[0])}, not {shown(value)}: {why}")
    for name, kind in _CHOICES.items():
        value = getattr(args, name)
        require_choice(
            name,
            value.value if isinstance(value, Enum) else value,
            [str(member.value) for member in kind],
            listed="see the documentation of transformers.TrainingArguments",
        )
    _check_domains(args)
    _choose_direction(args)
    if args.bf16 and default_device().type == "cpu":
        args.use_cpu = True  # which transformers requires for bfloat16 on a CPU
    prepare_processes(args)
    tf32, args.tf32 = args.tf32, None if default_device().type == "cpu" else args.tf32
    try:
        theirs()
    except TokenRatioError:
        raise
    except Exception as error:  # transformers checks its own fields, with errors of many kinds
        message = " ".join(str(error).split()) or type(error).__name__
        message = _ENUMERATION.sub(lambda found: found[1].lower(), message)
        raise TokenRatioError(message) from error
    args.tf32 = tf32
    settle_wrapper(args)
    args.model_init_kwargs = read_init_kwargs(args.model_init_kwargs)
    for name in ("load_in_4bit", "load_in_8bit", "quantization_config"):
        if (args.model_init_kwargs or {}).get(name):
            raise TokenRatioError(
                f"{name} in model_init_kwargs: quantized training is not supported; train an "
                "adapter (peft) on a model with dtype: bfloat16"
            )
    args.dataloader_pin_memory &= can_pin_memory()


def check_machine(args: TrainingArguments) -> None:
    """Raise `TokenRatioError` for settings that this machine cannot run as given."""
    if args.n_gpu > 1:
        raise TokenRatioError(
            f"{args.n_gpu} GPUs are visible to one process: start one process per GPU with "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one"
        )
    check_wrapper(args)
    if args.device.type != "cpu":
        return
    if args.fp16:
        raise TokenRatioError("fp16 needs a GPU, and this run is on a CPU: use bf16, or neither")
    if args.tf32:
        raise TokenRatioError("tf32 needs a GPU, and this run is on a CPU: leave tf32 out")


def _check_domains(args: TrainingArguments) -> None:
    theirs = {field.name: field for field in fields(TrainingArguments)}
    for field in fields(args):
        choices = field.metadata.get("choices")
        if choices and field is not theirs.get(field.name):
            require_choice(field.name, getattr(args, field.name), choices)
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size")
    sizes = (*batches, "gradient_accumulation_steps", "max_length", "max_prompt_length")
    require_at_least(1, **{name: getattr(args, name) for name in sizes})
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise TokenRatioError(
            f"num_train_epochs must be positive, not {args.num_train_epochs:g}: nothing would be "
            "trained"
        )
    for name in ("seed", "data_seed"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 2**32:
            raise TokenRatioError(f"{name} must be from 0 to 2**32 - 1, not {value}")


def _choose_direction(args: TrainingArguments) -> None:
    """Set `greater_is_better` by what `metric_for_best_model` measures, not by its name's end."""
    metric = args.metric_for_best_model
    if metric is None or args.greater_is_better is not None:
        return
    args.greater_is_better = greater_is_better(metric)
    if args.greater_is_better is None:
        raise TokenRatioError(
            f"metric_for_best_model {metric}: neither direction is always better; set "
            "greater_is_better to true or false"
        )


def shown(value: Any) -> str:
    """A setting's value as a recipe has it."""
    if value in (None, []):
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)
