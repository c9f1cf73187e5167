"""The items of a JSON array, one by one: what is wrong with one does not lose the others."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.records import MAX_DEPTH, repeated_key

_SPACE = re.compile(r"[ \t\n\r]*")
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def array_items(text: str, begin: int, name: str) -> Iterator[tuple[Any, str | None]]:
    """`(value, fault)` of each item of the array at `begin`; fault: why it cannot be used.

    Raises:
        TokenRatioError: after an item the text is not JSON, so no further item can be found.
    """
    faults: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            faults.append(f"not readable JSON: {repeated_key(pairs)}")
        return found

    def whole(digits: str) -> int:
        try:
            return int(digits)
        except ValueError as error:  # thousands of digits
            faults.append(f"not readable JSON: {error}")
            return 0

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_int=whole)
    at = _after_space(text, begin + 1)
    is_first = True
    while not (is_first and text.startswith("]", at)):
        is_first = False
        faults.clear()
        try:
            value, at = decoder.raw_decode(text, at)
        except RecursionError:
            value, at = None, _end_of_item(text, at, name)
            faults.append(f"not readable JSON: it is nested more than {MAX_DEPTH} levels deep")
        except ValueError as error:
            raise TokenRatioError(f"{name}: not JSON: {error}.") from error
        yield value, faults[0] if faults else None
        at = _after_space(text, at)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise _not_json("Expecting ',' delimiter", text, at, name)
        at = _after_space(text, at + 1)
    at = _after_space(text, at + 1)
    if at < len(text):
        raise _not_json("Extra data", text, at, name)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _end_of_item(text: str, at: int, name: str) -> int:
    """Where the array or object that begins at `at` ends."""
    depth = 0
    for found in _BRACKET.finditer(text, at):
        if found[0][0] in "[{":
            depth += 1
        elif found[0][0] in "]}":
            depth -= 1
        if depth == 0:
            return found.end()
    raise _not_json("Unterminated item", text, at, name)


def _not_json(fault: str, text: str, at: int, name: str) -> TokenRatioError:
    return TokenRatioError(f"{name}: not JSON: {json.JSONDecodeError(fault, text, at)}.")
