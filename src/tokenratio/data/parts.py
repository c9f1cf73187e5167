"""A located part of a data set: its rows, and a digest of their content."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokenratio.data.arrow_rows import arrow_rows
from tokenratio.data.display import printable
from tokenratio.data.entries import file_digest
from tokenratio.data.files import SourceRow, read_file, row_of, without_filled_nulls


@dataclass(frozen=True)
class SourcePart:
    """One split of one source, located but not read yet.

    Attributes:
        name: its name in messages.
        content: files, or a `datasets.Dataset` or list, each with its name in origins.
        split: which split of the source it is; None where the source has no splits.
        unread: the source's other splits, and files that belong to none.
        weight: see `DataSource`.
    """

    name: str
    content: tuple[tuple[str, Any], ...]
    split: str | None = None
    unread: tuple[str, ...] = ()
    weight: float = 1.0

    def rows(self) -> list[SourceRow]:
        """Every row, in order; one that could not be read has its `problem` set.

        Raises:
            TokenRatioError: a file cannot be read as a whole.
        """
        return [row for name, item in self.content for row in _rows_of(name, item)]

    def digest(self) -> str:
        """SHA-256 (hex) over the content of the rows and the names in their origins."""
        digest = hashlib.sha256()
        for name, item in self.content:
            digest.update(json.dumps([name, _content_digest(item)]).encode())
        return digest.hexdigest()

    def describe(self) -> str | None:
        """Which split is read and what is not; None if there was no choice."""
        if not self.unread:
            return None
        what = f"split {self.split}" if self.split else "files"
        return printable(f"{self.name}: {what}; not read: {', '.join(self.unread)}")


def source_digest(rows: Iterable[SourceRow]) -> str:
    """SHA-256 (hex) over the rows' content in order, as canonical JSON, without origins."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical(row))
        digest.update(b"\n")
    return digest.hexdigest()


def canonical(row: SourceRow) -> bytes:
    """A row's content as one line of JSON."""
    text = json.dumps([row.fields, row.problem], sort_keys=True, separators=(",", ":"), default=str)
    return text.encode("ascii")


def _rows_of(name: str, item: Any) -> Iterator[SourceRow]:
    if isinstance(item, Path):
        yield from read_file(item, name)
        return
    # Without the data set's format: "torch" would turn numbers into tensors.
    is_list = isinstance(item, list | tuple)
    items = item if is_list else map(without_filled_nulls, _dataset_rows(item))
    for index, value in enumerate(items):
        yield row_of(f"{name}:{index}", value)


def _dataset_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`; a value that cannot be read costs its row alone."""
    plain, size = dataset.with_format(None), 1000
    for begin in range(0, len(plain), size):
        places = range(begin, min(begin + size, len(plain)))
        try:
            rows = list(plain.select(places))
        except Exception:  # whatever the one value raises
            rows = list(arrow_rows(dataset.with_format("arrow")[begin : places.stop]))
        yield from rows


def _content_digest(item: Any) -> str:
    if isinstance(item, Path):
        return file_digest(item)
    if isinstance(item, list | tuple):
        return source_digest(_rows_of("", item))
    digest = hashlib.sha256(str(item.features).encode())
    for table in item.with_format("arrow").iter(1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()
