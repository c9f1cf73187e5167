"""What a checkpoint is: a folder that is complete or not there, and that is checked before use."""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict, cast

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenratio.errors import TokenRatioError, first_line
from tokenratio.records import as_shape
from tokenratio.run_folder import UNFINISHED_FOLDER, UNFINISHED_FOLDERS, read_document, replace_text

# Size and SHA-256 digest of every other file of a checkpoint; written last.
MANIFEST_FILE = "manifest.json"
# What a run needs to be resumed exactly: any of these patterns, and what it is called.
# `global_step*` is DeepSpeed's folder, which holds weights, optimizer and schedule.
# Not those of output_folder.py: an adapter that is not the default lies in a folder of its name.
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "*/adapter_model.safetensors")
_NEEDED = (
    ((*_WEIGHTS, "pytorch_model*", "global_step*"), "its weights"),
    (("optimizer*", "global_step*"), "its optimizer (save_only_model leaves it out)"),
    (("scheduler.pt", "global_step*"), "its learning-rate schedule"),
    (("rng_state*",), "the state of its random numbers"),
)
_log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints_of(folder: str | Path) -> list[Path]:
    """All checkpoints of a run's folder, the oldest first, damaged ones included."""
    start = checkpoint_name(0)[:-1]
    found = [
        path
        for path in Path(folder).glob(f"{start}*")
        if path.name.removeprefix(start).isdecimal() and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(start)))


def last_checkpoint(
    folder: str | Path, *, quiet: bool = False, digests: bool = True
) -> Path | None:
    """The newest checkpoint that can be resumed; skipped ones are logged, unless `quiet`.

    Args:
        digests: compare digests, which reads the whole checkpoint; else sizes only.
    """
    for path in reversed(checkpoints_of(folder)):
        found = defect(path, digests=digests)
        if found is None:
            return path
        if not quiet:
            _log.warning("%s is skipped: %s", path, found)
    return None


def resolve_checkpoint(resume: str | Path | bool | None, folder: str | Path) -> Path | None:
    """The complete checkpoint that is meant: a path, or for True the newest of the folder."""
    if resume is None or resume is False:
        return None
    if resume is True:
        found = last_checkpoint(folder)
        if found is None:
            held = checkpoints_of(folder)
            why = f": {held[-1].name}: {defect(held[-1])}" if held else ""
            raise TokenRatioError(f"{folder} holds no complete checkpoint to resume from{why}")
        return found
    path = Path(resume)
    if not path.is_dir():
        raise TokenRatioError(f"checkpoint folder {path} does not exist")
    fault = defect(path)
    if fault is not None:
        raise TokenRatioError(f"{path} is not a complete checkpoint: {fault}")
    return path


def what_is_kept(folder: str | Path) -> str:
    """A sentence for a run that failed: its newest checkpoint, and how to go on."""
    newest = last_checkpoint(folder, quiet=True, digests=False)
    if newest is None:
        held = checkpoints_of(folder)
        if held:
            return f"{held[-1]} cannot be resumed: {defect(held[-1], digests=False)}"
        return "No checkpoint has been written yet"
    return f"The newest checkpoint is {newest}: --resume_from_checkpoint true resumes it"


class _State(TypedDict, total=False):
    """Those fields of transformers' state that a resumed run computes with."""

    global_step: int
    max_steps: int
    epoch: float | None
    log_history: list[dict[str, Any]]


def defect(checkpoint: Path, *, digests: bool = True) -> str | None:
    """Why a checkpoint cannot be resumed exactly, with the file's name; None if it can.

    One with a manifest is compared with it. One without, of an earlier version or of transformers,
    is complete if the files that a resumed run needs can be opened.

    Args:
        digests: read every file whole; otherwise only sizes and headers are compared.
    """
    state = read_document(checkpoint / TRAINER_STATE_NAME)
    if state is None:
        return f"{TRAINER_STATE_NAME} is missing or cut off"
    try:
        TrainerState(**cast(dict[str, Any], as_shape(_State, state, TRAINER_STATE_NAME)))
    except Exception as error:  # ours, or whatever transformers raises for the wrong fields
        return f"{TRAINER_STATE_NAME} is damaged: {first_line(error)}"
    for patterns, what in _NEEDED:
        if not any(True for pattern in patterns for _ in checkpoint.glob(pattern)):
            return f"it was saved without {what}, so it cannot be resumed exactly"
    if not (checkpoint / MANIFEST_FILE).exists():
        faults = (_unreadable(checkpoint, path, digests) for path in _files(checkpoint))
    else:
        recorded = (read_document(checkpoint / MANIFEST_FILE) or {}).get("files")
        if not isinstance(recorded, dict) or not recorded:
            return f"{MANIFEST_FILE} is damaged"
        faults = (_differs(checkpoint, *entry, digests) for entry in recorded.items())
    return next(filter(None, faults), None)


