"""The contrast of every token, log p₊(y_t) − log p₋(y_t), computed once before training.

TIS-DPO, SePO and T-REG use it: how much likelier a token is to one of two models, or after one of
two prompts. Rows are found by their tokens, so that scores of other data, another tokenizer or
another length limit are never used by mistake.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from datasets import Dataset
from peft import PeftModel
from safetensors.numpy import load_file, save
from transformers import PreTrainedModel

from tokenratio.data import PreparedData
from tokenratio.data.entries import file_digest
from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.models.loading import check_fits
from tokenratio.models.reference import model_digest
from tokenratio.models.token_requests import (
    answer_token_requests,
    disable_dropout,
    language_model,
    own_head,
)
from tokenratio.records import read_record
from tokenratio.run_folder import replace_text, versions
from tokenratio.training.cache_entry import SIDES, with_token_values
from tokenratio.training.reference_cache import CacheSettings, reference_cache

_VALUES, _NOTE = "scores.safetensors", "scores.json"
_FORMAT = 1
_NAMED = 8  # rows named in a message


class _Note(TypedDict):
    format: Literal[1]
    sha256: str
    ingredients: dict[str, Any]
    template: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class TokenContrast:
    """Contrasts by row.

    Attributes:
        ingredients: the models and prompts they were made from.
        values: of each row, by the digest of its tokens, `(chosen, rejected)` in nats, float32.
        template: the settings the rows were rendered with (`TemplateSettings.record`).
    """

    ingredients: Mapping[str, Any]
    values: Mapping[bytes, tuple[np.ndarray, np.ndarray]]
    template: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> "TokenContrast":
        """Read what `save` wrote; raise `TokenRatioError` if it is missing or damaged."""
        folder = Path(folder).expanduser()
        remedy = "compute them with `tokenratio score-tokens`"
        if not (folder / _NOTE).is_file() or not (folder / _VALUES).is_file():
            raise TokenRatioError(f"no token scores in {folder}: {remedy}")
        damaged = f"the token scores in {folder} are damaged"
        note = read_record(_Note, folder / _NOTE, f"{damaged}: {remedy}")
        with reported_as(damaged):
            if note["sha256"] != file_digest(folder / _VALUES):
                raise TokenRatioError(
                    f"{damaged} ({_VALUES} has changed since it was written): {remedy}"
                )
            arrays = load_file(folder / _VALUES)
            keys = [bytes(key) for key in arrays["keys"]]
            sides = [
                np.split(arrays[side], arrays[f"{side}_offsets"][1:-1]) if keys else []
                for side in SIDES
            ]
            values = dict(zip(keys, zip(*sides, strict=True), strict=True))
        return cls(note["ingredients"], values, note.get("template", {}))

    def save(self, folder: str | Path) -> None:
        """Write the folder; after an interrupted write it cannot be read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer(b"".join(self.values), np.uint8).reshape(len(self.values), -1)
        arrays = {"keys": keys}
        for index, side in enumerate(SIDES):
            rows = [pair[index] for pair in self.values.values()]
            arrays[f"{side}_offsets"] = np.cumsum([0, *map(len, rows)], dtype=np.int64)
            arrays[side] = np.concatenate([np.empty(0, np.float32), *rows])
        raw = save(arrays)
        (folder / _NOTE).unlink(missing_ok=True)
        (folder / _VALUES).write_bytes(raw)
        note = {
            "format": _FORMAT,
            "sha256": hashlib.sha256(raw).hexdigest(),
            "rows": len(self.values),
            "ingredients": self.ingredients,
            "template": dict(self.template),
            "versions": versions(),
        }
        replace_text(folder / _NOTE, json.dumps(note, indent=2) + "\n")

    def joined(self, other: "TokenContrast") -> "TokenContrast":
        """Both sets of rows, which must be made from the same models and prompts."""
        self.require_same(other.ingredients)
        return replace(self, values={**self.values, **other.values})

    def require_same(self, ingredients: Mapping[str, Any]) -> None:
        """Raise `TokenRatioError` if the models or prompts differ."""
        names = {*self.ingredients, *ingredients}
        differ = [n for n in sorted(names) if self.ingredients.get(n) != ingredients.get(n)]
        if differ:
            raise TokenRatioError(
                f"these scores and those already there differ in {', '.join(differ)}: choose "
                "another folder"
            )

    def attach(self, data: PreparedData) -> PreparedData:
        """The rows with columns `chosen_contrast` and `rejected_contrast`, which the digest covers.

        Rows without scores are refused by name.
        """
        dataset = without_contrast(data.dataset)
        keys = row_keys(dataset)
        missing = [row for row, key in enumerate(keys) if key not in self.values]
        if missing:
            names = ", ".join(dataset[row]["origin"] for row in missing[:_NAMED])
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            if dict(self.template) != dict(data.template):
                raise TokenRatioError(
                    f"{len(missing)} of {len(keys)} rows have no token scores: the scored rows "
                    f"were rendered with {_shown(self.template)}, those of this run with "
                    f"{_shown(data.template)}; run `tokenratio score-tokens` with the settings of "
                    "this run, or set them in the run"
                )
            raise TokenRatioError(
                f"{len(missing)} of {len(keys)} rows have no token scores ({names}{more}): run "
                "`tokenratio score-tokens` on this data with the tokenizer, max_length and "
                "max_prompt_length of this run"
            )
        pairs, digest = [self.values[key] for key in keys], hashlib.sha256(data.digest.encode())
        for values in zip(*pairs, strict=True):
            digest.update(np.concatenate(values).astype("<f4").tobytes())
        dataset = with_token_values(dataset, "contrast", pairs)
        return replace(data, dataset=dataset, digest=digest.hexdigest())


