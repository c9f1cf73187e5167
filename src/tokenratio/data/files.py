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
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tokenratio.data.arrow_rows import Unreadable, arrow_rows
from tokenratio.data.json_arrays import array_items
from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.records import kind_of, parse_json, structure_fault
from tokenratio.text_files import decode_utf8, refuse_utf16

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_MIB = 1 << 20
# A line of JSON takes up to 30 times its size in memory; no text that is trained on is as long.
MAX_LINE = 16 * _MIB
# JSON arrays and CSV are read whole.
MAX_WHOLE = 2048 * _MIB
# Texts shrink by a factor of 3 to 50; what grows by more is made to fill the memory.
MAX_EXPANSION, _ALWAYS_ALLOWED = 100, 64 * _MIB


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
            quoting, not UTF-8 in a format other than JSON lines, beyond the limits of
            docs/data.md).
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise TokenRatioError(
            f"{name}: not one of {', '.join(SUFFIXES)} (or .gz of a text format)."
        )
    if suffix == ".parquet":
        return list(_parquet_rows(path, name))
    try:
        with ExitStack() as files:
            file: BinaryIO = files.enter_context(path.open("rb"))
            limit = None
            if path.suffix == ".gz":
                limit = max(_ALWAYS_ALLOWED, MAX_EXPANSION * path.stat().st_size)
                file = cast(BinaryIO, files.enter_context(gzip.open(file)))
            if suffix == ".jsonl":
                return list(_json_line_rows(file, name, limit))
            data = _whole(file, name, limit)
            return list((_json_rows if suffix == ".json" else _csv_rows)(data, name))
    except (OSError, EOFError, zlib.error) as error:
        raise TokenRatioError(f"{name}: cannot be read: {error}.") from error


def row_of(origin: str, value: object) -> SourceRow:
    """A row from any value; one that is not an object of JSON has its `problem` set.

    NaN in a column counts as null.
    """
    if not isinstance(value, dict):
        return SourceRow(origin, {}, f"it holds {kind_of(value)}, not an object")
    fault = structure_fault(value)
    return SourceRow(origin, {}, fault) if fault is not None else _checked_row(origin, value)


def _checked_row(origin: str, value: dict[str, Any]) -> SourceRow:
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


def _whole(file: BinaryIO, name: str, limit: int | None) -> bytes:
    most = MAX_WHOLE if limit is None else min(limit, MAX_WHOLE)
    data = file.read(most + 1)
    if len(data) > most:
        if most == limit:
            raise _bomb(name)
        raise TokenRatioError(
            f"{name}: larger than {most // _MIB:,} MiB, and has to be read whole: save it as JSON "
            "lines (.jsonl)."
        )
    return data


def _bomb(name: str) -> TokenRatioError:
    return TokenRatioError(
        f"{name}: it expands to more than {MAX_EXPANSION} times its size, which real text never "
        "does: decompress it yourself if you trust it."
    )


def _json_line_rows(file: BinaryIO, name: str, limit: int | None = None) -> Iterator[SourceRow]:
    # Split before decoding: a line that is not UTF-8 is one bad row, and "\n" is never part of a
    # longer UTF-8 sequence.
    number, offset = 0, 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        origin, size = f"{name}:{number}", len(line)
        if number == 1:
            refuse_utf16(line, name)
            line = line.removeprefix(codecs.BOM_UTF8)
        if size > MAX_LINE:
            yield SourceRow(origin, {}, f"the line is longer than {MAX_LINE // _MIB} MiB")
            while not line.endswith(b"\n") and (line := file.readline(_MIB)):
                size += len(line)
                if limit is not None and offset + size > limit:
                    raise _bomb(name)
        elif line.strip():
            yield _json_line(line.removesuffix(b"\n"), origin, offset + size - len(line))
        offset += size
        if limit is not None and offset > limit:
            raise _bomb(name)


def _json_line(line: bytes, origin: str, offset: int) -> SourceRow:
    try:
        value = parse_json(line)
        return _checked_row(origin, value) if isinstance(value, dict) else row_of(origin, value)
    except UnicodeDecodeError as error:
        byte, where = line[error.start], offset + error.start
        return SourceRow(origin, {}, f"not UTF-8: byte 0x{byte:02x} at offset {where} of the file")
    except json.JSONDecodeError as error:
        return SourceRow(origin, {}, f"not JSON: {error.msg} (column {error.colno})")
    except ValueError as error:
        # An integer of thousands of digits, a repeated key, or too many levels.
        return SourceRow(origin, {}, f"not readable JSON: {error}")


def _json_rows(data: bytes, name: str) -> Iterator[SourceRow]:
    text = decode_utf8(data, name)
    begin = len(text) - len(text.lstrip())
    if text.startswith("[", begin):
        for number, (item, fault) in enumerate(array_items(text, begin, name), start=1):
            origin = f"{name}:{number}"
            yield row_of(origin, item) if fault is None else SourceRow(origin, {}, fault)
        return
    try:
        yield row_of(f"{name}:1", parse_json(text))
    except ValueError as error:
        # Many `.json` files on the Hub are JSON lines.
        if not text.startswith("{", begin):
            raise TokenRatioError(f"{name}: not JSON: {error}.") from error
        yield from _json_line_rows(io.BytesIO(data), name)


def _csv_rows(data: bytes, name: str) -> Iterator[SourceRow]:
    # After broken quoting, no record's bounds can be trusted, so it is an error of the file.
    reader = csv.reader(io.StringIO(decode_utf8(data, name), newline=""), strict=True)
    limit = csv.field_size_limit(MAX_LINE)  # the default refuses texts beyond 131,072 characters
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
    kinds = (OSError, ValueError, pyarrow.ArrowException)  # names of columns may not be UTF-8
    with (
        reported_as(f"{name}: cannot be read as Parquet", *kinds),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        header = file.schema_arrow.names
        if len(set(header)) != len(header):
            raise TokenRatioError(f"{name}: duplicate column names: {', '.join(header)}.")
        for batch in file.iter_batches():
            for fields in arrow_rows(batch):
                number += 1
                yield row_of(f"{name}:{number}", without_filled_nulls(fields))


def unreadable_column(row: SourceRow, names: set[str]) -> str | None:
    """Why one of these columns of a row cannot be read; None if all can."""
    for name, value in row.fields.items():
        if name in names and isinstance(value, Unreadable):
            return f"{name} cannot be read: {value.reason}"
    return None
