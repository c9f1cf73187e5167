"""Resuming a run: exactly as if it had never stopped, or not at all."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import TrainOutput

from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import mask_secrets, read_document, versions, write_run_file
from tokenratio.training.model_card import own_settings, write_model_card
from tokenratio.training.pair_config import PairConfig
from tokenratio.training.same_run import MAY_DIFFER, check_same_run

# Written last by transformers, so a checkpoint that has it whole is complete.
_LAST_FILE = "trainer_state.json"
_log = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path, *, quiet: bool = False) -> Path | None:
    """The newest checkpoint that can be resumed; what is skipped is logged, unless `quiet`."""
    found = [(int(path.name.removeprefix("checkpoint-")), path) for path in _checkpoints(folder)]
    for _, path in sorted(found, reverse=True):
        missing = _what_is_missing(path)
        if missing is None:
            return path
        if not quiet:
            _log.warning("%s is skipped: %s", path, missing)
    return None


def resolve_checkpoint(resume: str | Path | bool | None, folder: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or True for the folder's newest.

    Raises:
        TokenRatioError: there is none, or it is not complete.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        found = last_checkpoint(folder)
        if found is None:
            held = sorted(path.name for path in _checkpoints(folder))
            why = f": {held[-1]}: {_what_is_missing(Path(folder) / held[-1])}" if held else ""
            raise TokenRatioError(f"{folder} holds no complete checkpoint to resume from{why}")
        return found
    path = Path(resume)
    if not path.is_dir():
        raise TokenRatioError(f"no checkpoint folder {path}")
    missing = _what_is_missing(path)
    if missing is not None:
        raise TokenRatioError(f"{path} is not a complete checkpoint: {missing}")
    return path


def _checkpoints(folder: str | Path) -> Iterator[Path]:
    for path in Path(folder).glob("checkpoint-*"):
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
            yield path


def _what_is_missing(checkpoint: Path) -> str | None:
    """Why a folder cannot be resumed exactly; None if it can."""
    if read_document(checkpoint / _LAST_FILE) is None:
        return f"{_LAST_FILE} is missing or cut off"
    for pattern, what in (
        ("optimizer*", "its optimizer (save_only_model leaves it out)"),
        ("scheduler.pt", "its learning-rate schedule"),
        ("rng_state*", "the state of its random numbers"),
    ):
        if not any(checkpoint.glob(pattern)):
            return f"it was saved without {what}, so it cannot be resumed exactly"
    return None


class ResumableTrainer(Trainer):
    """A trainer whose runs are resumed exactly, or refused with the reason."""

    args: PairConfig
    train_dataset: Dataset | None

    def run_identity(self) -> dict[str, Any]:
        """What `run.json` records of the run; a checkpoint resumed must have the same."""
        raise NotImplementedError

    def before_training(self, checkpoint: Path | None) -> None:
        """Called before the first step, after `checkpoint` was found to be of the same run."""

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
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        vars(self).pop("_identity", None)  # of an earlier call, with other settings
        self._run()
        if checkpoint is not None:
            check_same_run(checkpoint, self._identity)
        if self.is_world_process_zero():
            write_run_file(self.args.output_dir, **self._identity)
        self.before_training(checkpoint)
        if checkpoint is None:
            return super().train(**kwargs)
        state = TrainerState.load_from_json(str(checkpoint / _LAST_FILE))
        if _is_finished(state, self.args):
            return self._finish(checkpoint, state)
        callback = _SettingsOfNow(state.max_steps)
        self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)
        finally:
            self.remove_callback(callback)

    def _finish(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """Restore the end of a finished run; transformers would train one more step."""
        _log.warning(
            "%s is the end of a finished run (%d steps): nothing is left to train; to train "
            "further, raise num_train_epochs or max_steps",
            checkpoint,
            state.global_step,
        )
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and model card; a checkpoint also records its run."""
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call and self.args.should_save:
            write_run_file(folder, **self._run())
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_card(folder)

    def create_model_card(  # type: ignore[override]  # the arguments have no order
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
        self.create_model_card()  # of transformers' making there would be none yet
        super()._push_from_checkpoint(checkpoint_folder)

    def _run(self) -> dict[str, Any]:
        """The contents of `run.json` without the versions."""
        if not hasattr(self, "_identity"):  # saved before it was trained
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
            _log.warning("%s/README.md is not tokenratio's and stays as it is", folder)


def _is_finished(state: TrainerState, args: TrainingArguments) -> bool:
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return (state.epoch or 0) >= args.num_train_epochs


class _SettingsOfNow(TrainerCallback):
    """Gives a resumed run the intervals it is started with; transformers keeps the checkpoint's.

    Args:
        max_steps: how many steps the run was to have when the checkpoint was written.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_begin(  # type: ignore[override]  # the only settings there are
        self,
        args: PairConfig,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        state.compute_steps(args, state.max_steps)
        if state.best_metric is not None and state.best_model_checkpoint is None:
            state.best_metric = state.best_global_step = None
            if state.is_world_process_zero:
                _log.warning(
                    "the best checkpoint so far no longer exists: the best is chosen from now on"
                )
        if state.max_steps == self.max_steps or not isinstance(lr_scheduler, LambdaLR):
            return
        step, old = state.global_step, _schedule(args, self.max_steps)
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


def _schedule(args: PairConfig, steps: int) -> LambdaLR:
    """The learning-rate schedule of a run of so many steps."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )
