"""The report on a source's rows: counts, examples and lengths, as text and as JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tokenratio.data.defects import Defect
from tokenratio.data.display import printable

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Truncation:
    """How many rows of one side were cut, and by how many tokens in total."""

    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Reading:
    """How rows were read.

    Attributes:
        layouts: number of rows by layout, in words.
        unread: number of rows by column that was not read.
        rows_read: all rows.
    """

    layouts: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    rows_read: int = 0

    def lines(self) -> list[str]:
        """The layouts and the columns not read, in a few lines."""
        several = len(self.layouts) > 1
        lines = [
            f"layout: {name}" + (f" ({_rows(num)})" if several else "")
            for name, num in Counter(self.layouts).most_common()
        ]
        if self.unread:
            names = [
                name if num == self.rows_read else f"{name} ({_rows(num)})"
                for name, num in self.unread.items()
            ]
            lines.append(f"columns not read: {', '.join(names)}")
        return lines


@dataclass(frozen=True)
class SourceAccount:
    """What was read of one source.

    Attributes:
        name, split, unread, weight: see `SourcePart`.
        rows: all rows of the split.
        drawn: rows left after weights, sampling and held-out prompts.
        kept: of these, rows that are not refused.
        uses: rows trained on; those used twice count twice.
    """

    name: str
    split: str | None
    unread: tuple[str, ...]
    weight: float
    rows: int
    drawn: int
    kept: int
    uses: int

    def describe(self) -> str:
        """The account on one line."""
        line = f"{self.name}: {_rows(self.rows)}"
        if self.split is not None:
            line += f" of split {self.split}"
        if self.drawn != self.rows:
            line += f", {self.drawn:,} drawn"
        line += f", {self.kept:,} kept"
        if self.uses != self.kept:
            line += f", used as {self.uses:,}"
        if self.weight != 1:
            line += f" (weight {self.weight:g})"
        return line + (f"; not read: {', '.join(self.unread)}" if self.unread else "")


@dataclass(frozen=True)
class DataReport:
    """What happened to the rows of a data set: each is kept or refused, and each cut is counted.

    Attributes:
        rows_read: rows of the source, the unreadable ones included.
        rows_kept: rows that can be trained on; `rows_read - rows_kept == len(defects)`.
        defects: the refused rows, one entry each.
        warnings: about kept rows; a row may appear under several kinds.
        unit: of lengths, `"tokens"` or `"words"`.
        lengths: total length by side (`prompt`, `chosen`, ...) of the kept rows, after truncation.
        shortest, longest: the least and the greatest length by side.
        past_shorter: response tokens (or words) past min(|y^w|, |y^l|), which TBPO never sees
            (docs/method.md §2); None without pairs.
        truncated: by side; empty if nothing was encoded.
        sources: what was read of each source.
        selection: in words, which rows were left out before the checks; `rows_read` excludes them.
        notes: further sentences for the reader.
        reading: layouts and columns that were not read.
    """

    rows_read: int
    rows_kept: int
    defects: Sequence[Defect] = ()
    warnings: Sequence[Defect] = ()
    unit: str = "tokens"
    lengths: Mapping[str, int] = field(default_factory=dict)
    shortest: Mapping[str, int] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)
    past_shorter: int | None = None
    truncated: Mapping[str, Truncation] = field(default_factory=dict)
    sources: Sequence[SourceAccount] = ()
    selection: Sequence[str] = ()
    notes: Sequence[str] = ()
    reading: Reading = field(default_factory=Reading)

    @classmethod
    def of(cls, rows_read: int, sizes: Sequence[Mapping[str, int]], **account: Any) -> "DataReport":
        """The report on kept rows with these lengths by side; `account` is its other fields."""
        pairs = [size for size in sizes if "rejected" in size]
        past = sum(abs(size["chosen"] - size["rejected"]) for size in pairs)
        by_side = {side: [size[side] for size in sizes] for side in (sizes[:1] or [{}])[0]}
        return cls(
            rows_read,
            len(sizes),
            lengths={side: sum(lengths) for side, lengths in by_side.items()},
            shortest={side: min(lengths) for side, lengths in by_side.items()},
            longest={side: max(lengths) for side, lengths in by_side.items()},
            past_shorter=past if pairs else None,
            **account,
        )

    @property
    def defect_counts(self) -> dict[str, int]:
        """Refused rows by kind, the most frequent first."""
        return dict(Counter(str(defect.kind) for defect in self.defects).most_common())

    @property
    def warning_counts(self) -> dict[str, int]:
        """Warnings by kind, the most frequent first."""
        return dict(Counter(str(warning.kind) for warning in self.warnings).most_common())

    @property
    def share_past_shorter(self) -> float | None:
        """The share (0 to 1) of response tokens past the shorter response of their pair."""
        if self.past_shorter is None:
            return None
        return self.past_shorter / max(1, self.lengths["chosen"] + self.lengths["rejected"])

    def summary(self) -> str:
        """The report in a few lines, safe to print."""
        refused = self.rows_read - self.rows_kept
        alone = len(self.sources) == 1 and not self.sources[0].unread
        lines = [] if alone else [source.describe() for source in self.sources]
        lines += self.selection
        lines.append(f"{_rows(self.rows_read)} read, {self.rows_kept:,} kept, {refused:,} refused")
        lines += [f"  {line}" for line in self.reading.lines()]
        lines += [f"  refused: {line}" for line in _count_lines(self.defects)]
        lines += [f"  kept, but odd: {line}" for line in _count_lines(self.warnings)]
        if self.lengths:
            sizes = ", ".join(f"{side} {total:,}" for side, total in self.lengths.items())
            lines.append(f"{self.unit}: {sizes}")
        if self.share_past_shorter is not None:
            lines.append(
                f"past the shorter response: {self.past_shorter:,} response {self.unit} "
                f"({self.share_past_shorter:.1%}), which token-level losses do not see"
            )
        cuts = [
            f"{side} {_rows(cut.rows)} by {_number(cut.tokens, 'token')}"
            for side, cut in self.truncated.items()
            if cut.rows
        ]
        if self.truncated:
            lines.append(f"truncated: {', '.join(cuts) or 'nothing'}")
        lines += self.notes
        return "\n".join(printable(line) for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "sources": [asdict(source) for source in self.sources],
            "selection": list(self.selection),
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "layouts": dict(self.reading.layouts),
            "columns_not_read": dict(self.reading.unread),
            "refused": _by_kind(self.defects),
            "odd": _by_kind(self.warnings),
            "unit": self.unit,
            "lengths": dict(self.lengths),
            "shortest": dict(self.shortest),
            "longest": dict(self.longest),
            "past_shorter": self.past_shorter,
            "share_past_shorter": self.share_past_shorter,
            "truncated": {side: asdict(cut) for side, cut in self.truncated.items()},
            "notes": list(self.notes),
        }


def _number(num: int, of: str) -> str:
    return f"{num:,} {of}{'' if num == 1 else 's'}"


def _rows(num: int) -> str:
    return _number(num, "row")


def _by_kind(found: Sequence[Defect]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for item in found:
        group = groups.setdefault(str(item.kind), {"rows": 0, "examples": []})
        group["rows"] += 1
        if len(group["examples"]) < NUM_EXAMPLES:
            group["examples"].append({"origin": item.origin, "detail": item.detail})
    return dict(sorted(groups.items(), key=lambda pair: -pair[1]["rows"]))


def _count_lines(found: Sequence[Defect]) -> list[str]:
    lines = []
    for kind, group in _by_kind(found).items():
        origins = [item["origin"] for item in group["examples"]]
        more = ", …" if group["rows"] > len(origins) else ""
        where, detail = ", ".join(origins) + more, group["examples"][0]["detail"]
        lines.append(f"{kind}: {group['rows']:,} ({where}; the first: {detail})")
    return lines
