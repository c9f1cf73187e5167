"""Rows of local JSON, JSON-lines, CSV and Parquet files.

Text files are read row by row with the standard library: with Arrow's readers, one malformed line
or a field that changes its type would lose the whole file; here it loses one row, which is
reported. Lines end only at "\\n", because texts contain U+2028.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError, first_line

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class SourceRow:
    """One row as found in a source, before validation.

    Attributes:
        origin: its location, for messages: `train.jsonl:17` (line or record, from 1) or
            `org/name[train]:16` (index, from 0).
        fields: its columns; empty if it could not be read.
        problem: why it could not be read as an object; None if it could.
    """

    origin: str
    fields: dict[str, Any]
    problem: str | None = None


def data_suffix(path: Path) -> str | None:
    """The format of a file by its name without `.gz`; None if not one of `SUFFIXES`."""
    stem = path.with_suffix("") if path.suffix == ".gz" else path
    suffix = stem.suffix.lower()
    # Parquet is compressed inside; it needs the seekable file.
    return None if suffix not in SUFFIXES or (suffix == ".parquet" and stem != path) else suffix


def read_file(path: Path, name: str) -> list[SourceRow]:
    """All rows of one file; `name` is its name in origins.

    Raises:
        TokenRatioError: the file as a whole cannot be read (wrong format, broken JSON array or CSV
            quoting, not UTF-8 in a format other than JSON lines).
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise TokenRatioError(
            f"{name}: not one of {', '.join(SUFFIXES)} (or .gz of a text format)."
        )
    if suffix == ".parquet":
        return list(_parquet_rows(path, name))
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise TokenRatioError(f"{name}: cannot be read: {error}.") from error
    readers = {".jsonl": _json_line_rows, ".json": _json_rows, ".csv": _csv_rows}
    return list(readers[suffix](data, name))


def row_of(origin: str, value: object) -> SourceRow:
    """A row from any value; one that is not an object with string keys has its `problem` set.

    NaN in a column counts as null.
    """
    if not isinstance(value, dict):
        return SourceRow(origin, {}, f"it holds a {type(value).__name__}, not an object")
    if any(not isinstance(key, str) for key in value):
        return SourceRow(origin, {}, "a column name is not a string")
    # pandas writes NaN for a cell that is empty.
    return SourceRow(
        origin, {k: None if isinstance(v, float) and v != v else v for k, v in value.items()}
    )


def without_filled_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the keys that Arrow filled in, at every depth.

    In Arrow all objects of a column have the same keys: a tool's arguments get those of every other
    tool, as nulls. An intended null is dropped too, unless the column holds JSON as text. Columns
    themselves and items of lists stay.

    >>> without_filled_nulls({"a": None, "b": [{"c": None, "d": [None, {"e": None}]}]})
    {'a': None, 'b': [{'d': [None, {}]}]}
    """
    return {name: _without_nulls(value) for name, value in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _decode(data: bytes, name: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        skipped = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TokenRatioError(
            f"{name}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start + skipped}, line {line}. Save the file as UTF-8."
        ) from error


def _json_line_rows(data: bytes, name: str) -> Iterator[SourceRow]:
    # Split before decoding: a line that is not UTF-8 is one bad row, and "\n" is never part of a
    # longer UTF-8 sequence.
    offset = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    for number, line in enumerate(data[offset:].split(b"\n"), start=1):
        if line.strip():
            yield _json_line(line, f"{name}:{number}", offset)
        offset += len(line) + 1


def _json_line(line: bytes, origin: str, offset: int) -> SourceRow:
    try:
        return row_of(origin, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        byte, where = line[error.start], offset + error.start
        return SourceRow(origin, {}, f"not UTF-8: byte 0x{byte:02x} at offset {where} of the file")
    except json.JSONDecodeError as error:
        return SourceRow(origin, {}, f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or brackets nested past Python's limit.
        return SourceRow(origin, {}, f"not readable JSON: {error}")


def _json_rows(data: bytes, name: str) -> Iterator[SourceRow]:
    text = _decode(data, name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Many `.json` files on the Hub are JSON lines.
        if text.lstrip().startswith("{"):
            yield from _json_line_rows(data, name)
            return
        raise TokenRatioError(f"{name}: not JSON: {error}.") from error
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        yield row_of(f"{name}:{number}", item)


def _csv_rows(data: bytes, name: str) -> Iterator[SourceRow]:
    # After broken quoting, no record's bounds can be trusted, so it is an error of the file.
    reader = csv.reader(io.StringIO(_decode(data, name), newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts beyond 131,072 characters
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise TokenRatioError(f"{name}: duplicate column names in the header: {header}.")
        start = reader.line_num + 1
        for record in reader:
            origin, start = f"{name}:{start}", reader.line_num + 1
            if len(record) == len(header):
                yield SourceRow(origin, dict(zip(header, record, strict=True)))
            elif record:
                problem = f"it has {len(record)} fields, the header {len(header)}"
                yield SourceRow(origin, {}, problem)
    except csv.Error as error:
        raise TokenRatioError(
            f"{name}: broken CSV near line {reader.line_num}: {error}."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, name: str) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield row_of(f"{name}:{number}", without_filled_nulls(fields))
    except (OSError, pyarrow.ArrowException) as error:
        raise TokenRatioError(f"{name}: cannot be read as Parquet: {first_line(error)}") from error
