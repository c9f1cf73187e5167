"""Where rows come from: a file or folder, the Hub, a `datasets.Dataset`, a list of dicts."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenratio.data.display import printable
from tokenratio.data.files import SUFFIXES, SourceRow, data_suffix, read_file, row_of
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Source: TypeAlias = "str | os.PathLike[str] | Dataset | DatasetDict | list[dict[str, Any]]"

_SPLITS = ("train", "test", "validation")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


def read_rows(source: Source, *, split: str | None = "train") -> list[SourceRow]:
    """Read every row of a source, in its order, without judging it.

    Args:
        source: one of
            - a local `.json` (array of objects), `.jsonl`, `.csv` or `.parquet` file;
            - a folder of those, read in the order of their names, subfolders included. If files are
              named `train*`, `test*` or `validation*`, only those of `split` are read, else all;
            - a Hub name `org/name` or `org/name:config`;
            - a `datasets.Dataset` or `DatasetDict`, or a list of dicts.
        split: which part; None means all of them.
    Returns:
        One `SourceRow` per row. One that could not be read has its `problem` set.
    Raises:
        TokenRatioError: the source is missing, unreadable as a whole, or a stream.
    """
    if isinstance(source, list | tuple):
        return list(_numbered(source, f"{split or 'train'}_dataset"))
    if isinstance(source, str | os.PathLike):
        return _read_named(os.fspath(source), split)
    return _read_dataset(source, split, None)


def source_digest(rows: Iterable[SourceRow]) -> str:
    """SHA-256 (hex) over what the rows hold, in order, as canonical JSON; origins left out."""
    digest = hashlib.sha256()
    for row in rows:
        canonical = json.dumps(
            [row.fields, row.problem], sort_keys=True, separators=(",", ":"), default=str
        )
        digest.update(canonical.encode("ascii"))
        digest.update(b"\n")
    return digest.hexdigest()


def _numbered(items: Iterable[object], name: str) -> Iterator[SourceRow]:
    for index, item in enumerate(items):
        yield row_of(f"{name}:{index}", item)


def _read_named(source: str, split: str | None) -> list[SourceRow]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files_of(path, split)
        return [row for file in files for row in read_file(file, file.relative_to(path).as_posix())]
    if path.exists():
        return read_file(path, path.name)
    hub = _HUB_NAME.fullmatch(source)
    if hub is None or source.startswith(".") or source.endswith((*SUFFIXES, ".gz")):
        raise TokenRatioError(printable(f"{source}: no such file or folder."))
    return _read_hub(hub["name"], hub["config"], split)


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and data_suffix(file))
    if not files:
        raise TokenRatioError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder.")
    if split is None:
        return files
    names = {split, *_SPLITS}
    found = {name: [file for file in files if file.name.startswith(name)] for name in names}
    if found[split] or not any(found.values()):
        return found[split] or files
    others = ", ".join(sorted(name for name in names if found[name]))
    raise TokenRatioError(f"{folder}: no file of the split {split!r}; there are: {others}.")


def _read_hub(name: str, config: str | None, split: str | None) -> list[SourceRow]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the Hub client raises anything from ValueError to OSError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise TokenRatioError(
            printable(
                f"{name}: no such file or folder here, and not to be had from the Hub: {reason}"
            )
        ) from error
    return _read_dataset(loaded, split, name)


def _read_dataset(source: object, split: str | None, name: str | None) -> list[SourceRow]:
    import datasets

    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise TokenRatioError(
            "The dataset is a stream (IterableDataset); pairs are counted, shuffled and read again "
            "each epoch. Give a Dataset, for example Dataset.from_list(list(stream.take(10_000)))."
        )
    if isinstance(source, datasets.DatasetDict):
        if split is not None and split not in source:
            raise TokenRatioError(f"The dataset has no split {split!r}; it has {sorted(source)}.")
        parts = list(source) if split is None else [split]
        return [row for part in parts for row in _read_dataset(source[part], part, name)]
    if not isinstance(source, datasets.Dataset):
        raise TokenRatioError(
            f"A {type(source).__name__} is no source of rows; give a path, a Hub name, a "
            "datasets.Dataset or a list of dicts."
        )
    title = f"{split or 'train'}_dataset" if name is None else f"{name}[{split or 'train'}]"
    # Without its format: a "torch" one would turn numbers into tensors.
    return list(_numbered(source.with_format(None), title))
