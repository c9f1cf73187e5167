"""Stages that need not be run again: found by a digest of all they depend on."""

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.recipe import Stage
from tokenratio.data import locate, source_digest
from tokenratio.data.prepared_cache import tokenizer_digest
from tokenratio.models.reference import model_digest
from tokenratio.run_folder import read_document, replace_text

_FILE = "stage.json"
# Settings that do not change the weights a stage ends with.
_NOT_IN_KEY = (
    *("output_dir", "run_name", "logging_dir", "disable_tqdm", "resume_from_checkpoint"),
    *("data_cache_dir", "dataset_num_proc"),
)


def stage_key(stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a stage depends on, by content: one with the same need not be run again."""
    document = {
        "model": model_digest(model),
        "config": model.config.to_dict(),
        "tokenizer": tokenizer_digest(tokenizer),
        "adapter": stage.peft,
        "settings": {k: v for k, v in stage.args.to_dict().items() if k not in _NOT_IN_KEY},
        "data": [
            (part.weight, source_digest(part.rows()))
            for part in locate(stage.train_dataset, split=stage.args.split("train"), prefer="sft")
        ],
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(folder: Path, key: str) -> bool:
    """Whether the folder holds a finished stage with that key."""
    return (read_document(folder / _FILE) or {}).get("key") == key


def mark_done(folder: Path, key: str) -> None:
    """Record that the folder's stage is finished."""
    replace_text(folder / _FILE, json.dumps({"key": key}) + "\n")
