"""What the commands share at the terminal: progress there, silence elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from tokenratio.errors import TokenRatioError


def is_terminal() -> bool:
    """Whether somebody watches: progress bars are drawn on standard error."""
    return sys.stderr.isatty()


def quiet_libraries() -> None:
    """Let libraries speak only when something is wrong, and draw no bars into a log file."""
    import datasets

    logging.set_verbosity_error()
    if not is_terminal():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextmanager
def user_mistakes(doing: str) -> Iterator[None]:
    """Turn what a library says of a user's settings into one line.

    For set-up only, where an error is nearly always a setting that does not fit. TOKENRATIO_DEBUG=1
    shows the traceback all the same.

    Raises:
        TokenRatioError: for any exception inside.
    """
    try:
        yield
    except TokenRatioError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TokenRatioError(f"{doing}: {type(error).__name__}: {' '.join(lines[:3])}") from error
