"""Files of generations and judgements as outputs: which are resumed, and which are refused."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.journal import Journal
from tokenratio.evaluation.response_files import (
    differences,
    read_settings,
    settings_digest,
    settings_path,
)

_BEGIN = b'{"id":"'  # of every line of ours, white space aside


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Make sure that writing to `path` harms nothing.

    Args:
        inputs: files that are read; what says their settings is theirs too.
    Raises:
        TokenRatioError: it is a folder, one of the inputs, or a file of another kind.
    """
    if path.is_dir():
        raise TokenRatioError(f"--output {path} is a folder")
    for given in inputs:
        taken = {given.resolve(), settings_path(given).resolve()}
        if taken & {path.resolve(), settings_path(path).resolve()}:
            raise TokenRatioError(
                f"--output {path} would replace {given}, or what says its settings: choose "
                "another name"
            )
    try:
        with path.open("rb") as file:
            head = b"".join(file.read(64).split())
    except FileNotFoundError:
        return
    except OSError as error:
        raise TokenRatioError(f"cannot read {path}: {error.strerror}") from None
    # A run that was killed may have left any beginning of its first line.
    if head[: len(_BEGIN)] != _BEGIN[: len(head)]:
        raise TokenRatioError(
            f"--output {path} already exists and was not written by tokenratio: choose another"
        )


def claim_output(path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Empty an output that is to be replaced; else refuse one that was made with other settings.

    Args:
        settings: those that its lines would have.
    Raises:
        TokenRatioError: the settings differ, or another process writes the file.
    """
    if not path.exists():
        return
    if overwrite:
        with Journal(path) as journal:
            journal.finish(())
        return
    try:
        with path.open("rb") as file:
            digest = json.loads(file.readline()).get("settings")
    except (OSError, ValueError, AttributeError):
        return  # empty, or damaged: whoever goes on with it says how
    if digest == settings_digest(settings):
        return
    old = read_settings(path).get(digest)
    said = "" if old is None else f" ({differences(old, json.loads(json.dumps(settings)))})"
    raise TokenRatioError(
        f"{path} was made with other settings{said}: use those, replace the file with "
        "--overwrite, or choose another --output"
    )
