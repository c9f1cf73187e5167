"""The output of `tokenratio inspect-data`: rows as training sees them, then the report."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenratio.data.collation import CompletionCollator, PairCollator, padding_id
from tokenratio.data.columns import Columns, SourceColumns
from tokenratio.data.defects import DefectLog
from tokenratio.data.display import printable, quoted
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import EXAMPLE_TYPES, AnyExample, DataParser, PreferenceExample
from tokenratio.data.layouts import use_of
from tokenratio.data.preparation import PreparedData, prepare_completions, prepare_pairs
from tokenratio.data.sources import Source, describe_splits, locate
from tokenratio.data.summary import DataReport
from tokenratio.data.tables import describe_table
from tokenratio.data.template import TemplateSettings
from tokenratio.data.validation import find_warnings, parse_rows, plain_text
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters of a text shown, and tokens shown on each side of the boundary.
_SHOWN = 240
_AROUND = 3
# The rows of each source.
_Groups: TypeAlias = Sequence[Sequence[SourceRow]]


def inspect_source(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    num_rows: int = 3,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    split: str | None = None,
    template: TemplateSettings | None = None,
    columns: Columns | None = None,
    generation_ends: Sequence[int] | None = None,
) -> str:
    """The body of `tokenratio inspect-data`: rows of the source and its report.

    Without a tokenizer, lengths are in words and characters. Rows that are neither pairs nor
    completions (questions, judgements) are described by column.

    Args:
        source: see `read_rows`.
        tokenizer: None to look at the text only.
        num_rows: how many rows to show.
        max_length, max_prompt_length: as in training; only with a tokenizer.
        split: None for what training reads, or else for the only split there is.
        template: arguments of the chat template besides the messages.
        columns: as in training; see `SourceColumns`.
        generation_ends: `eos_token_id` of the model's generation_config, if known.
    Returns:
        Lines for the terminal; control characters of the data are escaped.
    Raises:
        TokenRatioError: the source cannot be read, the tokenizer cannot be used, or no row can be
            encoded.
    """
    split = _shown_split(source) if split is None else split
    groups = [part.rows() for part in locate(source, split=split)]
    rows = [row for group in groups for row in group]
    if not rows:
        raise TokenRatioError("The data source has no rows.")
    wanted = _wanted(groups, columns)
    examples, report = ([], None) if wanted is None else _check(groups, wanted, columns)
    if tokenizer is None or not examples:
        blocks = [*map(_text_row, examples[:num_rows])]
        text = "\n\n".join([*blocks, report.summary() if report else describe_table(rows)])
        return "\n".join([*describe_splits(source, split=split), text])
    prepare = prepare_pairs if wanted is PreferenceExample else prepare_completions
    prepared = prepare(
        source,
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        split=split,
        template=template,
        columns=columns,
    )
    shown = inspect_rows(prepared, tokenizer, num_rows=num_rows)
    warning = end_disagreement(prepared, tokenizer, generation_ends)
    return shown if warning is None else f"{shown}\n{warning}"


def inspect_rows(
    prepared: PreparedData, tokenizer: "PreTrainedTokenizerBase", *, num_rows: int
) -> str:
    """Encoded rows decoded again, as training will see them, and the report.

    For each row: the prompt and each response with their lengths, the tokens around the boundary
    between them, the positions the collator's mask marks, EOS, what was cut, and
    T = min(|y^w|, |y^l|).
    """
    shown = prepared.dataset.select(range(min(num_rows, len(prepared.dataset))))
    blocks = [_encoded_row(row, prepared.cuts.get(row["row"]), tokenizer) for row in shown]
    return "\n\n".join([*blocks, prepared.report.summary()])


def end_disagreement(
    prepared: PreparedData,
    tokenizer: "PreTrainedTokenizerBase",
    generation_ends: Sequence[int] | None,
) -> str | None:
    """A warning if the model's generation settings do not stop at the template's end of turn.

    Args:
        generation_ends: the ids in `eos_token_id` of the model's generation_config; None where it
            has none, and the tokenizer's EOS ends a response.
    """
    end = prepared.turn_end
    stops = [tokenizer.eos_token_id] if generation_ends is None else list(generation_ends)
    if end is None or end in stops:
        return None
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(id)!r} ({id})" for id in stops)
    where = "eos_token" if generation_ends is None else "eos_token_id of generation_config"
    return (
        f"{where} is {names or 'empty'}: software that uses only this setting generates past the "
        f"end of turn {tokenizer.convert_ids_to_tokens(end)!r}; add {end} to eos_token_id in the "
        "model's generation_config.json (tokenratio stops there in any case)"
    )


def _shown_split(source: Source) -> str | None:
    try:
        locate(source, split="train")
    except TokenRatioError:
        return None
    return "train"


def check_text(
    rows: Sequence[SourceRow], *, preference: bool = True, columns: Columns | None = None
) -> DataReport:
    """The report on rows from `read_rows` without a tokenizer; lengths are in words.

    Args:
        preference: the rows are pairs; else fine-tuning rows.
        columns: see `SourceColumns`.
    """
    return _check([rows], EXAMPLE_TYPES["pair" if preference else "completion"], columns)[1]


def _check(
    groups: _Groups, wanted: type[Any], columns: Columns | None
) -> tuple[list[Any], DataReport]:
    rows, log = [row for group in groups for row in group], DefectLog("skip")
    parsed = parse_rows(rows, DataParser(groups, wanted, columns), log)
    return parsed.examples, DataReport.of(
        len(rows),
        [_words(example) for example in parsed.examples],
        defects=log.defects,
        warnings=[*parsed.odd, *find_warnings(parsed.examples)],
        unit="words",
        reading=parsed.reading,
    )


def _wanted(groups: _Groups, columns: Columns | None) -> type[Any] | None:
    """The type of the rows, by the columns that occur; None for neither pairs nor completions."""
    use = use_of(
        [row for rows in groups for row in SourceColumns(rows, "prompt", columns).fields()]
    )
    return None if use is None else EXAMPLE_TYPES[use]


def _words(example: AnyExample) -> dict[str, int]:
    return {side: len(plain_text(text).split()) for side, text in example.texts.items()}


def _text_row(example: AnyExample) -> str:
    lines = [f"── {printable(example.origin)}"]
    words = _words(example)
    for side, text in example.texts.items():
        plain = plain_text(text)
        shown = quoted(plain, _SHOWN)
        if not isinstance(text, str):
            shown = f"[{', '.join(turn['role'] for turn in text)}] {shown}"
        lines.append(f"  {side:<10} {words[side]} words, {len(plain)} characters: {shown}")
    if isinstance(example, PreferenceExample):
        lines.append(_shared(words["chosen"], words["rejected"], "words"))
    return "\n".join(lines)


def _encoded_row(
    row: dict[str, Any], cuts: tuple[int, ...] | None, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    sides = [name.removesuffix("_ids") for name in row if name.endswith("_ids")][1:]
    prompt, responses = row["prompt_ids"], [row[f"{side}_ids"] for side in sides]
    cuts = cuts or (0,) * (1 + len(sides))
    left = f", {cuts[0]} cut on the left" if cuts[0] else ""
    lines = [
        f"── row {row['row']} · {printable(row['origin'])}",
        f"  {'prompt':<10} {len(prompt)} tokens{left}: {_decoded(prompt, tokenizer)}",
    ]
    masks = _masks(row, sides, tokenizer)
    for side, ids, cut, mask in zip(sides, responses, cuts[1:], masks, strict=True):
        lines.append(
            f"  {side:<10} {len(ids)} tokens, {_ending(ids, cut, tokenizer)}: "
            f"{_decoded(ids, tokenizer)}"
        )
        lines.append(f"  {'':<10} boundary {_boundary(prompt, ids, tokenizer)}; mask {mask}")
    if len(responses) == 2:
        lines.append(_shared(len(responses[0]), len(responses[1]), "tokens"))
    return "\n".join(lines)


def _masks(
    row: dict[str, Any], sides: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """Where the collator's mask is True, taken from a batch as training gets it."""
    collator = PairCollator if len(sides) == 2 else CompletionCollator
    batch = collator(padding_id(tokenizer))([row])
    shown = []
    for mask, attention in zip(batch["completion_mask"], batch["attention_mask"], strict=True):
        positions = mask.nonzero().flatten().tolist()
        shown.append(f"{positions[0]}–{positions[-1]} of 0–{int(attention.sum()) - 1}")
    return shown


def _ending(ids: Sequence[int], cut: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    if cut:
        return f"no EOS ({cut} cut on the right)"
    # Training ends each response by itself: its last token is its end.
    end = ids[-1]
    is_eos = end == tokenizer.eos_token_id
    name = "EOS" if is_eos else repr(tokenizer.convert_ids_to_tokens(end))
    times = sum(token == end for token in ids)
    return f"{name} once" if times == 1 else f"{name} {times} times"


def _boundary(
    prompt: Sequence[int], response: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    before = [repr(tokenizer.decode([token])) for token in prompt[-_AROUND:]]
    after = [repr(tokenizer.decode([token])) for token in response[:_AROUND]]
    return f"{' '.join(before)} ‖ {' '.join(after)}"


def _decoded(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    # Special tokens must be visible, and clean-up would hide spaces.
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return quoted(str(text), _SHOWN)


def _shared(chosen: int, rejected: int, unit: str) -> str:
    past, total = abs(chosen - rejected), chosen + rejected
    share = past / max(1, total)
    return f"  {'T':<10} {min(chosen, rejected)} {unit}; {past} of {total} past it ({share:.1%})"
