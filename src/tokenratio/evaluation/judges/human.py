"""People as the judge, who fill in a blinded sheet."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NotRequired, TypedDict

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.json_lines import read_whole, to_line
from tokenratio.evaluation.judges.protocol import JudgeContext, ResponsePair, Verdict, digest_of
from tokenratio.records import as_shape
from tokenratio.run_folder import replace_bytes
from tokenratio.settings import option

_VERDICTS = {"1": 1.0, "2": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class HumanSettings:
    """People, who fill in a sheet: the first call writes it, the next one reads it."""

    required: ClassVar[tuple[str, ...]] = ()

    sheet: str | None = option(
        None, "The file to fill in. Default: sheet.jsonl next to the judgements."
    )
    seed: int = option(0, "Seed of the order on the sheet.")

    def make(self, context: JudgeContext) -> "HumanJudge | None":
        sheet = Path(self.sheet) if self.sheet else context.folder / "sheet.jsonl"
        is_new = not sheet.exists()
        if is_new:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            write_sheet(context.comparisons, sheet, seed=self.seed)
        judge = HumanJudge(sheet, seed=self.seed)
        if not judge.num_verdicts:
            state = "written" if is_new else "no verdict is filled in yet"
            context.report(
                f'{sheet}: {state}; set each verdict to "1", "2" or "tie", then run the same '
                "command again"
            )
            return None
        unmatched = judge.num_unmatched(context.comparisons)
        if unmatched:
            lines = "line belongs" if unmatched == 1 else "lines belong"
            context.report(f"{sheet}: {unmatched} {lines} to other comparisons; ignored")
        return judge


def write_sheet(comparisons: Sequence[ResponsePair], path: str | Path, *, seed: int) -> None:
    """Write the sheet: JSON lines with `item`, `prompt`, `response_1`, `response_2`, `verdict`.

    The order of the lines and of the two responses is random, and the sheet does not reveal it.
    People set `verdict` to "1", "2" or "tie"; `HumanJudge` with the same seed restores the order.

    Raises:
        TokenRatioError: the file exists, and may be filled in.
    """
    path = Path(path)
    if path.exists():
        raise TokenRatioError(f"{path} already exists and may be filled in: choose another file")
    lines = {}
    for comparison in comparisons:
        item, is_swapped = _item(comparison, seed)
        shown = comparison.swapped() if is_swapped else comparison
        lines[item] = {
            "item": item,
            "prompt": shown.content()[0],
            "response_1": shown.response_a.text,
            "response_2": shown.response_b.text,
            "verdict": None,
        }
    replace_bytes(path, b"".join(to_line(lines[item]) for item in sorted(lines)))


class _Line(TypedDict):
    item: str
    verdict: NotRequired[str | int | None]


class HumanJudge:
    """Reads a sheet that people have filled in.

    Each pair is shown in one random order; over many pairs, the effect of the position cancels.

    Args:
        path: the sheet; its lines may be in any order.
        seed: the seed that the sheet was written with.
    Raises:
        TokenRatioError: a verdict is not "1", "2", "tie" or null, or a line's item is missing or
            repeated.
    """

    order_matters = False

    def __init__(self, path: str | Path, *, seed: int) -> None:
        self._path, self._seed = Path(path), seed
        self._verdicts: dict[str, str | None] = {}
        for number, line in enumerate(read_whole(self._path), start=1):
            origin = f"{self._path}:{number}"
            found = as_shape(_Line, line, origin, "this is not a sheet for judges")
            item, verdict = found["item"], found.get("verdict")
            if item in self._verdicts:
                raise TokenRatioError(f"{origin}: duplicate line for item {item}: remove one")
            text = None if verdict is None else str(verdict).strip().lower()
            if text and text not in _VERDICTS:
                raise TokenRatioError(
                    f'{origin}: verdict must be "1", "2", "tie" or null, not {verdict!r}'
                )
            self._verdicts[item] = text or None

    def identity(self) -> dict[str, Any]:
        return {
            "judge": "human",
            "seed": self._seed,
            "verdicts": digest_of(sorted(self._verdicts.items()))[:16],
        }

    @property
    def num_verdicts(self) -> int:
        """Lines of the sheet that are filled in."""
        return sum(verdict is not None for verdict in self._verdicts.values())

    def num_unmatched(self, comparisons: Sequence[ResponsePair]) -> int:
        """Lines of the sheet that belong to other comparisons and are ignored."""
        return len(self._verdicts.keys() - {_item(each, self._seed)[0] for each in comparisons})

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterator[Verdict]:
        for comparison in comparisons:
            item, is_swapped = _item(comparison, self._seed)
            verdict = self._verdicts.get(item)
            if verdict is None:
                known = item in self._verdicts
                yield Verdict(None, "not filled in" if known else f"not in {self._path.name}")
            else:
                first = _VERDICTS[verdict]
                yield Verdict(1 - first if is_swapped else first, raw=verdict)


def _item(comparison: ResponsePair, seed: int) -> tuple[str, bool]:
    """A comparison's name in the sheet, and whether its second response is shown first."""
    about = [seed, comparison.id, comparison.sample, comparison.content()]
    digest = hashlib.sha256(digest_of(about).encode()).digest()
    return digest[:8].hex(), bool(digest[-1] & 1)
