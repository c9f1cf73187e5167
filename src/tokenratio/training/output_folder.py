"""A run's output folder: one run at a time, and whether it starts or resumes there."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tokenratio.errors import TokenRatioError
from tokenratio.locks import held
from tokenratio.run_folder import read_document
from tokenratio.training.checkpoints import (
    MANIFEST_FILE,
    checkpoints_of,
    last_checkpoint,
    resolve_checkpoint,
)

Result = TypeVar("Result")
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
_log = logging.getLogger(__name__)


def on_first_process(args: TrainingArguments, work: Callable[[], Result]) -> Result:
    """What `work` returns on the first process, on all of them; its refusal is raised on all."""
    outcome: list[Result | TokenRatioError | None] = [None]
    if args.process_index == 0:
        try:
            outcome = [work()]
        except TokenRatioError as error:
            outcome = [error]
    found = broadcast_object_list(outcome)[0]
    if isinstance(found, TokenRatioError):
        raise found
    return found


@contextmanager
def output_held(args: TrainingArguments, folder: str | Path | None = None) -> Iterator[None]:
    """Keep other runs out of a folder, `args.output_dir` by default; all processes call it.

    Raises:
        TokenRatioError: on every process, if another run holds it.
    """
    path = str(args.output_dir if folder is None else folder)
    with ExitStack() as stack:
        on_first_process(args, lambda: stack.enter_context(held(path)))
        yield


def checkpoint_to_resume(
    resume: str | Path | bool | None, folder: str | Path, *, digests: bool = True
) -> Path | None:
    """The complete checkpoint that is meant; None to start from the beginning.

    For True it is the newest of the folder; None, and said, if the folder holds no more than a run
    leaves that was killed before its first checkpoint.

    Args:
        digests: of the newest, check all bytes; else only whether it is complete.
    Raises:
        TokenRatioError: a checkpoint that cannot be resumed, or for True only such ones, or a
            trained model without one.
    """
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
    _log.warning("no complete checkpoint in %s: starting from the beginning", folder)
    return None


def _was_complete(checkpoint: Path) -> bool:
    """Whether a run had finished writing it, whatever happened to it since."""
    return (checkpoint / MANIFEST_FILE).exists() or bool(
        read_document(checkpoint / TRAINER_STATE_NAME)
    )
