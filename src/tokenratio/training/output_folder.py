"""A run's output folder: one run at a time, and whether it starts or resumes there."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tokenratio.errors import TokenRatioError
from tokenratio.models.processes import Group
from tokenratio.run_folder import read_run_file
from tokenratio.training.checkpoints import (
    MANIFEST_FILE,
    checkpoints_of,
    last_checkpoint,
    resolve_checkpoint,
    restore_sealed,
)

Result = TypeVar("Result")
# Of a finished run. Not those of checkpoints.py: folders in an output folder are checkpoints.
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
_log = logging.getLogger(__name__)


def on_first_process(args: TrainingArguments, work: Callable[[], Result]) -> Result:
    """`Group.on_first` of a run's processes."""
    return Group(args.process_index, args.world_size).on_first(work)


def output_held(
    args: TrainingArguments, folder: str | Path | None = None
) -> AbstractContextManager[None]:
    """Keep other runs out of a folder, `args.output_dir` by default; all processes call it.

    Raises:
        TokenRatioError: on every process, if another run holds it.
    """
    path = str(args.output_dir if folder is None else folder)
    return Group(args.process_index, args.world_size).held(path)


def checkpoint_to_resume(
    resume: str | Path | bool | None, args: TrainingArguments, *, digests: bool = True
) -> Path | None:
    """The complete checkpoint that is meant; None to start from the beginning.

    For True it is the newest of the output folder; None, and said, if that holds no more than such
    a run leaves that was killed before its first checkpoint.

    Args:
        digests: of the newest, check all bytes; else only whether it is complete.
    Raises:
        TokenRatioError: a checkpoint that cannot be resumed, or for True only such ones, or a
            trained model without one, or the start of a run with another loss.
    """
    folder = str(args.output_dir)
    if resume:
        restore_sealed(Path(folder))
    if resume is not True:
        return resolve_checkpoint(resume, folder)
    found = last_checkpoint(folder, digests=digests)
    if found is not None:
        return found
    if any(map(_was_complete, checkpoints_of(folder))):
        return resolve_checkpoint(True, folder)  # says what is wrong with them
    if any(any(Path(folder).glob(pattern)) for pattern in _WEIGHTS):
        raise TokenRatioError(
            f"{folder} holds a trained model and no checkpoint to resume from: replace it with "
            "--overwrite, or choose another --output_dir"
        )
    began, loss = read_run_file(folder), getattr(args, "loss", None)
    if began is not None and began["config"].get("loss") != loss:
        was = began["config"].get("loss") or began.get("kind")
        raise TokenRatioError(
            f"{folder} holds the start of another run ({was}): replace it with --overwrite, or "
            "choose another --output_dir"
        )
    _log.warning("no complete checkpoint in %s: starting from the beginning", folder)
    return None


def _was_complete(checkpoint: Path) -> bool:
    """Whether a run had finished writing it, whatever happened to it since."""
    return any((checkpoint / name).exists() for name in (MANIFEST_FILE, TRAINER_STATE_NAME))
