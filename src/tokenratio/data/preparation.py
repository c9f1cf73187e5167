"""From a source to encoded rows and their report: read, parse, check, render, tokenise, cut."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokenratio.data.columns import Columns
from tokenratio.data.defects import Defect, DefectLog, OnBadRow, RowDefectError, WarningKind
from tokenratio.data.display import printable, quoted
from tokenratio.data.encoder import RowEncoder
from tokenratio.data.encoding import EncodedExample, Limits, SpecialTokens, special_tokens
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import AnyExample, CompletionExample, PreferenceExample
from tokenratio.data.length_grouping import row_lengths
from tokenratio.data.omissions import describe_omissions
from tokenratio.data.parts import SourcePart, source_digest
from tokenratio.data.prepared_cache import ingredients_of, kept_on_disk
from tokenratio.data.selection import Selection, select_rows
from tokenratio.data.sources import Source, locate
from tokenratio.data.summary import DataReport, Truncation
from tokenratio.data.template import (
    TemplateSettings,
    TurnEnd,
    default_system_prompt,
    depends_on_day,
    turn_end,
)
from tokenratio.data.validation import find_warnings, parse_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Rows of an Arrow chunk: its offsets are 32 bits wide.
_CHUNK_SIZE = 8192
_EVERY_ROW = Selection()


@dataclass(frozen=True)
class PreparedData:
    """Encoded rows and their report.

    Attributes:
        dataset: columns `prompt_ids`, then `chosen_ids` and `rejected_ids` (or `completion_ids`),
            int32; `row`, the row's own index; `origin`, its place in the source. In memory.
        report: what was read, refused, truncated.
        digest: SHA-256 (hex) over the source rows and the encoded ids.
        cuts: for truncated rows, index to `(prompt, *responses)` tokens cut.
        template: `TemplateSettings.record` of conversations; else empty.
        turn_end: id of the template's end of turn; None if there is none, or no conversation.
        read_from: the cache entry that this was read from; None if it was prepared now.
    """

    dataset: "Dataset"
    report: DataReport
    digest: str
    cuts: dict[int, tuple[int, ...]]
    template: Mapping[str, Any] = field(default_factory=dict)
    turn_end: int | None = None
    read_from: Path | None = None

    def summary(self) -> str:
        """The report in a few lines, and where it was read from."""
        kept = [] if self.read_from is None else [f"read from the cache: {self.read_from}"]
        return "\n".join([self.report.summary(), *map(printable, kept)])

    def identity(self) -> dict[str, Any]:
        """Digest and report, as recorded in a run."""
        return {"digest": self.digest, **self.report.to_dict()}

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and response together."""
        return int(row_lengths(self.dataset).max())

    @property
    def largest_id(self) -> int:
        """The largest token id of all rows."""
        names = [name for name in self.dataset.column_names if name.endswith("_ids")]
        columns = [pc.list_flatten(self.dataset.data.column(name)) for name in names]
        return int(max(pc.max(column).as_py() for column in columns))


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
    columns: Columns | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int = 1,
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
        template: arguments of the chat template besides the messages.
        columns: for an unknown layout: our names to the source's columns, such as
            `{"prompt": "ask"}`; see `SourceColumns`.
        cache_dir: folder of the cache of prepared rows, keyed by the content of everything they
            depend on; None for no cache.
        num_proc: processes that render and tokenise; the result is the same for any number.
    Raises:
        TokenRatioError: the source cannot be read, no row can be used, the tokenizer lacks EOS or a
            chat template, or, with `on_bad_row="error"`, a row is bad.
    """
    return _kept(locals(), PreferenceExample, "prefs")


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
    columns: Columns | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int = 1,
) -> PreparedData:
    """Encode prompts with one response each, for fine-tuning; otherwise as `prepare_pairs`.

    Of several splits that fit, `SPLIT_sft` is preferred.
    """
    return _kept(locals(), CompletionExample, "sft")


def _kept(asked: dict[str, Any], wanted: type[Any], prefer: str) -> PreparedData:
    """Prepare rows, or read them from the cache, whose key covers all arguments in `asked`."""
    arguments = dict(asked)
    source, split, tokenizer = (arguments.pop(name) for name in ("source", "split", "tokenizer"))
    root, num_proc = arguments.pop("cache_dir"), arguments.pop("num_proc")
    template = arguments.pop("template") or TemplateSettings()
    parts = locate(source, split=split, prefer=prefer)
    data, entry = kept_on_disk(
        root,
        # Only the settings that the template uses: most do not use today's date.
        lambda: ingredients_of(
            parts,
            tokenizer,
            {"sides": wanted.SIDES, "template": template.record(tokenizer), **arguments},
        ),
        PreparedData,
        lambda: _prepare(
            parts, wanted, tokenizer, template=template, num_proc=num_proc, **arguments
        ),
    )
    return replace(data, read_from=entry)


def _prepare(
    parts: list[SourcePart],
    wanted: type[Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    on_bad_row: OnBadRow,
    selection: Selection,
    template: TemplateSettings,
    columns: Columns | None,
    num_proc: int,
) -> PreparedData:
    selected = select_rows(parts, selection, wanted, columns)
    log = DefectLog(on_bad_row)
    parsed = parse_rows(selected.rows, selected.parser, log)
    sides, examples = wanted.SIDES, parsed.examples
    special, limits = special_tokens(tokenizer), Limits(max_length, max_prompt_length)
    limits.check(special)
    end = turn_end(tokenizer, template)
    encoder = RowEncoder(sides, tokenizer, special, limits, template, end)
    kept: list[AnyExample] = []
    encoded: list[EncodedExample] = []
    for example, row in zip(examples, encoder.encode(examples, num_proc), strict=True):
        if isinstance(row, RowDefectError):
            log.refuse(example.origin, row)
        else:
            kept.append(example)
            encoded.append(row)
    log.require_kept(len(selected.rows), len(kept))
    ends = {special.eos: special.eos_text} | ({end.token_id: end.token} if end else {})
    odd = [*parsed.odd, *find_warnings(kept), *_encoding_warnings(kept, encoded, ends)]
    chats = [example.prompt for example in kept if not isinstance(example.prompt, str)]
    is_chat, notes = bool(chats), []
    if is_chat:
        has_system = any(prompt[0]["role"] == "system" for prompt in chats if prompt)
        notes = _template_notes(tokenizer, special, template, end, has_system=has_system)
    origins = [example.origin for example in kept]
    parts_of_rows = ("prompt", *sides)
    report = DataReport.of(
        len(selected.rows),
        [
            dict(zip(parts_of_rows, map(len, (row.prompt_ids, *row.response_ids)), strict=True))
            for row in encoded
        ],
        defects=log.defects,
        warnings=odd,
        truncated={
            name: Truncation(rows=sum(num > 0 for num in tokens), tokens=sum(tokens))
            for name, tokens in zip(
                parts_of_rows, zip(*(row.cuts for row in encoded), strict=True), strict=True
            )
        },
        sources=selected.accounts(origins),
        selection=selected.notes,
        reading=parsed.reading,
        notes=notes,
    )
    # Checked once, used as often as their source's weight requires.
    times = [selected.times.get(origin, 1) for origin in origins]
    origins = [origin for origin, num in zip(origins, times, strict=True) for _ in range(num)]
    encoded = [row for row, num in zip(encoded, times, strict=True) for _ in range(num)]
    cuts = {index: row.cuts for index, row in enumerate(encoded) if any(row.cuts)}
    digest = _digest(selected.rows, encoded)
    return PreparedData(
        _dataset(encoded, origins, sides, digest),
        report,
        digest,
        cuts,
        template.record(tokenizer) if is_chat else {},
        end.token_id if is_chat and end else None,
    )


def _template_notes(
    tokenizer: "PreTrainedTokenizerBase",
    special: SpecialTokens,
    template: TemplateSettings,
    end: TurnEnd | None,
    *,
    has_system: bool,
) -> list[str]:
    """Notes on how conversations are rendered.

    Args:
        has_system: a conversation has a system message.
    """
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
    if has_system and (own := default_system_prompt(tokenizer, template)) is not None:
        notes.append(
            "the template writes a system prompt of its own before that of a row: "
            f"{quoted(own, 60)}"
        )
    if depends_on_day(tokenizer, template):
        notes.append(
            f"the template writes today's date (strftime_now): fixed to {template.day.isoformat()}"
        )
    return notes


def _encoding_warnings(
    kept: Sequence[AnyExample], encoded: Sequence[EncodedExample], ends: Mapping[int, str]
) -> list[Defect]:
    """Responses that contain an end (id to text) before their last token; text left out."""
    inner_ends, omissions = [], []
    for example, row in zip(kept, encoded, strict=True):
        inside = (id for response in row.response_ids for id in response[:-1] if int(id) in ends)
        found = next(inside, None)
        if found is not None:
            detail = f"the response continues after {ends[int(found)]!r}"
            inner_ends.append(Defect(example.origin, WarningKind.EOS_INSIDE_RESPONSE, detail))
        if row.left_out:
            detail = describe_omissions(row.left_out)
            omissions.append(Defect(example.origin, WarningKind.TEMPLATE_OMISSION, detail))
    return [*inner_ends, *omissions]


def _dataset(
    encoded: list[EncodedExample], origins: list[str], sides: tuple[str, ...], digest: str
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
    arrays = {name: _token_column(rows) for name, rows in columns.items()}
    arrays |= {"row": pa.array(range(len(encoded)), pa.int64()), "origin": pa.array(origins)}
    table = pa.table(arrays, schema=features.arrow_schema)
    return datasets.Dataset(table, fingerprint=digest[:16])


def _token_column(rows: list[NDArray[np.int32]]) -> pa.ChunkedArray:
    """Rows of ids as Arrow has them, without Python's integers on the way."""
    chunks = []
    for begin in range(0, len(rows), _CHUNK_SIZE):
        chunk = rows[begin : begin + _CHUNK_SIZE]
        offsets = np.cumsum([0, *map(len, chunk)], dtype=np.int32)
        chunks.append(pa.ListArray.from_arrays(offsets, np.concatenate(chunk)))
    return pa.chunked_array(chunks)


def _digest(rows: Sequence[SourceRow], encoded: list[EncodedExample]) -> str:
    digest = hashlib.sha256(source_digest(rows).encode("ascii"))
    for row in encoded:
        for ids in (row.prompt_ids, *row.response_ids):
            # The length first, so that the position of the boundary counts.
            digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()
