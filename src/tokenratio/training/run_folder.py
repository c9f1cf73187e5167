"""What a run leaves behind: `run.json`, `metrics.jsonl` and checkpoints that can be resumed."""

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.training.method_settings import METHOD_SETTINGS

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
# Written last by transformers, so a checkpoint that has it whole is complete.
_LAST_FILE = "trainer_state.json"
_SECRET = re.compile(r"(^|_)(token|secret|password|key|api_key)$", re.IGNORECASE)
_MASK = "<masked>"
# A resumed run goes on with the same objective.
_FIXED_SETTINGS = (
    *METHOD_SETTINGS,
    "train_sampling_strategy",
    *("baseline_hidden_size", "center_baseline", "baseline_clamp"),
)
_PACKAGES = ("tokenratio", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def write_run_file(folder: str | Path, **contents: Any) -> None:
    """Write `run.json`: versions and `contents`, secrets masked."""
    document = mask_secrets({"versions": versions(), **contents})
    replace_text(Path(folder) / RUN_FILE, json.dumps(document, indent=2, default=str) + "\n")


def mask_secrets(value: Any) -> Any:
    """The same document with the text of every key that names a secret replaced."""
    if isinstance(value, Mapping):
        return {k: _MASK if _is_secret(k, v) else mask_secrets(v) for k, v in value.items()}
    return value


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(_SECRET.search(str(key)))


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint; one that was cut off while being written is passed over."""
    checkpoints = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and _is_complete(path):
            checkpoints.append((int(number), path))
    return max(checkpoints)[1] if checkpoints else None


def resolve_checkpoint(resume: str | Path | bool | None, folder: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or True for the folder's newest.

    Raises:
        TokenRatioError: there is none, or it is not complete.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        found = last_checkpoint(folder)
        if found is None:
            raise TokenRatioError(f"{folder} holds no complete checkpoint to resume from")
        return found
    path = Path(resume)
    if not path.is_dir():
        raise TokenRatioError(f"no checkpoint folder {path}")
    if not _is_complete(path):
        raise TokenRatioError(
            f"{path} is not a complete checkpoint: {_LAST_FILE} is missing or cut off"
        )
    if not any(path.glob("optimizer*")):
        raise TokenRatioError(
            f"{path} was saved without its optimizer: it cannot be resumed exactly"
        )
    return path


def check_same_run(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume with another reference or other training data than the run began with.

    A policy built from the checkpoint itself would otherwise silently become its own reference.

    Args:
        identity: what `run.json` would say now.
    Raises:
        TokenRatioError: what differs.
    """
    try:
        began = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a checkpoint moved out of its run folder: nothing to compare with
    reference, old_reference = identity["reference"] or {}, began.get("reference") or {}
    if reference.get("sha256") != old_reference.get("sha256"):
        raise TokenRatioError(
            f"the reference is not the one that the run in {folder} began with "
            f"({old_reference.get('description')}): start from the same model as then, not from a "
            "checkpoint"
        )
    for name in _FIXED_SETTINGS:
        was, now = began["config"].get(name), identity["config"].get(name)
        if was != now:
            raise TokenRatioError(f"the run in {folder} began with {name} {was}, not {now}")
    digest, old_digest = (run["data"]["train"]["digest"] for run in (identity, began))
    if digest != old_digest:
        raise TokenRatioError(
            f"the training data, tokenizer or lengths are not those the run in {folder} began with"
        )


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
