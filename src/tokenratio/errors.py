"""The errors that the command line prints as one line, and what a full disk looks like."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tokenratio.masking import mask_text

DISK_FULL = "the disk is full: free space, or keep fewer checkpoints (save_total_limit)"
_FULL_TEXT = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)


class TokenRatioError(ValueError):
    """Data, settings or a model that cannot be used: says what is wrong, where, and what to do.

    Its message holds no secrets: they are masked.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(mask_text(str(message)))


class LostError(Exception):
    """Another process of the same command has ended, hangs or is cut off: says which.

    No `TokenRatioError`: nothing that goes on without one refused part goes on after it.
    """


class StorageError(OSError):
    """A run's folder that can no longer be written to: says why, what is kept and how to go on."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that a disk or a quota is full."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or bool(_FULL_TEXT.search(str(error)))


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def reported_as(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a library's error of these kinds, or of any, into a `TokenRatioError` of one line.

    Raises:
        TokenRatioError: the message and the first line of the error's.
    """
    caught = kinds or (Exception,)
    try:
        yield
    except TokenRatioError:
        raise
    except caught as error:
        raise TokenRatioError(f"{message}: {first_line(error)}") from None
