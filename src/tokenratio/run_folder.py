"""What a run writes besides its weights: `run.json` and `metrics.jsonl`."""

import json
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenratio.masking import mask_secrets

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
# Where a checkpoint is written before it is complete, and moved to before it is removed.
UNFINISHED_FOLDER = "unfinished-checkpoint"
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


def read_run_file(*folders: str | Path) -> dict[str, Any] | None:
    """`run.json` of the first of the folders that holds a readable one; None if none does."""
    for folder in folders:
        document = read_document(Path(folder) / RUN_FILE)
        if document is not None and isinstance(document.get("config"), dict):
            return document
    return None


def read_document(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds an object; None if it is missing or cut off."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