def _differs(checkpoint: Path, name: str, recorded: Any, digests: bool) -> str | None:
    """How a file differs from what the manifest records of it."""
    path, recorded = checkpoint / name, recorded if isinstance(recorded, dict) else {}
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != recorded.get("bytes"):
        return f"{name} has {size:,} bytes, not the {recorded.get('bytes')} that were written"
    if digests and _digest(path) != recorded.get("sha256"):
        return f"{name} is damaged: its SHA-256 digest is not the one in {MANIFEST_FILE}"
    return None


def _unreadable(checkpoint: Path, path: Path, whole: bool) -> str | None:
    """Why a file cannot be loaded, judged by its own header and checksums, without pickle."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares the header with the file's size
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin"):  # torch writes zip archives
            with zipfile.ZipFile(path) as archive:
                if whole and archive.testzip() is not None:
                    raise ValueError("a checksum differs")
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        name = path.relative_to(checkpoint).as_posix()
        return f"{name} is empty" if not path.stat().st_size else f"{name} is damaged: {error}"
    return None


def seal(checkpoint: Path) -> None:
    """Put every file of a new checkpoint on the disk, then write its manifest."""
    files = _files(checkpoint)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(_synced_digest, files)
        entries = {
            path.relative_to(checkpoint).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": digest,
            }
            for path, digest in zip(files, digests, strict=True)
        }
    for folder in {path.parent for path in files}:
        _sync_folder(folder)
    replace_text(checkpoint / MANIFEST_FILE, json.dumps({"files": entries}, indent=1) + "\n")
    _sync_folder(checkpoint)


def publish(written: Path, checkpoint: Path) -> None:
    """Give a sealed checkpoint its name; one of that name, which it replaces, is removed."""
    replaced = written.with_name(f"replaced-{checkpoint.name}")
    if checkpoint.exists():
        os.rename(checkpoint, replaced)
    try:
        os.rename(written, checkpoint)
    except OSError:
        if replaced.exists():  # what is left here is removed
            os.rename(replaced, checkpoint)
        raise
    _sync_folder(checkpoint.parent)
    shutil.rmtree(written.parent)


def remove_surplus(folder: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove checkpoints until `limit` are left: incomplete ones first, then the oldest.

    Args:
        limit: `save_total_limit`; None or 0 for any number.
        keep: checkpoints that are never removed: the one just written, and the best.
    """
    if not limit or limit < 0:
        return
    held, kept = checkpoints_of(folder), {path.resolve() for path in keep}
    others = [path for path in held if path.resolve() not in kept]
    others.sort(key=lambda path: defect(path, digests=False) is None)  # stable: by age otherwise
    for path in others[: max(0, len(held) - max(limit, len(kept)))]:
        # Renamed first, so that one half removed is never taken for a checkpoint.
        removed = folder / UNFINISHED_FOLDER / path.name
        removed.parent.mkdir(exist_ok=True)
        os.rename(path, removed)
        shutil.rmtree(removed.parent)


def restore_sealed(folder: Path) -> None:
    """Name the sealed checkpoints of a run that was killed before it named them."""
    for path in checkpoints_of(folder / UNFINISHED_FOLDER):
        checkpoint = folder / path.name
        if (path / MANIFEST_FILE).exists() and not checkpoint.exists() and defect(path) is None:
            os.rename(path, checkpoint)
            _sync_folder(folder)
            _log.warning("%s was complete, and has its name now", checkpoint)


def remove_unfinished(folder: Path) -> None:
    """Remove what a run left behind that was stopped while it wrote or removed a checkpoint."""
    for unfinished in (folder / name for name in UNFINISHED_FOLDERS):
        if not unfinished.exists():
            continue
        held = ", ".join(sorted(path.name for path in unfinished.iterdir())) or "nothing"
        _log.warning(
            "%s holds %s, which was being written or removed when a run stopped: it is removed",
            unfinished,
            held,
        )
        shutil.rmtree(unfinished)


def _files(checkpoint: Path) -> list[Path]:
    paths: Iterator[Path] = checkpoint.rglob("*")
    return sorted(path for path in paths if path.is_file() and path.name != MANIFEST_FILE)


def _synced_digest(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
