"""Messages for unexpected errors."""

import os
import re

from tokenratio.errors import DISK_FULL, StorageError, is_disk_full

_MEMORY = re.compile(r"out of memory|not enough memory|cannot allocate memory", re.IGNORECASE)
_OUT_OF_MEMORY = (
    "out of memory: lower per_device_train_batch_size (and raise gradient_accumulation_steps by as "
    "much) or max_length, set activation_checkpointing to true, train a LoRA adapter (peft), or "
    "lower the batch size of evaluation"
)


def shortage(error: BaseException) -> str | None:
    """Advice if memory or disk space ran out; None for other errors."""
    if isinstance(error, MemoryError) or _MEMORY.search(str(error)):
        return _OUT_OF_MEMORY
    return DISK_FULL if is_disk_full(error) else None


def describe_failure(error: BaseException, command: str) -> str:
    """One line: what went wrong, what was saved (from the error's notes) and what to do."""
    if isinstance(error, StorageError):
        return str(error)
    kept = " ".join(getattr(error, "__notes__", []))
    found = shortage(error)
    if found is not None:
        return ". ".join(filter(None, (found, kept)))
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, OSError) and error.filename and error.strerror:
        # The system says which file and why: nothing to debug.
        return ". ".join(
            filter(None, (f"{command} stopped: {error.filename}: {error.strerror}", kept))
        )
    report = (
        "set TOKENRATIO_DEBUG=1 to see the traceback; if the message does not explain what to fix, "
        f"please report it with the traceback ({os.path.basename(_where(error))})"
    )
    return ". ".join(
        filter(None, (f"{command} stopped on an unexpected error: {text[:400]}", kept, report))
    )


def _where(error: BaseException) -> str:
    """The file and line that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "no file" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
