"""From a source to encoded rows and their account: read, parse, check, render, tokenise, cut."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenratio.data.chat import render
from tokenratio.data.defects import (
    Defect,
    DefectKind,
    DefectLog,
    OnBadRow,
    RowDefectError,
    WarningKind,
)
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
from tokenratio.data.omissions import describe, left_out
from tokenratio.data.parts import source_digest
from tokenratio.data.selection import SelectedRows, Selection, select_rows
from tokenratio.data.sources import Source, locate
from tokenratio.data.summary import DataReport, Truncation
from tokenratio.data.template import TemplateSettings, TurnEnd, depends_on_day, turn_end
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
        template: what the rows were rendered with (`TemplateSettings.record`); empty without
            conversations.
        turn_end: the id of the template's end of turn; None where there is none, and without
            conversations.
    """

    dataset: "Dataset"
    report: DataReport
    digest: str
    cuts: dict[int, tuple[int, ...]]
    template: Mapping[str, Any] = field(default_factory=dict)
    turn_end: int | None = None

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
    template: TemplateSettings | None = None,
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
        template: what the chat template is told besides the messages.
    Raises:
        TokenRatioError: the source cannot be read, no row can be used, the tokenizer lacks EOS or a
            chat template, or, with `on_bad_row="error"`, a row is bad.
    """
    parts = locate(source, split=split, prefer="prefs")
    rows, log = select_rows(parts, selection, parse_preference), DefectLog(on_bad_row)
    examples = parse_rows(rows.rows, parse_preference, log)
    limits = Limits(max_length, max_prompt_length)
    return _prepare(rows, examples, PAIR_SIDES, tokenizer, limits, log, template)


def prepare_completions(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    on_bad_row: OnBadRow = "skip",
    split: str | None = "train",
    selection: Selection = _EVERY_ROW,
    template: TemplateSettings | None = None,
) -> PreparedData:
    """Encode prompts with one response each, for fine-tuning; otherwise as `prepare_pairs`.

    Of several splits that fit, `SPLIT_sft` is preferred.
    """
    parts = locate(source, split=split, prefer="sft")
    rows, log = select_rows(parts, selection, parse_completion), DefectLog(on_bad_row)
    examples = parse_rows(rows.rows, parse_completion, log)
    limits = Limits(max_length, max_prompt_length)
    return _prepare(rows, examples, COMPLETION_SIDES, tokenizer, limits, log, template)


def _prepare(
    selected: SelectedRows,
    examples: Sequence[PreferenceExample] | Sequence[CompletionExample],
    sides: tuple[str, ...],
    tokenizer: "PreTrainedTokenizerBase",
    limits: Limits,
    log: DefectLog,
    template: TemplateSettings | None,
) -> PreparedData:
    special, template = special_tokens(tokenizer), template or TemplateSettings()
    limits.check(special)
    end = turn_end(tokenizer, template)
    rows = _encode(examples, sides, tokenizer, special, limits, log, template, end)
    kept, encoded = [row.example for row in rows], [row.ids for row in rows]
    log.require_kept(len(selected.rows), len(kept))
    ends = {special.eos: special.eos_text} | ({end.token_id: end.token} if end else {})
    omitted = [
        Defect(row.example.origin, WarningKind.TEMPLATE_OMISSION, describe(row.left_out))
        for row in rows
        if row.left_out
    ]
    odd = [*find_warnings(kept), *_inner_ends(kept, encoded, ends), *omitted]
    is_chat = any(not isinstance(example.prompt, str) for example in kept)
    origins = [example.origin for example in kept]
    report = replace(
        _report(len(selected.rows), log.defects, odd, encoded, sides),
        sources=selected.accounts(origins),
        selection=selected.notes,
        notes=_template_notes(tokenizer, special, template, end) if is_chat else (),
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
    return PreparedData(
        _dataset(encoded, origins, sides),
        report,
        _digest(selected.rows, encoded),
        cuts,
        template.record(tokenizer) if is_chat else {},
        end.token_id if is_chat and end else None,
    )


@dataclass(frozen=True)
class _EncodedRow:
    """A row that is kept, its tokens, and its text that the template leaves out, by side."""

    example: PreferenceExample | CompletionExample
    ids: EncodedExample
    left_out: Mapping[str, str]


def _encode(
    examples: Sequence[PreferenceExample] | Sequence[CompletionExample],
    sides: tuple[str, ...],
    tokenizer: "PreTrainedTokenizerBase",
    special: SpecialTokens,
    limits: Limits,
    log: DefectLog,
    template: TemplateSettings,
    end: TurnEnd | None,
) -> list[_EncodedRow]:
    encoded: list[_EncodedRow] = []
    for begin in range(0, len(examples), _BATCH_SIZE):
        rendered, renderable = [], []
        for example in examples[begin : begin + _BATCH_SIZE]:
            try:
                rendered.append(render(example, tokenizer, template, end))
            except RowDefectError as error:
                log.refuse(example.origin, error)
            else:
                renderable.append(example)
        token_ids = tokenise(tokenizer, rendered, special) if rendered else []
        for example, text, ids in zip(renderable, rendered, token_ids, strict=True):
            missing = left_out(example, text, tokenizer, template)
            try:
                row = assemble(ids, sides, special, limits)
            except RowDefectError as error:
                log.refuse(example.origin, _explained(error, missing, sides))
            else:
                encoded.append(_EncodedRow(example, row, missing))
    return encoded


def _explained(
    error: RowDefectError, missing: Mapping[str, str], sides: tuple[str, ...]
) -> RowDefectError:
    """A pair whose two sides are the same tokens because of what the template leaves out."""
    of_responses = {side: missing[side] for side in sides if side in missing}
    if error.kind is not DefectKind.IDENTICAL_TOKENS or not of_responses:
        return error
    return RowDefectError(
        error.kind,
        f"the template leaves out what tells them apart: {describe(of_responses)}; set "
        "chat_template to one that renders it, or give the rows as text",
    )


def _template_notes(
    tokenizer: "PreTrainedTokenizerBase",
    special: SpecialTokens,
    template: TemplateSettings,
    end: TurnEnd | None,
) -> list[str]:
    """What a reader has to know of how conversations are rendered."""
    notes = []
    if end is None:
        notes.append(
            f"end of a response: {special.eos_text!r}; the chat template writes no end of turn"
        )
    elif end.token_id != special.eos:
        notes.append(
            f"end of a response: {end.token!r}, the chat template's end of turn, not eos_token "
            f"{special.eos_text!r}"
        )
    if depends_on_day(tokenizer, template):
        notes.append(
            f"the template writes today's date (strftime_now): fixed to {template.day.isoformat()}"
        )
    return notes


def _inner_ends(
    kept: Sequence[PreferenceExample | CompletionExample],
    encoded: Sequence[EncodedExample],
    ends: Mapping[int, str],
) -> list[Defect]:
    """Rows with a response in which an end (id to text) stands before its last token."""
    odd = []
    for example, row in zip(kept, encoded, strict=True):
        inside = (id for response in row.response_ids for id in response[:-1] if int(id) in ends)
        found = next(inside, None)
        if found is not None:
            detail = f"the response goes on after {ends[int(found)]!r}"
            odd.append(Defect(example.origin, WarningKind.EOS_INSIDE_RESPONSE, detail))
    return odd


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