def with_contrast(data: PreparedData, folder: str | Path | None, loss: str) -> PreparedData:
    """The rows with the contrast of their tokens.

    Args:
        folder: of the token scores; not needed for rows that already have a contrast.
        loss: for messages.
    """
    if folder is not None:
        return TokenContrast.open(folder).attach(data)
    if has_contrast(data.dataset):
        return data
    raise TokenRatioError(
        f"{loss} needs the contrast of every token: compute it with `tokenratio score-tokens` and "
        "name the folder in token_scores (or give a recipe a section score_tokens)"
    )


def has_contrast(dataset: Dataset) -> bool:
    """Whether the rows have the contrast of their tokens."""
    return "chosen_contrast" in dataset.column_names


def without_contrast(dataset: Dataset) -> Dataset:
    """The rows without it."""
    names = [name for name in dataset.column_names if name.endswith("_contrast")]
    return dataset.remove_columns(names)


def row_keys(dataset: Dataset) -> list[bytes]:
    """SHA-256 of each row's tokens: prompt, chosen, rejected."""
    names = ("prompt_ids", *(f"{side}_ids" for side in SIDES))
    columns = [dataset.with_format("numpy")[name] for name in names]
    return [_row_key(parts) for parts in zip(*columns, strict=True)]


def _row_key(parts: Sequence[np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for ids in parts:
        # With the lengths, so that the boundaries count.
        digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
    return digest.digest()


def _shown(template: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in template.items())
    return settings or "no settings of the chat template"


def summary(scores: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    """The mean contrast of chosen and of rejected tokens, in words."""
    chosen, rejected = (np.concatenate(side) for side in zip(*scores, strict=True))
    return (
        f"contrast per token: chosen {chosen.mean():+.3f}, rejected {rejected.mean():+.3f} nats "
        f"({len(chosen):,} and {len(rejected):,} tokens)"
    )


@dataclass(frozen=True)
class ContrastSide:
    """One of the two sides that are contrasted.

    Attributes:
        model: a causal language model; under PEFT it runs with its adapters off.
        data: the scored responses after this side's prompts.
        prompt: the template of the prompts.
    """

    model: PreTrainedModel | PeftModel
    data: PreparedData
    prompt: str

    def identity(self) -> dict[str, str]:
        """What is recorded of it with the scores."""
        return {"sha256": model_digest(self.model), "prompt": self.prompt}


def contrast_ingredients(positive: ContrastSide, negative: ContrastSide) -> dict[str, Any]:
    """What is recorded of both sides; raises `TokenRatioError` if they are the same."""
    ingredients = {"positive": positive.identity(), "negative": negative.identity()}
    if ingredients["positive"] == ingredients["negative"]:
        raise TokenRatioError("p+ and p- are the same model with the same prompt")
    return ingredients


def compute_contrast(
    data: PreparedData,
    positive: ContrastSide,
    negative: ContrastSide,
    settings: CacheSettings,
) -> TokenContrast:
    """log p₊ − log p₋ of every response token of `data`, in nats; every process must call it.

    Raises:
        TokenRatioError: a model cannot read the rows, has another vocabulary, or gives a
            log-probability that is not finite; or see `reference_cache`.
    """
    sides, ingredients = (positive, negative), contrast_ingredients(positive, negative)
    sizes = [own_head(side.model).weight.shape[0] for side in sides]
    if sizes[0] != sizes[1]:
        raise TokenRatioError(
            f"the two models have {sizes[0]} and {sizes[1]} tokens in their vocabularies: "
            "use two with the same tokenizer"
        )
    caches = []
    for side in sides:
        check_fits(side.model, side.data)
        answer_token_requests(language_model(side.model))
        disable_dropout(side.model)
        caches.append(reference_cache(side.model, side.data, "log_probs", settings))
    values = {}
    for row, key in enumerate(row_keys(data.dataset)):
        pairs = zip(*(cache.read("log_probs", row) for cache in caches), strict=True)
        chosen, rejected = ((p.double() - n.double()).float().numpy() for p, n in pairs)
        values[key] = (chosen, rejected)
    return TokenContrast(ingredients, values, data.template)
