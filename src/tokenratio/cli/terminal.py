"""Terminal behaviour shared by the commands: progress bars, quiet libraries, one-line errors."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer
from transformers.utils import logging

from tokenratio.cli.failures import shortage
from tokenratio.errors import TokenRatioError


def is_terminal() -> bool:
    """Whether standard error is a terminal, so that progress bars are drawn."""
    return sys.stderr.isatty()


def quiet_libraries() -> None:
    """Silence libraries except for errors, and keep progress bars out of log files."""
    import datasets

    logging.set_verbosity_error()
    if not is_terminal():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextmanager
def user_mistakes(doing: str) -> Iterator[None]:
    """Turn an error that a library raises about a user's settings into one line.

    For set-up only, where an error is nearly always an invalid setting; running out of memory or
    disk space is passed on. TOKENRATIO_DEBUG=1 still shows the traceback.

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
        # The text of a KeyError is only the key.
        text = " ".join(lines[:3] if " " in str(error) else [type(error).__name__, *lines])
        raise TokenRatioError(f"{doing}: {text}") from error


@contextmanager
def training(trainer: Trainer) -> Iterator[None]:
    """Note in the error of a run that ends early which checkpoint was saved last.

    Optimizers, schedules and samplers are built when training begins, so an error before the first
    step is an invalid setting.

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
