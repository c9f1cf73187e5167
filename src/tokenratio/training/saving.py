"""A trainer that saves checkpoints whole, and that a signal stops after saving one."""

import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy

from tokenratio.run_folder import UNFINISHED_FOLDER
from tokenratio.training.checkpoints import (
    checkpoint_name,
    publish,
    remove_surplus,
    seal,
    what_is_kept,
)
from tokenratio.training.sharding import ShardedTrainer
from tokenratio.training.stop_signals import StopSignals
from tokenratio.training.storage import storage_faults

_log = logging.getLogger(__name__)


class SavingTrainer(ShardedTrainer):
    """A trainer whose checkpoints are complete or not there.

    transformers writes a checkpoint into a folder of another name; synced and with a manifest, it
    gets its own. SIGTERM and SIGINT end training after the step with a checkpoint, and training
    never goes past its last step.
    """

    _signals = StopSignals()
    # Where the checkpoint is that is being written.
    _unfinished: Path | None = None
    # The steps of the last checkpoint, and of the last call of `_maybe_log_save_evaluate`.
    _saved_step = _left_step = -1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does.

        Raises:
            KeyboardInterrupt: SIGINT ended the run, after a checkpoint.
            SystemExit: so did SIGTERM; the code is 143.
            StorageError: the output folder can no longer be written to.
        """
        self._saved_step = self._left_step = -1
        folder, announce = str(self.args.output_dir), self.is_world_process_zero()
        with storage_faults(folder), StopSignals(announce=announce) as self._signals:
            output = super().train(*args, **kwargs)
            # The best model, once loaded, is not to be saved as the last step's.
            if self._saved_step == self.state.global_step or not self.args.load_best_model_at_end:
                self._stop_if_asked()
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The last checkpoint of a finished run, also one that was stopped early, may lie within an
        # epoch: transformers would then train another step before it looks whether that was the
        # last one.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of 1, transformers would remove the last checkpoint if another is the best:
        # the finished run would then be resumed from the best, and trained further.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save after a step, then stop if a signal asks for it.

        Called twice at the last step of an epoch, or of the run: after the step, and after the
        epoch. Its checkpoint is the epoch's, because a run resumed there goes on, or is finished,
        without evaluating this epoch.
        """
        is_first = self._left_step != self.state.global_step
        self._left_step = self.state.global_step
        ends_epoch = float(self.state.epoch or 0).is_integer() or self.control.should_training_stop
        if not (is_first and ends_epoch):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            # Without a checkpoint of the step at which a callback stopped it, a resumed run would
            # train that far again.
            regular = self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH)
            is_saved = self._saved_step == self.state.global_step
            is_last = self.control.should_training_stop and not is_first
            if is_last and regular and not is_saved:
                self._save_checkpoint(self.model_wrapped, None)
            self._stop_if_asked()
            return
        waits = self.control.should_save and self.args.save_strategy != SaveStrategy.BEST
        self.control.should_save &= not waits
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.control.should_save |= waits

    def _stop_if_asked(self) -> None:
        """End the run with a checkpoint if any of its processes got a signal."""
        number = self._signals.received
        if self.accelerator.num_processes > 1:
            numbers = torch.tensor([number], device=self.args.device)
            number = int(self.accelerator.gather(numbers).max())
        if not number:
            return
        step = self.state.global_step
        if self._saved_step != step:
            self._save_checkpoint(self.model_wrapped, None)
        if self.is_world_process_zero():
            kept = what_is_kept(str(self.args.output_dir))
            stopped = f"stopped by {signal.Signals(number).name} after step {step}. {kept}"
            if number == signal.SIGINT:
                raise KeyboardInterrupt(stopped)
            _log.warning(stopped)
        raise SystemExit(128 + number)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint under another name, and name it once it is complete."""
        folder = Path(super()._get_output_dir(trial))
        unfinished, saves = folder / UNFINISHED_FOLDER, self.args.should_save
        try:
            with storage_faults(folder):
                self._write_checkpoint(model, trial, folder)
        except Exception:
            if saves:  # to free the disk
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self._unfinished = None
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / checkpoint_name(self.state.global_step)))

    def _write_checkpoint(self, model: nn.Module, trial: Any, folder: Path) -> None:
        unfinished, saves = folder / UNFINISHED_FOLDER, self.args.should_save
        name = checkpoint_name(self.state.global_step)
        written, checkpoint = unfinished / name, folder / name
        if saves:
            if unfinished.exists():
                shutil.rmtree(unfinished)
            unfinished.mkdir()  # fails if the run's folder is gone
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        super()._save_checkpoint(model, trial)
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = best = str(checkpoint)
            if saves:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if saves:
            seal(written)
            publish(written, checkpoint)
            keep = [checkpoint] if best is None else [checkpoint, Path(best)]
            remove_surplus(folder, self.args.save_total_limit, keep)
        self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """As in transformers, but without `training_args.bin`, a pickle that nothing reads."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # uploads run in the background, and need the final name
            super()._push_from_checkpoint(checkpoint_folder)
