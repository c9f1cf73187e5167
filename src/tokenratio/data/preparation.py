"""From a source to encoded rows and their account: read, parse, check, render, tokenise, cut."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenratio.data.chat import render
from tokenratio.data.defects import Defect, DefectLog, OnBadRow, RowDefectError, WarningKind
from tokenratio.data.encoding import (
    EncodedExample,
    Limits,
    SpecialTokens,
    assemble,
    special_tokens,
    tokenise,
)
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import (
    CompletionExample,
    PreferenceExample,
    parse_completion,
    parse_preference,
)
from tokenratio.data.parts import source_digest
from tokenratio.data.selection import SelectedRows, Selection, select_rows
from tokenratio.data.sources import Source, locate
from tokenratio.data.summary import DataReport, Truncation
from tokenratio.data.validation import find_warnings, parse_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PAIR_SIDES = ("chosen", "rejected")
COMPLETION_SIDES = ("completion",)

# Rows rendered and tokenised at once: bounds the text and the Python integers alive together.
_BATCH_SIZE = 512
_EVERY_ROW = Selection()


@dataclass(frozen=True)
class PreparedData:
    """Encoded rows and their account.

    Attributes:
        dataset: columns `prompt_ids`, then `chosen_ids` and `rejected_ids` (or `completion_ids`),
            int32; `row`, the row's own index; `origin`, where it stands in the source. In memory,
            no cache file.
        report: what was read, refused, truncated.
        digest: SHA-256 (hex) over the source rows and the encoded ids: a changed file, tokenizer,
            template or limit changes it.
        cuts: for rows that were truncated only: index to `(prompt, *responses)` tokens cut.
    """

    dataset: "Dataset"
    report: DataReport
    digest: str
    cuts: dict[int, tuple[int, ...]]

    def identity(self) -> dict[str, Any]:
        """Digest and account, as a run's record holds them."""
        return {"digest": self.digest, **self.report.to_dict()}

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and response together."""
        prompts, *responses = (pc.list_value_length(column) for column in self._id_columns)
        return int(max(pc.max(pc.add(prompts, response)).as_py() for response in responses))

    @property
    def largest_id(self) -> int:
        """The largest token id of all rows."""
        return int(max(pc.max(pc.list_flatten(column)).as_py() for column in self._id_columns))

    @property
    def _id_columns(self) -> list[pa.ChunkedArray]:
        """Prompts first, then the responses of each side."""
        names = [name for name in self.dataset.column_names if name.endswith("_ids")]
        names.sort(key=lambda name: name != "prompt_ids")
        return [self.dataset.data.column(name) for name in names]


def prepare_pairs(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    on_bad_row: OnBadRow = "skip",
    split: str | None = "train",
    selection: Selection = _EVERY_ROW,
) -> PreparedData:
    """Encode preference pairs.

    Args:
        source: see `read_rows`.
        tokenizer: gives ids, EOS, the prefix and the chat template; it is not changed.
        max_length: tokens of prompt and response together; responses are cut on the right.
        max_prompt_length: tokens of the prompt; prompts are cut on the left.
        on_bad_row: `"skip"` refuses bad rows and counts them, `"error"` stops at the first.
        split: see `read_rows`; of several splits that fit, `SPLIT_prefs` is preferred.
        selection: which rows are used.
    Raises:
        TokenRatioError: the source cannot be read, no row can be used, the tokenizer lacks EOS or a
            chat template, or, with `on_bad_row="error"`, a row is bad.
    """
    parts = locate(source, split=split, prefer="prefs")
    rows, log = select_rows(parts, selection, parse_preference), DefectLog(on_bad_row)
    examples = parse_rows(rows.rows, parse_preference, log)
    limits = Limits(max_length, max_prompt_length)
    return _prepare(rows, examples, PAIR_SIDES, tokenizer, limits, log)


def prepare_completions(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    on_bad_row: OnBadRow = "skip",
    split: str | None = "train",
    selection: Selection = _EVERY_ROW,
) -> PreparedData:
    """Encode prompts with one response each, for fine-tuning; otherwise as `prepare_pairs`.

    Of several splits that fit, `SPLIT_sft` is preferred.
    """
    parts = locate(source, split=split, prefer="sft")
    rows, log = select_rows(parts, selection, parse_completion), DefectLog(on_bad_row)
    examples = parse_rows(rows.rows, parse_completion, log)
    limits = Limits(max_length, max_prompt_length)
    return _prepare(rows, examples, COMPLETION_SIDES, tokenizer, limits, log)


def _prepare(
    selected: SelectedRows,
    examples: Sequence[PreferenceExample] | Sequence[CompletionExample],
    sides: tuple[str, ...],
    tokenizer: "PreTrainedTokenizerBase",
    limits: Limits,
    log: DefectLog,
) -> PreparedData:
    special = special_tokens(tokenizer)
    limits.check(special)
    kept, encoded = [], []
    for example, row in _encode(examples, sides, tokenizer, special, limits, log):
        kept.append(example)
        encoded.append(row)
    log.require_kept(len(selected.rows), len(kept))
    odd = [*find_warnings(kept), *_inner_ends(kept, encoded, special.eos)]
    origins = [example.origin for example in kept]
    report = replace(
        _report(len(selected.rows), log.defects, odd, encoded, sides),
        sources=selected.accounts(origins),
        selection=selected.notes,
    )
    # Judged once, used as often as their source's weight says.
    times = [selected.times.get(origin, 1) for origin in origins]
    origins = [origin for origin, num in zip(origins, times, strict=True) for _ in range(num)]
    encoded = [row for row, num in zip(encoded, times, strict=True) for _ in range(num)]
    cuts = {
        index: (row.prompt_cut, *row.response_cuts)
        for index, row in enumerate(encoded)
        if row.prompt_cut or any(row.response_cuts)
    }
    digest = _digest(selected.rows, encoded)
    return PreparedData(_dataset(encoded, origins, sides), report, digest, cuts)


def _encode(
    examples: Sequence[PreferenceExample] | Sequence[CompletionExample],
    sides: tuple[str, ...],
    tokenizer: "PreTrainedTokenizerBase",
    special: SpecialTokens,
    limits: Limits,
    log: DefectLog,
) -> list[tuple[PreferenceExample | CompletionExample, EncodedExample]]:
    encoded: list[tuple[PreferenceExample | CompletionExample, EncodedExample]] = []
    for begin in range(0, len(examples), _BATCH_SIZE):
        rendered, renderable = [], []
        for example in examples[begin : begin + _BATCH_SIZE]:
            try:
                rendered.append(render(example, tokenizer))
            except RowDefectError as error:
                log.refuse(example.origin, error)
            else:
                renderable.append(example)
        token_ids = tokenise(tokenizer, rendered, special) if rendered else []
        for example, ids in zip(renderable, token_ids, strict=True):
            try:
                encoded.append((example, assemble(ids, sides, special, limits)))
            except RowDefectError as error:
                log.refuse(example.origin, error)
    return encoded


def _inner_ends(
    kept: Sequence[PreferenceExample | CompletionExample], encoded: list[EncodedExample], eos: int
) -> list[Defect]:
    return [
        Defect(example.origin, WarningKind.EOS_INSIDE_RESPONSE, "the response goes on after EOS")
        for example, row in zip(kept, encoded, strict=True)
        if any(eos in response[:-1] for response in row.response_ids)
    ]


def _report(
    rows_read: int,
    defects: list[Defect],
    odd: list[Defect],
    encoded: list[EncodedExample],
    sides: tuple[str, ...],
) -> DataReport:
    lengths = {"prompt": sum(len(row.prompt_ids) for row in encoded)}
    cuts = {"prompt": [row.prompt_cut for row in encoded]}
    for index, side in enumerate(sides):
        lengths[side] = sum(len(row.response_ids[index]) for row in encoded)
        cuts[side] = [row.response_cuts[index] for row in encoded]
    past = None
    if sides == PAIR_SIDES:
        past = sum(abs(len(row.response_ids[0]) - len(row.response_ids[1])) for row in encoded)
    truncated = {
        side: Truncation(rows=sum(cut > 0 for cut in values), tokens=sum(values))
        for side, values in cuts.items()
    }
    return DataReport(
        rows_read=rows_read,
        rows_kept=len(encoded),
        defects=defects,
        warnings=odd,
        unit="tokens",
        lengths=lengths,
        past_shorter=past,
        truncated=truncated,
    )


def _dataset(
    encoded: list[EncodedExample], origins: list[str], sides: tuple[str, ...]
) -> "Dataset":
    import datasets

    columns = {"prompt_ids": [row.prompt_ids for row in encoded]}
    for index, side in enumerate(sides):
        columns[f"{side}_ids"] = [row.response_ids[index] for row in encoded]
    tokens = datasets.List(datasets.Value("int32"))
    features = datasets.Features(
        {
            **dict.fromkeys(columns, tokens),
            "row": datasets.Value("int64"),
            "origin": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict(
        {**columns, "row": list(range(len(encoded))), "origin": origins}, features=features
    )


def _digest(rows: Sequence[SourceRow], encoded: list[EncodedExample]) -> str:
    digest = hashlib.sha256(source_digest(rows).encode("ascii"))
    for row in encoded:
        for ids in (row.prompt_ids, *row.response_ids):
            # The length first: the same tokens with the boundary elsewhere are other data.
            digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()
