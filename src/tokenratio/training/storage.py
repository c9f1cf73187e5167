"""What is wrong with the folder that a run writes to, when writing fails."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenratio.errors import DISK_FULL, StorageError, TokenRatioError, is_disk_full
from tokenratio.training.checkpoints import what_is_kept

# torch's and safetensors' writers raise no OSError, and torch's does not say why it failed.
_OF_WRITERS = re.compile(
    r"PytorchStreamWriter|inline_container|os error \d+|Parent directory .* does not exist"
)


@contextmanager
def storage_faults(folder: str | Path) -> Iterator[None]:
    """Explain an error of writing to a run's folder, if the folder is the reason.

    Raises:
        StorageError: what is wrong with the folder, which checkpoint is kept, how to go on.
    """
    try:
        yield
    except (TokenRatioError, StorageError):
        raise
    except Exception as error:
        fault = _fault(Path(folder), error)
        if fault is None:
            raise
        raise StorageError(fault) from error


def _fault(folder: Path, error: Exception) -> str | None:
    if not (isinstance(error, OSError) or is_disk_full(error) or _OF_WRITERS.search(str(error))):
        return None
    if not folder.is_dir():
        return (
            f"the run's folder {folder} was deleted or moved while it ran: put it back and resume "
            "with --resume_from_checkpoint true, or start again"
        )
    found = None if is_disk_full(error) else _refusal(folder)
    if is_disk_full(error) or (found is not None and is_disk_full(found)):
        return f"{DISK_FULL}. {what_is_kept(folder)}"
    if found is not None:
        return f"{folder} cannot be written to: {found.strerror or found}. {what_is_kept(folder)}"
    return None


def _refusal(folder: Path) -> OSError | None:
    """Why a small file cannot be written into the folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return error
    return None
