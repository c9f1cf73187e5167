"""Which folder a run may write into, and what of an old run is removed for a new one."""

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
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Everything that training and saving write, tokenratio and transformers; only this is removed.
_FILES = (
    *(METRICS_FILE, RUN_FILE, EVAL_FILE, "stage.json", "training_args.bin", "chat_template.jinja"),
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer*.json"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"),
    *("state_baseline*.safetensors", "special_tokens_map.json", "metric_sums.json"),
)


def claim_output(
    args: "TrainingArguments", *, overwrite: bool, inputs: Sequence[str | None]
) -> None:
    """Claim the output folder of a run on the process that saves, before the others go on.

    Raises:
        TokenRatioError: see `claim_folder`.
    """
    with args.main_process_first():
        if args.should_save:
            claim_folder(Path(args.output_dir), overwrite=overwrite, inputs=inputs)


def claim_folder(folder: Path, *, overwrite: bool, inputs: Sequence[str | None]) -> None:
    """Make sure a run may write into `folder`, and remove an old run only if asked to.

    Args:
        overwrite: remove the run of tokenratio's that it holds.
        inputs: models the run starts from; their folders are never written into.
    Raises:
        TokenRatioError: it holds a run and `overwrite` is off, or a model that was not
            written by tokenratio.
    """
    if folder.exists() and not folder.is_dir():
        raise TokenRatioError(f"output_dir {folder} is a file")
    for name in inputs:
        if name is not None and Path(name).resolve() == folder.resolve():
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
    for name in inputs:
        if name is not None and {*Path(name).resolve().parents, Path(name).resolve()} & {
            path.resolve() for path in found
        }:
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
    if (folder / BASE_FOLDER / ORIGIN_FILE).is_file():
        yield folder / BASE_FOLDER
