"""Checks of output files before the work begins."""

from collections.abc import Iterable
from pathlib import Path

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.journal import check_is_journal, settings_path


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse to replace a folder, an input or its settings, or a file of another kind."""
    if path.is_dir():
        raise TokenRatioError(f"--output {path} is a folder")
    for given in inputs:
        taken = {given.resolve(), settings_path(given).resolve()}
        if taken & {path.resolve(), settings_path(path).resolve()}:
            raise TokenRatioError(
                f"--output {path} would replace {given} or its settings: choose another name"
            )
    check_is_journal(path)
