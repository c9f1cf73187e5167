"""Checks of parsed rows, and warnings about those that are kept."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from tokenratio.data.defects import Defect, DefectKind, DefectLog, RowDefectError, WarningKind
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import AnyExample, DataParser, Example, PreferenceExample
from tokenratio.data.messages import Text
from tokenratio.data.summary import Reading

_SURROGATE = re.compile("[\ud800-\udfff]")
_CHARACTERS = {
    WarningKind.REPLACEMENT_CHARACTER: re.compile("\ufffd"),
    WarningKind.CARRIAGE_RETURN: re.compile("\r"),
    WarningKind.CONTROL_CHARACTER: re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
}
# Anthropic's HH and its descendants keep a whole dialogue in one string.
_TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class ParsedRows(Generic[Example]):
    """The usable rows of a source in its order, the warnings about them, and how they were read."""

    examples: list[Example]
    odd: list[Defect]
    reading: Reading


def parse_rows(
    rows: Sequence[SourceRow], parser: DataParser[Example], log: DefectLog
) -> ParsedRows[Example]:
    """Parse and check rows of the parser's; those that cannot be used go to `log`."""
    kept: list[Example] = []
    odd: list[Defect] = []
    for row in rows:
        try:
            example = parser.parse(row)
            check_example(example)
        except RowDefectError as error:
            log.refuse(row.origin, error)
        else:
            kept.append(example)
            odd += parser.oddities(row)
    return ParsedRows(kept, odd, parser.reading(rows))


def check_example(example: AnyExample) -> None:
    """Refuse blank responses, pairs of identical ones, and text that is not Unicode."""
    for side, response in example.responses.items():
        calls = not isinstance(response, str) and any(turn.get("tool_calls") for turn in response)
        text = plain_text(response)
        if not text.strip() and not calls:
            detail = f"{side} is {'only whitespace' if text else 'empty'}"
            raise RowDefectError(DefectKind.BLANK_RESPONSE, detail)
    if isinstance(example, PreferenceExample) and example.chosen == example.rejected:
        raise RowDefectError(DefectKind.IDENTICAL_PAIR, "chosen and rejected are the same")
    for side, part in example.texts.items():
        if found := _SURROGATE.search(plain_text(part)):
            detail = f"{side} holds the lone surrogate {found[0]!r}"
            raise RowDefectError(DefectKind.UNENCODABLE_TEXT, detail)


def plain_text(text: Text) -> str:
    """A text as one string: the contents of its messages, a blank line between two."""
    if isinstance(text, str):
        return text
    return "\n\n".join(turn.get("content", "") for turn in text)


def find_warnings(examples: Sequence[AnyExample]) -> list[Defect]:
    """All warnings about the rows that are kept.

    A row that repeats an earlier one is a duplicate. Other rows are contradictory if the same
    prompt has the same responses with the labels swapped; both rows count.
    """
    return [*_repetitions(examples), *(odd for example in examples for odd in _oddities(example))]


def _repetitions(examples: Sequence[AnyExample]) -> Iterator[Defect]:
    first: dict[bytes, str] = {}
    mirrors: list[tuple[str, bytes]] = []
    for example in examples:
        sides = list(example.responses.values())
        context = [example.prompt, example.tools, example.template_kwargs]
        key = _key([*context, *sides])
        if key in first:
            yield Defect(example.origin, WarningKind.DUPLICATE_ROW, f"the same as {first[key]}")
            continue
        first[key] = example.origin
        if len(sides) == 2:
            mirrors.append((example.origin, _key([*context, *reversed(sides)])))
    for origin, mirror in mirrors:
        if mirror in first:
            detail = f"the other way round in {first[mirror]}"
            yield Defect(origin, WarningKind.CONTRADICTORY_PAIR, detail)


def _key(parts: list[Any]) -> bytes:
    canonical = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=16).digest()


def _oddities(example: AnyExample) -> Iterator[Defect]:
    roles = (_same_role(example, text) for text in example.responses.values())
    role = next(filter(None, roles), None)
    if role:
        detail = f"two turns of {role!r} in a row"
        yield Defect(example.origin, WarningKind.SAME_ROLE_TURNS, detail)
    for kind, pattern in _CHARACTERS.items():
        sides = [side for side, text in example.texts.items() if pattern.search(plain_text(text))]
        if sides:
            yield Defect(example.origin, kind, f"in {' and '.join(sides)}")


def _same_role(example: AnyExample, response: Text) -> str | None:
    """The role of the first two turns in a row that share one, over prompt and response."""
    if isinstance(example.prompt, str):
        # Only in a transcript: other responses may quote "Human:".
        roles = []
        if isinstance(response, str) and _TRANSCRIPT_TURN.search(example.prompt):
            roles = _TRANSCRIPT_TURN.findall(example.prompt + response)
    else:
        roles = [turn["role"] for turn in [*example.prompt, *response]]
    # Several tools may answer one call.
    return next((a for a, b in itertools.pairwise(roles) if a == b != "tool"), None)
