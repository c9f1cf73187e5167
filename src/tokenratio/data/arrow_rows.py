"""Rows of Arrow tables: a value that Python cannot hold costs its row, not the table."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tokenratio.errors import TokenRatioError, first_line


@dataclass(frozen=True)
class Unreadable:
    """A value that cannot be read, such as a text that is not UTF-8 or a date after year 9999.

    Its row is refused if the column is used.
    """

    reason: str


def arrow_rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `pyarrow.Table` or `RecordBatch`."""
    names = table.column_names if hasattr(table, "column_names") else table.schema.names
    if not names:
        yield from ({} for _ in range(table.num_rows))
    for values in zip(*map(_values, table.columns), strict=True):
        yield dict(zip(names, values, strict=True))


def check_arrow(table: Any, name: str) -> None:
    """Refuse a table of a file whose offsets point outside it: reading it would end the process.

    Raises:
        TokenRatioError: also for a text inside a list or an object that is not UTF-8.
    """
    import pyarrow as pa

    plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    for column, values in zip(table.column_names, table.columns, strict=True):
        for chunk in values.chunks:
            try:
                chunk.validate(full=True)
            except (pa.ArrowException, ValueError) as error:
                # A text that is not UTF-8 costs its row alone, if the offsets are right.
                if chunk.type in plain:
                    with suppress(pa.ArrowException, ValueError):
                        chunk.view(plain[chunk.type]).validate(full=True)
                        continue
                raise TokenRatioError(
                    f"{name} is damaged: column {column}: {first_line(error)}"
                ) from None


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except Exception:  # of Arrow, of the decoder, of dates: whatever the one value raises
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except Exception as error:
        return Unreadable(first_line(error))
