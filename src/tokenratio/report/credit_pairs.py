"""The pairs of an inspection: where they come from, and how they are shown."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokenratio.data import PreparedData
from tokenratio.data.selection import Selection
from tokenratio.data.sources import Source, locate
from tokenratio.data.worlds import is_world_source, world_of
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.credit_measures import true_values
from tokenratio.evaluation.inputs import Subject
from tokenratio.models.token_rows import TokenRow
from tokenratio.models.token_values import Array
from tokenratio.report.credit_data import SIDES, InspectedPair, InspectedSide
from tokenratio.report.credit_options import InspectOptions
from tokenratio.report.credit_text import TokenTexts

_AS_IT_IS = {"clean_up_tokenization_spaces": False}
_VALUES = {"credit": "true advantage", "word_credit": "word's contribution"}


def chosen_source(
    options: InspectOptions, subject: Subject
) -> tuple[Source, dict[str, Any], list[str]]:
    """The pairs; which of them, as arguments of `prepare_pairs`; and notes."""
    chosen = Selection(max_samples=options.num_pairs)
    if options.data is not None:
        split = options.split or _existing_split(options.data)
        return options.data, {"split": split, "columns": options.columns, "selection": chosen}, []
    recorded, lost = subject.data
    if not recorded:
        raise TokenRatioError(
            f"{subject.path} did not record data that can be read again: give --data"
        )
    config = subject.config
    share = config.get("held_out_share")
    if share is not None:
        chosen = replace(
            chosen,
            held_out_share=share,
            part="held_out",
            seed=config.get("selection_seed") or 0,
        )
    how = {
        "split": options.split,
        "columns": options.columns or config.get("columns"),
        "selection": chosen,
    }
    if options.split is not None:
        recorded = [
            each if is_world_source(each.path) else replace(each, split=None) for each in recorded
        ]
    notes = [f"pairs of {each} are not shown: it cannot be read again" for each in lost]
    return recorded[0] if len(recorded) == 1 else recorded, how, notes


def _existing_split(source: str) -> str | None:
    for split in ("test", "train"):
        try:
            locate(source, split=split)
        except TokenRatioError:
            continue
        return split
    return None


def inspected_pairs(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, world: str
) -> tuple[list[InspectedPair], TokenTexts, str | None, list[str]]:
    """The pairs as they are shown, the name of what a world knows of them, and notes."""
    ends = {tokenizer.eos_token_id, data.turn_end} - {None}
    texts = TokenTexts(tokenizer, ends)
    rows = list(data.dataset)
    responses = [
        TokenRow(tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"]))
        for row in rows
        for side in SIDES
    ]
    known, value_name, notes = _known(world, tokenizer, responses)
    prompts, plain = (
        [
            str(tokenizer.decode(list(row["prompt_ids"]), skip_special_tokens=skips, **_AS_IT_IS))
            for row in rows
        ]
        for skips in (False, True)
    )
    titles, pairs = own_lines(plain), []
    for index, row in enumerate(rows):
        cuts = data.cuts.get(row["row"], (0, 0, 0))
        sides = []
        for number, side_cut in enumerate(cuts[1:]):
            place = 2 * index + number
            ids = responses[place].response_ids
            value = None if known is None else known[place]
            sides.append(InspectedSide(responses[place], texts.of_response(ids), side_cut, value))
        pairs.append(InspectedPair(row["origin"], titles[index], prompts[index], cuts[0], *sides))
    return pairs, texts, value_name, notes


def own_lines(texts: Sequence[str]) -> list[str]:
    """The lines of each text between those that all begin with and those that all end with.

    A system prompt and the marks of turns are in every prompt, and would fill a list.

    >>> own_lines(["be kind\\nwhy?\\nanswer:", "be kind\\nhow, and when?\\nanswer:"])
    ['why?', 'how, and when?']
    """
    split = [[line for line in text.splitlines() if line.strip()] for text in texts]
    shortest = min(map(len, split))
    if len({*texts}) < 2 or not shortest:
        return list(texts)
    front = _num_alike(split, range(shortest - 1))
    back = _num_alike(split, range(-1, front - shortest, -1))
    return ["\n".join(lines[front : len(lines) - back]) for lines in split]


def _num_alike(split: Sequence[Sequence[str]], places: Sequence[int]) -> int:
    """At how many of these places, from the first on, all have the same line."""
    return next(
        (n for n, place in enumerate(places) if len({lines[place] for lines in split}) > 1),
        len(places),
    )


def _known(
    world: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]
) -> tuple[list[Array] | None, str | None, list[str]]:
    """What a world knows of the tokens, named by a world or one of its sources."""
    if not is_world_source(world):
        return None, None, []
    try:
        group, known = true_values(world_of(world), tokenizer, rows)
    except TokenRatioError as error:
        return None, None, [f"what the tokens are worth is not shown: {error}"]
    return known["advantage"], _VALUES[group], []


def notes_on(data: PreparedData) -> list[str]:
    """What is not shown of the data, and what of it was cut."""
    report, notes = data.report, []
    if refused := report.rows_read - report.rows_kept:
        reasons = ", ".join(f"{kind} {num}" for kind, num in report.defect_counts.items())
        notes.append(f"{refused} of {report.rows_read} pairs cannot be used ({reasons})")
    if cut := {side: t.rows for side, t in report.truncated.items() if t.rows}:
        listed = ", ".join(f"{side} in {num}" for side, num in cut.items())
        notes.append(f"cut at the length limits: {listed} of {report.rows_kept} pairs")
    return notes
