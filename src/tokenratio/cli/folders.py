"""Checks a run's output folder, decides whether the run resumes there, and removes an old one."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import (
    BASE_FOLDER,
    CARD_FILE,
    CARD_MARK,
    EVAL_FILE,
    METRICS_FILE,
    ORIGIN_FILE,
    RUN_FILE,
    STAGE_FILE,
    UNFINISHED_FOLDERS,
    run_document,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Everything that tokenratio and transformers write; nothing else is removed.
_FILES = (
    *(METRICS_FILE, EVAL_FILE, "training_args.bin", "chat_template.jinja"),
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer*.json"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"),
    *("state_baseline*.safetensors", "special_tokens_map.json", "metric_sums.json"),
)
# What shows that a folder is ours. Removed last, so that one is still ours when that is cut off.
_MARKS = (STAGE_FILE, RUN_FILE)


@contextmanager
def claimed_output(
    args: "TrainingArguments",
    *,
    overwrite: bool,
    inputs: Sequence[str | None],
    resume: str | bool = False,
) -> Iterator[Path | None]:
    """The checkpoint that a run resumes, None if it starts; inside, other runs are kept out.

    Args:
        overwrite, inputs: see `claim_folder`.
        resume: a checkpoint, or True for the newest one of the folder, if there is any.
    Raises:
        TokenRatioError: on every process: the folder cannot be used, or another run is using it,
            or there is nothing to resume.
    """
    from tokenratio.training.output_folder import (
        checkpoint_to_resume,
        on_first_process,
        output_held,
    )

    folder = Path(args.output_dir)
    if overwrite and resume is True:
        raise TokenRatioError(
            "--resume_from_checkpoint true goes on with the run that --overwrite removes: give "
            "only one of them"
        )

    def claim() -> Path | None:
        # The trainer reads it whole.
        checkpoint = checkpoint_to_resume(resume, args, digests=False)
        if checkpoint is None or checkpoint.resolve().parent != folder.resolve():
            kept = [*inputs, None if checkpoint is None else str(checkpoint)]
            claim_folder(folder, overwrite=overwrite or resume is True, inputs=kept)
        return checkpoint

    on_first_process(args, lambda: check_folder(folder, inputs))
    with output_held(args):
        yield on_first_process(args, claim)


def check_folder(folder: Path, inputs: Sequence[str | None]) -> list[Path]:
    """Refuse a folder that no run may write into; returns what runs have written there.

    Args:
        inputs: models the run starts from; their folders are never written into.
    """
    if folder.exists() and not folder.is_dir():
        raise TokenRatioError(f"output_dir {folder} is a file")
    if folder.resolve() in [Path(name).resolve() for name in inputs if name is not None]:
        raise TokenRatioError(f"output_dir {folder} is a model that the run starts from")
    found = sorted(_artefacts(folder))
    if found and not _is_ours(folder):
        raise TokenRatioError(
            f"{folder} holds {found[0].name}, which was not written by tokenratio: choose "
            "another --output_dir"
        )
    return found


def claim_folder(folder: Path, *, overwrite: bool, inputs: Sequence[str | None]) -> None:
    """Make sure that a run may start in `folder`, which this process holds.

    Args:
        overwrite: remove the old run that the folder holds.
        inputs: see `check_folder`.
    Raises:
        TokenRatioError: the folder holds a run and `overwrite` is False, or a model that was not
            written by tokenratio.
    """
    found = check_folder(folder, inputs)
    if found and not overwrite:
        raise TokenRatioError(
            f"{folder} already holds a run: resume it with --resume_from_checkpoint true, "
            "replace it with --overwrite, or choose another --output_dir"
        )
    removed = {path.resolve() for path in found}
    for name in inputs:
        start = Path(name or "").resolve()
        if name is not None and removed & {start, *start.parents}:
            raise TokenRatioError(
                f"{name}, which the run starts from, is part of the run in {folder} that "
                "--overwrite would remove: choose another --output_dir"
            )
    for path in sorted(found, key=lambda path: path.name in _MARKS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_ours(folder: Path) -> bool:
    """Whether a run has written the folder; a removal that was cut off may have left only part."""
    if (folder / STAGE_FILE).is_file():
        return True
    if any(run_document(place) is not None for place in (folder, *folder.glob("checkpoint-*"))):
        return True
    card = folder / CARD_FILE
    return card.is_file() and CARD_MARK in card.read_text(encoding="utf-8", errors="replace")


def _artefacts(folder: Path) -> Iterator[Path]:
    for pattern in (*_FILES, *_MARKS):
        yield from (path for path in folder.glob(pattern) if path.is_file())
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and _CHECKPOINT.fullmatch(path.name):
            yield path
    for name in UNFINISHED_FOLDERS:
        if (folder / name).is_dir():
            yield folder / name
    if (folder / BASE_FOLDER / ORIGIN_FILE).is_file():
        yield folder / BASE_FOLDER
