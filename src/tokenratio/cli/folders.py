"""Checks a run's output folder and removes the old run in it."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import (
    BASE_FOLDER,
    EVAL_FILE,
    METRICS_FILE,
    ORIGIN_FILE,
    RUN_FILE,
    UNFINISHED_FOLDER,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Everything that tokenratio and transformers write; nothing else is removed.
_FILES = (
    *(METRICS_FILE, RUN_FILE, EVAL_FILE, "stage.json", "training_args.bin", "chat_template.jinja"),
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer*.json"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"),
    *("state_baseline*.safetensors", "special_tokens_map.json", "metric_sums.json"),
)


def claim_output(
    args: "TrainingArguments", *, overwrite: bool, inputs: Sequence[str | None]
) -> None:
    """Call `claim_folder` on the process that saves, before the others continue."""
    with args.main_process_first():
        if args.should_save:
            claim_folder(Path(args.output_dir), overwrite=overwrite, inputs=inputs)


def claim_folder(folder: Path, *, overwrite: bool, inputs: Sequence[str | None]) -> None:
    """Make sure that a run may write into `folder`.

    Args:
        overwrite: remove the old run that the folder holds.
        inputs: models the run starts from; their folders are never written into.
    Raises:
        TokenRatioError: the folder holds a run and `overwrite` is False, or a model that was not
            written by tokenratio.
    """
    if folder.exists() and not folder.is_dir():
        raise TokenRatioError(f"output_dir {folder} is a file")
    starts = {name: Path(name).resolve() for name in inputs if name is not None}
    if folder.resolve() in starts.values():
        raise TokenRatioError(f"output_dir {folder} is a model that the run starts from")
    found = sorted(_artefacts(folder))
    if not found:
        return
    if not (folder / RUN_FILE).is_file():
        raise TokenRatioError(
            f"{folder} holds {found[0].name}, which was not written by tokenratio: choose "
            "another --output_dir"
        )
    if not overwrite:
        raise TokenRatioError(
            f"{folder} already holds a run: resume it with --resume_from_checkpoint true, "
            "replace it with --overwrite, or choose another --output_dir"
        )
    removed = {path.resolve() for path in found}
    for name, start in starts.items():
        if removed & {start, *start.parents}:
            raise TokenRatioError(
                f"{name}, which the run starts from, is part of the run in {folder} that "
                "--overwrite would remove: choose another --output_dir"
            )
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _artefacts(folder: Path) -> Iterator[Path]:
    for pattern in _FILES:
        yield from (path for path in folder.glob(pattern) if path.is_file())
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and _CHECKPOINT.fullmatch(path.name):
            yield path
    if (folder / UNFINISHED_FOLDER).is_dir():
        yield folder / UNFINISHED_FOLDER
    if (folder / BASE_FOLDER / ORIGIN_FILE).is_file():
        yield folder / BASE_FOLDER
