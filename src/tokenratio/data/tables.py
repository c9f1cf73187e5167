"""Tables that are not training data: benchmark questions, judgements, leaderboards."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokenratio.data.display import printable
from tokenratio.data.files import SourceRow, read_file
from tokenratio.errors import TokenRatioError

# A column with fewer values than this names groups (models, categories); others hold texts.
_MAX_GROUPS = 64
_NUM_NAMED = 8


def read_table(path: str | Path) -> list[SourceRow]:
    """The rows of a file, at least one."""
    rows = read_file(Path(path), Path(path).name)
    if not rows:
        raise TokenRatioError(f"{Path(path).name}: it has no rows.")
    return rows


def number_of(
    row: SourceRow, column: str, least: float = -math.inf, most: float = math.inf
) -> float:
    """The finite number in a row's cell, from `least` to `most`; anything else is refused."""
    if row.problem is not None:
        raise TokenRatioError(f"{row.origin}: {row.problem}.")
    if column not in row.fields:
        raise TokenRatioError(f"{row.origin}: it has no column {column}.")
    number = _number(row.fields[column])
    if number is None or not (math.isfinite(number) and least <= number <= most):
        raise TokenRatioError(
            f"{row.origin}: {column} is {row.fields[column]!r}, not a number"
            + (f" between {least:g} and {most:g}." if most < math.inf else ".")
        )
    return number


def describe_table(rows: Sequence[SourceRow]) -> str:
    """A few printable lines per file: columns, empty and repeated cells, groups of unequal size."""
    files: dict[str, list[SourceRow]] = {}
    for row in rows:
        files.setdefault(row.origin.rpartition(":")[0], []).append(row)
    return "\n".join(line for name, group in files.items() for line in _describe(name, group))


def _describe(name: str, rows: list[SourceRow]) -> list[str]:
    broken = [row for row in rows if row.problem is not None]
    good = [row for row in rows if row.problem is None]
    lines = [f"{name}: {len(rows):,} rows"]
    if broken:
        lines.append(f"  malformed row: {len(broken):,} ({broken[0].origin}; {broken[0].problem})")
    repeated = len(good) - len({repr(sorted(row.fields.items())) for row in good})
    if repeated:
        lines.append(f"  duplicate row: {repeated:,}")
    for column in dict.fromkeys(key for row in good for key in row.fields):
        lines.append(f"  {column}: {_describe_column(column, good)}")
    return [printable(line) for line in lines]


def _describe_column(column: str, rows: list[SourceRow]) -> str:
    found = [row for row in rows if column in row.fields]
    values = [row.fields[column] for row in found]
    kinds = Counter(type(value).__name__ for value in values)
    parts = [" or ".join(kind for kind, _ in kinds.most_common())]
    blank = [row for row in found if not str(row.fields[column]).strip()]
    if blank:
        parts.append(f"{len(blank):,} empty ({blank[0].origin})")
    if len(found) < len(rows):
        parts.append(f"missing in {len(rows) - len(found):,}")
    texts = [value for value in values if isinstance(value, str)]
    numbers = [number for value in values if (number := _number(value)) is not None]
    if len(numbers) == len(values):
        zeros = numbers.count(0.0)  # of a column of lengths: empty texts
        parts.append(
            f"{min(numbers):g} to {max(numbers):g}" + (f" ({zeros:,} zero)" if zeros else "")
        )
        return ", ".join(parts)
    for mark, title in (("\ufffd", "with U+FFFD"), ("\r", "with a carriage return")):
        if count := sum(mark in text for text in texts):
            parts.append(f"{count:,} {title}")
    groups = Counter(texts)
    if 1 < len(groups) <= _MAX_GROUPS and len(groups) * 2 <= len(texts):
        parts.append(_describe_groups(groups))
    return ", ".join(parts)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _describe_groups(groups: Counter[str]) -> str:
    """Groups by size; if most have the same size, the others are named."""
    usual, count = Counter(groups.values()).most_common(1)[0]
    if count == len(groups):
        return f"{len(groups)} values of {usual:,} rows each"
    if count * 2 <= len(groups):
        return f"{len(groups)} values of {min(groups.values()):,} to {max(groups.values()):,} rows"
    others = [f"{value} {size:,}" for value, size in groups.items() if size != usual]
    named = ", ".join(others[:_NUM_NAMED]) + (", …" if len(others) > _NUM_NAMED else "")
    return f"{len(groups)} values, {count} of {usual:,} rows; {len(others)} with others: {named}"
