"""Prepared rows cached on disk by the content of everything they depend on.

An entry is named by the SHA-256 of the sources' content, the tokenizer, all arguments, and the code
that prepares, so a stale one is never used. It is an Arrow file of rows and a JSON file of the
report, each checked against its SHA-256 when read.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import pyarrow as pa

from tokenratio.data.entries import begin_entry, file_digest, finish_entry
from tokenratio.data.parts import SourcePart
from tokenratio.errors import TokenRatioError, first_line
from tokenratio.records import as_shape, read_record
from tokenratio.run_folder import package_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A dataclass of rows, in `dataset`, and their account, in all its other fields.
Prepared = TypeVar("Prepared")

_ROWS, _ACCOUNT = "rows.arrow", "account.json"
_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets")
_log = logging.getLogger(__name__)


def kept_on_disk(
    root: str | os.PathLike[str] | None,
    ingredients: Callable[[], Mapping[str, Any]],
    kind: Callable[..., Prepared],
    prepare: Callable[[], Prepared],
) -> tuple[Prepared, Path | None]:
    """What `prepare` returns, from the cache if possible, and the entry it was read from.

    Args:
        root: the folder of all entries; None for no cache.
        ingredients: returns everything that the rows depend on, as JSON values.
        kind: the dataclass that `prepare` returns.
    """
    if root is None:
        return prepare(), None
    text = json.dumps(ingredients(), sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    folder = Path(root).expanduser() / key
    if folder.is_dir():
        try:
            return _read(folder, kind), folder
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            _log.warning("%s is damaged and will be prepared again: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    prepared = prepare()
    try:
        _write(folder, prepared, text)
    except OSError as error:
        _log.warning("cannot cache prepared data in %s: %s", folder.parent, error)
    return prepared, None


def ingredients_of(
    parts: Sequence[SourcePart], tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that prepared rows depend on: content, tokenizer, other arguments and code."""
    return {
        "parts": [
            [part.name, part.split, list(part.unread), part.weight, part.digest()] for part in parts
        ],
        "tokenizer": tokenizer_digest(tokenizer),
        "arguments": _to_json(arguments),
        "code": _code_digest(),
        "versions": {name: package_version(name) for name in _PACKAGES},
    }


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 (hex) over everything that decides a tokenizer's ids, and its chat template."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Set by the latest call; every call sets them again.
        backend |= {"padding": None, "truncation": None}
        digest.update(json.dumps(backend, sort_keys=True).encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(f"{path.relative_to(folder)} {file_digest(path)}".encode())
    init = {name: v for name, v in tokenizer.init_kwargs.items() if name != "name_or_path"}
    settings = [tokenizer.special_tokens_map, tokenizer.chat_template, init]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    """Digest of this package's source, because a version number does not change at each edit."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _write(folder: Path, prepared: Any, ingredients: str) -> None:
    work = begin_entry(folder)
    try:
        table = prepared.dataset.with_format(None).data.table
        with pa.ipc.new_file(str(work / _ROWS), table.schema) as writer:
            writer.write_table(table)
        account = {
            field.name: _to_json(getattr(prepared, field.name))
            for field in dataclasses.fields(prepared)
            if field.name != "dataset"
        }
        document = {
            "key": folder.name,
            "rows": file_digest(work / _ROWS),
            "account": _digest(account),
            "ingredients": json.loads(ingredients),
        }
        text = json.dumps({**document, "content": account})
        (work / _ACCOUNT).write_text(text, encoding="utf-8")
        finish_entry(work, folder, _find_flaw)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Document(TypedDict):
    key: str
    rows: str
    account: str
    content: dict[str, Any]


def _read(folder: Path, kind: Callable[..., Prepared]) -> Prepared:
    import datasets

    document = read_record(_Document, folder / _ACCOUNT)
    flaw = _find_flaw(folder, document)
    if flaw is not None:
        raise ValueError(flaw)
    # Mapped, so that the processes of a machine share the memory.
    table = pa.ipc.open_file(pa.memory_map(str(folder / _ROWS))).read_all()
    dataset = datasets.Dataset(table, fingerprint=folder.name[:16])
    hints = typing.get_type_hints(kind, None, {"Dataset": Any})
    account = {
        name: as_shape(hints[name], value, f"{folder / _ACCOUNT}: {name}")
        for name, value in document["content"].items()
    }
    return kind(dataset=dataset, **account)


def _find_flaw(folder: Path, document: _Document | None = None) -> str | None:
    """What is wrong with an entry; None if it is whole and as it was written."""
    try:
        if document is None:
            document = read_record(_Document, folder / _ACCOUNT)
        if document["key"] != folder.name:
            return "it is another entry's folder, renamed"
        if document["account"] != _digest(document["content"]):
            return f"{_ACCOUNT} has changed since it was written"
        if document["rows"] != file_digest(folder / _ROWS):
            return f"{_ROWS} has changed since it was written"
    except (OSError, TokenRatioError) as error:
        return first_line(error)
    return None


def _digest(account: Any) -> str:
    return hashlib.sha256(json.dumps(account, sort_keys=True).encode()).hexdigest()


def _to_json(value: Any) -> Any:
    """A value of dataclasses, mappings, sequences, dates and plain values as a JSON value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _to_json(item) for key, item in value.items()}
        return [[key, _to_json(item)] for key, item in value.items()]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_json(item) for item in value]
    return value
