"""Resuming a run exactly, or refusing to."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from tokenratio.errors import TokenRatioError
from tokenratio.models.pretrained_arguments import WHERE_KWARGS, loading_arguments
from tokenratio.models.reference import describe_reference
from tokenratio.run_folder import (
    RUN_FILE,
    mask_secrets,
    read_run_file,
    versions,
    write_run_file,
)
from tokenratio.training.arguments import shown
from tokenratio.training.checkpoints import remove_unfinished, resolve_checkpoint
from tokenratio.training.model_card import own_settings, write_model_card
from tokenratio.training.pair_config import PairConfig
from tokenratio.training.run_checks import schedule_of
from tokenratio.training.saving import SavingTrainer

# Settings that change neither the order of the rows nor the arithmetic. All others must stay the
# same, including those that transformers adds later.
MAY_DIFFER = frozenset(
    (
        *("output_dir", "run_name", "project", "resume_from_checkpoint", "do_train", "do_eval"),
        *("do_predict", "local_rank", "debug", "skip_memory_metrics", "check_reference"),
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "report_to"),
        *("log_on_each_node", "log_level", "log_level_replica", "logging_nan_inf_filter"),
        *("disable_tqdm", "include_num_input_tokens_seen", "trackio_space_id"),
        *("trackio_bucket_id", "trackio_static_space_id"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "prediction_loss_only"),
        *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches"),
        *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics"),
        *("bf16_full_eval", "fp16_full_eval", "load_best_model_at_end"),
        *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node"),
        *("save_only_model", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
        *("ddp_timeout", "ddp_backend", "use_cpu", "reference_cache_dir", "token_scores"),
        # The rows themselves are compared.
        *("on_bad_row", "train_split", "eval_split", "max_eval_samples"),
        *("columns", "data_cache_dir", "dataset_num_proc"),
    )
)
# These may grow; the effect on the learning rate is logged.
_LENGTH = ("num_train_epochs", "max_steps")
# These learning rates depend on when evaluations take place.
_FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
_WHEN_EVALUATED = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start")
# A run without a best checkpoint may start to select one.
_OF_THE_BEST = ("metric_for_best_model", "greater_is_better")
_COMPARED_VERSIONS = ("torch", "transformers", "tokenratio")
_log = logging.getLogger(__name__)


def check_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume with anything that would change what the run computes.

    A policy built from the checkpoint would become its own reference; another batch size or seed
    would repeat some rows and skip others.

    Args:
        identity: what `run.json` would hold now.
    Raises:
        TokenRatioError: something differs; names it.
    """
    began = read_run_file(checkpoint, checkpoint.parent)
    if began is None:
        raise TokenRatioError(
            f"neither {checkpoint} nor the folder it is in holds a {RUN_FILE}: the run's settings "
            "cannot be checked, so it cannot be resumed exactly"
        )
    now = json.loads(json.dumps(mask_secrets(identity), default=str))
    run = f"the run of {checkpoint}"
    reference, old_reference = now.get("reference") or {}, began.get("reference") or {}
    if began.get("kind") != now.get("kind"):
        raise TokenRatioError(
            f"{run} trained a {began.get('kind', 'policy')}, not a {now.get('kind', 'policy')}"
        )
    # Settings first, because another method has another reference.
    for name, was, is_now in _differences(began, now):
        raise TokenRatioError(
            f"{run} began with {name} {shown(was)}, not {shown(is_now)}; set it back, or start a "
            "new run in another output_dir"
        )
    if reference.get("sha256") != old_reference.get("sha256"):
        raise TokenRatioError(
            f"the reference is not the one that {run} began with "
            f"({describe_reference(old_reference)}): start from the same model as then, not from a "
            "checkpoint"
        )
    if now["data"]["train"]["digest"] != began["data"]["train"]["digest"]:
        raise TokenRatioError(f"the training data, tokenizer or lengths differ from those of {run}")
    for name in _COMPARED_VERSIONS:
        was, is_now = (of.get(name) for of in (began.get("versions", {}), versions()))
        if None not in (was, is_now) and was != is_now:
            _log.warning("the run began with %s %s, and continues with %s", name, was, is_now)


