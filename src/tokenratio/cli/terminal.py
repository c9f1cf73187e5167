"""Terminal behaviour shared by the commands: progress bars, quiet libraries, one-line errors."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer
from transformers.utils import logging

from tokenratio.cli.failures import shortage
from tokenratio.errors import StorageError, TokenRatioError
from tokenratio.models.processes import current


def is_terminal() -> bool:
    """Whether standard error is a terminal on which this process draws progress bars."""
    return sys.stderr.isatty() and not current().index


def quiet_libraries() -> None:
    """Silence libraries except for errors, and keep progress bars out of log files."""
    import datasets

    logging.set_verbosity_error()
    # peft reads a name that transformers has deprecated.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if not is_terminal():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


@contextmanager
def user_mistakes(doing: str) -> Iterator[None]:
    """Turn a library's error into a `TokenRatioError`, except when memory or disk space runs out.

    For set-up only, where an error nearly always means an invalid setting.
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
    """Add the newest checkpoint to the error of a run that fails, as a note.

    Where the run's folder is at fault, the error says so. Optimizers, schedules and
    samplers are built when training begins, so an error before the first step means an invalid
    setting and becomes a `TokenRatioError`.
    """
    from tokenratio.training.checkpoints import what_is_kept
    from tokenratio.training.storage import storage_faults

    folder = trainer.args.output_dir
    try:
        with storage_faults(folder):
            yield
    except (TokenRatioError, StorageError):
        raise
    except BaseException as error:
        error.add_note(what_is_kept(folder))
        if isinstance(error, Exception) and trainer.state.global_step == 0:
            with user_mistakes("the run cannot be started"):
                raise
        raise
