"""Which rows of a data set are used: by weight, by sampling, by training or held-out prompt.

Rows are drawn by a hash of their content and the seed, not by position: sorting the file does not
change a draw, and adding rows hardly does.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal

from tokenratio.data.columns import Columns
from tokenratio.data.defects import RowDefectError
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import AnyExample, DataParser, Example
from tokenratio.data.parts import SourcePart, canonical
from tokenratio.data.summary import SourceAccount
from tokenratio.data.validation import plain_text
from tokenratio.errors import TokenRatioError


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are used.

    Attributes:
        max_samples: the most rows to use, drawn by the seed; None for all.
        held_out_share: share of the prompts that are held out, between 0 and 1; None for none.
            Which ones depends only on their text and the seed, so no prompt is in both parts, and
            adding rows moves none to the other part.
        part: training or held-out prompts.
        seed: of all draws.
    Raises:
        TokenRatioError: a value outside its domain.
    """

    max_samples: int | None = None
    held_out_share: float | None = None
    part: Literal["train", "held_out"] = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise TokenRatioError(f"max_samples must be at least 1, not {self.max_samples}")
        if self.held_out_share is not None and not 0 < self.held_out_share < 1:
            raise TokenRatioError(
                f"held_out_share must be between 0 and 1, not {self.held_out_share}"
            )

    def holds_out(self, prompt: str) -> bool:
        """Whether a prompt, as returned by `example_prompt`, is held out."""
        if self.held_out_share is None:
            return False
        key = _hash(self.seed, "held out", prompt.encode("utf-8", "replace"))
        return key < self.held_out_share * 2**64


@dataclass(frozen=True)
class SelectedRows(Generic[Example]):
    """The rows to use.

    Attributes:
        rows: each once, in the order of the sources.
        times: how often a row is used, by origin, if more than once.
        notes: what was left out, in words.
        parser: of all rows of the sources, because rows left out also decide how rows are read.
        parts, groups: the sources, and all rows of each.
    """

    rows: list[SourceRow]
    times: dict[str, int]
    notes: list[str]
    parser: DataParser[Example]
    parts: list[SourcePart] = field(repr=False)
    groups: list[list[SourceRow]] = field(repr=False)

    def accounts(self, kept: Sequence[str]) -> list[SourceAccount]:
        """What became of each source's rows; `kept` are the origins of those not refused."""
        drawn, not_refused = {row.origin for row in self.rows}, set(kept)
        accounts = []
        for part, group in zip(self.parts, self.groups, strict=True):
            origins = [row.origin for row in group]
            own = [origin for origin in origins if origin in not_refused]
            accounts.append(
                SourceAccount(
                    name=part.name,
                    split=part.split,
                    unread=part.unread,
                    weight=part.weight,
                    rows=len(group),
                    drawn=len(drawn.intersection(origins)),
                    kept=len(own),
                    uses=sum(self.times.get(origin, 1) for origin in own),
                )
            )
        return accounts


def select_rows(
    parts: list[SourcePart],
    selection: Selection,
    wanted: type[Example],
    columns: Columns | None = None,
) -> SelectedRows[Example]:
    """Read the parts and take the rows that are selected.

    Args:
        wanted: `PreferenceExample` or `CompletionExample`. Refused rows count as training data, so
            that the training report lists them.
        columns: see `SourceColumns`, also for its errors.
    Raises:
        TokenRatioError: a source cannot be read, or one side of the held-out split is empty.
    """
    groups = [part.rows() for part in parts]
    parser = DataParser(groups, wanted, columns)
    rows = [row for group in groups for row in group]
    times: list[int] = []
    notes: list[str] = []
    for part, group in zip(parts, groups, strict=True):
        times += _weighted(group, part.weight, selection.seed)
    if selection.held_out_share is not None:
        times = _one_side(rows, times, selection, parser, notes)
    total = sum(times)
    if selection.max_samples is not None and total > selection.max_samples:
        times = _sampled(rows, times, selection.max_samples, selection.seed)
        notes.append(
            f"{selection.max_samples:,} of {total:,} rows drawn (max_samples, "
            f"seed {selection.seed})"
        )
    pairs = list(zip(rows, times, strict=True))
    return SelectedRows(
        [row for row, num in pairs if num],
        {row.origin: num for row, num in pairs if num > 1},
        notes,
        parser,
        parts,
        groups,
    )


def example_prompt(example: AnyExample) -> str:
    """The words by which prompts are compared, without system messages; the text if no prompt."""
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = [turn for turn in prompt if turn["role"] != "system"]
    response = next(iter(example.responses.values()))
    return " ".join(plain_text(prompt).split() or plain_text(response).split())


def _weighted(rows: Sequence[SourceRow], weight: float, seed: int) -> list[int]:
    whole, fraction = divmod(weight, 1)
    extra: set[int] = set()
    if fraction:
        keys = [_hash(seed, "weight", canonical(row)) for row in rows]
        extra = _smallest(keys, round(fraction * len(rows)))
    return [int(whole) + (index in extra) for index in range(len(rows))]


def _one_side(
    rows: Sequence[SourceRow],
    times: list[int],
    selection: Selection,
    parser: DataParser[Example],
    notes: list[str],
) -> list[int]:
    prompts: dict[str, bool] = {}
    held_out = []
    for row, num in zip(rows, times, strict=True):
        held_out.append(False)
        if num:
            try:
                prompt = example_prompt(parser.parse(row))
            except RowDefectError:
                continue
            held_out[-1] = prompts.setdefault(prompt, selection.holds_out(prompt))
    share, num_out = selection.held_out_share, sum(prompts.values())
    if num_out in (0, len(prompts)):
        raise TokenRatioError(
            f"held_out_share {share} holds out {num_out} of {len(prompts)} prompts: choose another "
            "share, or name held-out data in eval_dataset"
        )
    notes.append(
        f"held out by prompt: {num_out:,} of {len(prompts):,} prompts, {sum(held_out):,} of "
        f"{sum(map(bool, times)):,} rows (held_out_share {share}, seed {selection.seed})"
    )
    if selection.part == "train":
        return [0 if out else num for num, out in zip(times, held_out, strict=True)]
    return [int(out) for out in held_out]


def _sampled(rows: Sequence[SourceRow], times: list[int], num: int, seed: int) -> list[int]:
    uses = [index for index, count in enumerate(times) for _ in range(count)]
    keys, copies = [], [0] * len(rows)
    for index in uses:
        keys.append(_hash(seed, f"sample {copies[index]}", canonical(rows[index])))
        copies[index] += 1
    sampled = [0] * len(rows)
    for place in _smallest(keys, num):
        sampled[uses[place]] += 1
    return sampled


def _smallest(keys: Sequence[int], num: int) -> set[int]:
    return set(sorted(range(len(keys)), key=lambda index: (keys[index], index))[:num])


def _hash(seed: int, purpose: str, content: bytes) -> int:
    digest = hashlib.blake2b(f"{purpose} {seed}\0".encode() + content, digest_size=8)
    return int.from_bytes(digest.digest(), "big")