def _differences(
    began: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that may not differ but does: its name, old and new value."""
    if "processes" in began and began["processes"] != now["processes"]:
        yield "processes", began["processes"], now["processes"]
    was, is_now = began["config"], now["config"]
    may_differ = set(MAY_DIFFER)
    if is_now.get("lr_scheduler_type") in _FOLLOWS_EVALUATION:
        may_differ -= set(_WHEN_EVALUATED)
    elif was.get("metric_for_best_model") is None:
        may_differ |= set(_OF_THE_BEST)
    # The method before the settings that follow from it.
    for name in sorted(is_now, key=lambda name: name != "loss"):
        if name in may_differ or name in _LENGTH or name not in was:
            continue
        old, new = was[name], is_now[name]
        if name == "model_init_kwargs":
            old, new = (
                {k: v for k, v in loading_arguments(value).items() if k not in WHERE_KWARGS}
                for value in (old, new)
            )
        if old != new:
            yield name, old, new
    limits = [(of["max_steps"], of["num_train_epochs"]) for of in (was, is_now)]
    if (limits[0][0] > 0) != (limits[1][0] > 0) or limits[0][0] > limits[1][0]:
        yield "max_steps", limits[0][0], limits[1][0]
    elif limits[1][0] <= 0 and limits[0][1] > limits[1][1]:
        yield "num_train_epochs", limits[0][1], limits[1][1]
    if "adapters" in began and began["adapters"] != now.get("adapters"):
        yield from _adapter_differences(began["adapters"] or {}, now.get("adapters") or {})


def _adapter_differences(
    began: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    if began.keys() != now.keys():
        yield "adapters", sorted(began) or None, sorted(now) or None
    for adapter, settings in now.items():
        was = began.get(adapter, {})
        for name, value in settings.items():
            if name in was and was[name] != value:
                yield f"the adapter's {name}", was[name], value


class ResumableTrainer(SavingTrainer):
    """A trainer whose runs are resumed exactly, or refused with the reason."""

    args: PairConfig
    train_dataset: Dataset | None

    def run_identity(self) -> dict[str, Any]:
        """What `run.json` records of the run, and a resumed checkpoint must share."""
        raise NotImplementedError

    def before_training(self, checkpoint: Path | None) -> None:
        """Called before the first step, after `checkpoint` was checked."""

    def train(  # type: ignore[override]  # a Path too
        self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train, or resume from a folder, or with True from the newest complete checkpoint.

        Raises:
            TokenRatioError: no complete checkpoint, one of another run, no training data, a loss
                that is not finite.
        """
        if self.train_dataset is None:
            raise TokenRatioError("no train_dataset was given")
        batch = self.args.train_batch_size * self.accelerator.num_processes
        if self.args.dataloader_drop_last and len(self.train_dataset) < batch:
            raise TokenRatioError(
                f"dataloader_drop_last leaves nothing to train on: {len(self.train_dataset)} rows "
                f"fill no batch of {batch}"
            )
        checkpoint = self._choose(resume_from_checkpoint)
        vars(self).pop("_identity", None)  # of an earlier call
        self._run()
        if checkpoint is not None:
            check_same_run(checkpoint, self._identity)
        if self.is_world_process_zero():
            remove_unfinished(Path(self.args.output_dir))
            write_run_file(self.args.output_dir, **self._identity)
        self.before_training(checkpoint)
        if checkpoint is None:
            return super().train(**kwargs)
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        callback = _CurrentIntervals(state.max_steps)
        self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)
        finally:
            self.remove_callback(callback)

    def _choose(self, resume: str | Path | bool | None) -> Path | None:
        """The checkpoint to resume; one process checks it for all, since that reads it whole."""
        chosen: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                chosen = [resolve_checkpoint(resume, self.args.output_dir)]
            except TokenRatioError as error:
                chosen = [error]
        found = broadcast_object_list(chosen)[0]
        if isinstance(found, TokenRatioError):
            raise found
        return cast(Path | None, found)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and model card; a checkpoint also records its run."""
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call and self.args.should_save:
            write_run_file(folder, **self._run())
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_card(folder)

    def create_model_card(  # type: ignore[override]  # keyword arguments only
        self,
        *,
        finetuned_from: str | None = None,
        tasks: str | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        """Write `README.md` from the run's record; the arguments are transformers'."""
        if not self.is_world_process_zero():
            return
        header = {"base_model": finetuned_from, "datasets": dataset_tags or dataset}
        given = {name: value for name, value in header.items() if value is not None}
        if tasks is not None:
            given["pipeline_tag"] = tasks
        self._write_card(Path(self.args.output_dir), **given, **metadata)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.create_model_card()  # transformers would write one only at the end
        super()._push_from_checkpoint(checkpoint_folder)

    def _run(self) -> dict[str, Any]:
        """The contents of `run.json`, without versions."""
        if not hasattr(self, "_identity"):  # not trained yet
            self._identity = {
                "config": self.args.to_dict(),
                "processes": self.accelerator.num_processes,
                **self.run_identity(),
            }
        return self._identity

    def _write_card(self, folder: Path, **metadata: Any) -> None:
        run = mask_secrets({"versions": versions(), **self._run()})
        settings = own_settings(self.args, leave_out=MAY_DIFFER)
        if not write_model_card(folder, run, settings, **metadata):
            _log.warning("%s/README.md was not written by tokenratio and is kept", folder)


class _CurrentIntervals(TrainerCallback):
    """Gives a resumed run the intervals of its settings; transformers keeps the checkpoint's.

    Args:
        max_steps: the run's length when the checkpoint was written.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        if state.global_step >= state.max_steps and state.is_world_process_zero:
            _log.warning(
                "the run is finished (%d steps), nothing is left to train: to train further, raise "
                "num_train_epochs or max_steps",
                state.global_step,
            )
        if state.best_metric is not None and state.best_model_checkpoint is None:
            state.best_metric = state.best_global_step = None
            if state.is_world_process_zero:
                _log.warning(
                    "the best checkpoint so far no longer exists: the best is chosen from now on"
                )
        if state.max_steps == self.max_steps or not isinstance(lr_scheduler, LambdaLR):
            return
        step, old = state.global_step, cast(LambdaLR, schedule_of(args, self.max_steps))
        was, is_now = (
            float(schedule.lr_lambdas[0](step)) * args.learning_rate
            for schedule in (old, lr_scheduler)
        )
        if was != is_now and state.is_world_process_zero:
            _log.warning(
                "the run now has %d steps instead of %d: its %s schedule is stretched, and the "
                "learning rate goes from %.3g to %.3g after step %d",
                *(state.max_steps, self.max_steps, SchedulerType(args.lr_scheduler_type).value),
                *(was, is_now, step),
            )
