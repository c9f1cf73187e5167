"""What a run writes besides its weights: `run.json` and `metrics.jsonl`."""

import json
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from tokenratio.masking import mask_secrets
from tokenratio.records import as_shape, parse_json

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.json"
STAGE_FILE = "stage.json"
CARD_FILE = "README.md"
CARD_MARK = (
    "<!-- Written by tokenratio from run.json; remove this line to keep your own changes. -->"
)
# The base of a run's adapter, if it exists nowhere else, and a record of its origin.
BASE_FOLDER = "base"
ORIGIN_FILE = "origin.json"
# Where a checkpoint is written before it is complete, and moved to before it is removed. Uploads to
# the hub leave out `_*`.
UNFINISHED_FOLDER = "_unfinished-checkpoint"
# Also of earlier versions.
UNFINISHED_FOLDERS = (UNFINISHED_FOLDER, "unfinished-checkpoint")
_PACKAGES = ("tokenratio", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


# Parsing a package's metadata takes milliseconds.
package_version = cache(version)


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    python = {"python": platform.python_version()}
    return python | {name: package_version(name) for name in _PACKAGES}


def write_run_file(folder: str | Path, **contents: Any) -> None:
    """Write `run.json`: versions and `contents`, secrets masked."""
    document = mask_secrets({"versions": versions(), **contents})
    replace_text(Path(folder) / RUN_FILE, json.dumps(document, indent=2, default=str) + "\n")


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a power cut leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunConfig(TypedDict, total=False):
    """Those settings in `run.json` that are read back."""

    loss: str
    output_dir: str
    chat_template_kwargs: dict[str, Any] | str | None
    tools: list[Any] | str | None
    template_date: str | None
    token_scores: str | None
    max_steps: int
    num_train_epochs: float


class _Source(TypedDict):
    name: str
    split: NotRequired[str | None]


class _Data(TypedDict):
    digest: str
    sources: NotRequired[list[_Source]]


class RunRecord(TypedDict, total=False):
    """`run.json`, as far as it is read back; runs of older versions lack some of it."""

    config: RunConfig
    versions: dict[str, str]
    kind: str
    model: Any
    processes: int
    reference: dict[str, Any] | None
    adapters: dict[str, dict[str, Any]] | None
    data: dict[str, _Data | None]
    run_folder: str


class _Length(TypedDict):
    max_steps: int
    num_train_epochs: float
    model_init_kwargs: NotRequired[dict[str, Any] | str | None]


class _TrainData(TypedDict):
    train: _Data


class _Resumption(TypedDict, total=False):
    config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    processes: int


class ResumableRecord(TypedDict):
    """What `run.json` must hold of a run that is resumed."""

    config: _Length
    data: _TrainData
    resumptions: NotRequired[list[_Resumption]]


def run_document(folder: str | Path) -> dict[str, Any] | None:
    """`run.json` of a folder, unchecked; None if it is missing, cut off, or another tool's."""
    document = read_document(Path(folder) / RUN_FILE)
    found = None if document is None else document.get("versions")
    return document if isinstance(found, dict) and "tokenratio" in found else None


def read_run_file(*folders: str | Path) -> dict[str, Any] | None:
    """`run.json` of the first of the folders that holds a readable one; None if none does.

    Raises:
        TokenRatioError: it holds a run's settings, but a field is not what a run writes.
    """
    for folder in folders:
        document = run_document(folder)
        if document is not None and isinstance(document.get("config"), dict):
            path = str(Path(folder) / RUN_FILE)
            return cast(dict[str, Any], as_shape(RunRecord, document, path))
    return None


def read_document(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds an object; None if it is missing or cut off."""
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
