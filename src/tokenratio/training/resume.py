"""Resuming a run exactly, or refusing to."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, SchedulerType, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from tokenratio.errors import TokenRatioError
from tokenratio.masking import mask_secrets
from tokenratio.models.device import describe_device
from tokenratio.run_folder import (
    versions,
    write_run_file,
)
from tokenratio.training.checkpoints import remove_unfinished
from tokenratio.training.model_card import own_settings, write_model_card
from tokenratio.training.output_folder import (
    checkpoint_to_resume,
    on_first_process,
    output_held,
)
from tokenratio.training.pair_config import PairConfig
from tokenratio.training.run_checks import schedule_of
from tokenratio.training.run_record import (
    MAY_DIFFER,
    check_same_run,
    report_changes,
    resumed_record,
)
from tokenratio.training.saving import SavingTrainer

_log = logging.getLogger(__name__)


class ResumableTrainer(SavingTrainer):
    """A trainer whose runs are resumed exactly, or refused with the reason."""

    args: PairConfig
    train_dataset: Dataset | None
    # Whether the run goes on with settings that change its result.
    _is_changed = False

    def run_identity(self) -> dict[str, Any]:
        """What `run.json` records of the run, and a resumed checkpoint must share."""
        raise NotImplementedError

    def before_training(self, checkpoint: Path | None) -> None:
        """Called before the first step, after `checkpoint` was checked."""

    def train(  # type: ignore[override]  # a Path too
        self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train, or resume from a folder, or with True from the newest complete checkpoint.

        With True it starts where the output folder holds no checkpoint, as in a job that a
        scheduler starts again.

        Raises:
            TokenRatioError: a checkpoint of another run, or one that is not complete; another run
                is using the output folder; no training data; a loss that is not finite.
        """
        with output_held(self.args):
            return self._train_alone(resume_from_checkpoint, **kwargs)

    def _train_alone(self, resume_from_checkpoint: str | Path | bool | None, **kwargs: Any) -> Any:
        if self.train_dataset is None:
            raise TokenRatioError("no train_dataset was given")
        batch = self.args.train_batch_size * self.accelerator.num_processes
        if self.args.dataloader_drop_last and len(self.train_dataset) < batch:
            raise TokenRatioError(
                f"dataloader_drop_last leaves nothing to train on: {len(self.train_dataset)} rows "
                f"fill no batch of {batch}"
            )
        checkpoint = on_first_process(
            self.args, lambda: checkpoint_to_resume(resume_from_checkpoint, self.args)
        )
        for name in ("_identity", "_is_changed"):  # of an earlier call
            vars(self).pop(name, None)
        self._run()
        if checkpoint is not None:
            self._identity = self._resume(checkpoint)
        if self.is_world_process_zero():
            remove_unfinished(Path(self.args.output_dir))
            write_run_file(self.args.output_dir, **self._identity)
        self.before_training(checkpoint)
        if checkpoint is None:
            return super().train(**kwargs)
        callback = _CurrentState(checkpoint, is_changed=self._is_changed)
        callback.stoppers = [
            each
            for each in self.callback_handler.callbacks
            if isinstance(each, EarlyStoppingCallback)
        ]
        self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)
        finally:
            self.remove_callback(callback)

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        """The record of the resumed run; refuses what differs too much from the run."""
        identity, accepts = self._run(), self.args.resume_with_changes
        changes = check_same_run(checkpoint, identity, with_changes=accepts)
        self._is_changed = any(change.kind == "inexact" for change in changes)
        if self.is_world_process_zero():
            report_changes(changes)
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        return resumed_record(checkpoint, step, identity, self.args.output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both. If the run's settings have changed, the new ones are used."""
        given = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in cast(Optimizer, self.optimizer).param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if not self._is_changed or not isinstance(schedule, LambdaLR):
            return
        groups = cast(Optimizer, self.optimizer).param_groups
        schedule.base_lrs = [settings["initial_lr"] for settings in given]
        for group, settings, factor in zip(groups, given, schedule.lr_lambdas, strict=True):
            group |= settings
            group["lr"] = settings["initial_lr"] * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in groups]  # which is logged

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
                "wrapper": self.wrapper,
                "device": describe_device(self.args.device),
                **self.run_identity(),
            }
        return self._identity

    def _write_card(self, folder: Path, **metadata: Any) -> None:
        run = mask_secrets({"versions": versions(), **self._run()})
        settings = own_settings(type(self.args), self.args.to_dict(), leave_out=MAY_DIFFER)
        if not write_model_card(folder, run, settings, **metadata):
            _log.warning("%s/README.md was not written by tokenratio and is kept", folder)


class _CurrentState(TrainerCallback):
    """Gives a resumed run the intervals of its settings, and its best checkpoint where it is now.

    transformers keeps those of the checkpoint. Early stopping goes on counting where it was.

    Args:
        checkpoint: the one that is resumed.
        is_changed: a setting differs on which the end of the run depends.

    Attributes:
        stoppers: the run's callbacks for early stopping.
    """

    stoppers: Sequence[EarlyStoppingCallback] = ()

    def __init__(self, checkpoint: Path, *, is_changed: bool) -> None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        # The run's length when the checkpoint was written.
        self.max_steps, self.is_changed = state.max_steps, is_changed
        # Beside the checkpoint, also if the run's folder has been moved or copied.
        name = Path(state.best_model_checkpoint or "").name
        self.best = checkpoint.with_name(name) if name else None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)
        if self.is_changed and state.global_step > state.max_steps:
            steps = "1 step" if state.max_steps == 1 else f"{state.max_steps} steps"
            raise TokenRatioError(
                f"with these settings the run has only {steps}, and the checkpoint is of step "
                f"{state.global_step}: set max_steps"
            )
        if self._is_stopped(state):
            control.should_training_stop = True
            if state.is_world_process_zero:
                _log.warning(
                    "the run was stopped early at step %d, nothing is left to train: to train "
                    "further, leave out the callback or raise its patience",
                    state.global_step,
                )
        elif state.global_step >= state.max_steps and state.is_world_process_zero:
            _log.warning(
                "the run is finished (%d steps), nothing is left to train: to train further, raise "
                "num_train_epochs or max_steps",
                state.global_step,
            )
        if self.best is not None and self.best.is_dir():
            if state.best_model_checkpoint is None and state.is_world_process_zero:
                _log.warning("the best checkpoint so far is %s", self.best)  # after transformers'
            state.best_model_checkpoint = str(self.best)
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

    def _is_stopped(self, state: TrainerState) -> bool:
        """Whether early stopping had ended the run; it goes on counting where it was."""
        states = cast(dict[str, Any], state.stateful_callbacks)
        for stopper in self.stoppers:
            saved = states.get(type(stopper).__name__)
            if isinstance(saved, dict):  # a list if there are several, in no certain order
                for name, value in saved["attributes"].items():
                    setattr(stopper, name, value)
        return any(
            stopper.early_stopping_patience_counter >= stopper.early_stopping_patience
            for stopper in self.stoppers
        )
