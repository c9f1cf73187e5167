"""What the commands share at the terminal: progress there, silence elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer
from transformers.utils import logging

from tokenratio.cli.failures import shortage
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

    For set-up only, where an error is nearly always a setting that does not fit; a lack of memory
    or disk stays what it is. TOKENRATIO_DEBUG=1 shows the traceback all the same.

    Raises:
        TokenRatioError: for any exception inside.
    """
    try:
        yield
    except TokenRatioError:
        raise
    except Exception as error:
        if shortage(error) is not None:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # What a KeyError says is only the key.
        said = " ".join(lines[:3] if " " in str(error) else [type(error).__name__, *lines])
        raise TokenRatioError(f"{doing}: {said}") from error


@contextmanager
def training(trainer: Trainer) -> Iterator[None]:
    """Tell the user of a run that ends early what is kept of it.

    Optimizers, schedules and samplers are built when training begins, so an error before the first
    step is a setting that does not fit.

    Raises:
        TokenRatioError: for any exception before the first step.
    """
    from tokenratio.training.resume import last_checkpoint

    try:
        yield
    except TokenRatioError:
        raise
    except BaseException as error:
        newest = last_checkpoint(trainer.args.output_dir, quiet=True)
        error.add_note(
            "No checkpoint has been written yet"
            if newest is None
            else f"The newest checkpoint is {newest}: --resume_from_checkpoint true resumes it"
        )
        if isinstance(error, Exception) and trainer.state.global_step == 0:
            with user_mistakes("the run cannot be started"):
                raise
        raise
