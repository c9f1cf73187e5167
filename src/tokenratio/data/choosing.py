"""Choosing the layout of a row by its columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenratio.data.layouts import (
    BENCHMARK_TURNS,
    COMPLETIONS,
    HISTORY_COLUMN,
    PAIRS,
    PROMPTS,
    Layout,
    Use,
    first_fit,
)
from tokenratio.data.messages import structured

# Columns of whole conversations.
_CONVERSATIONS = {
    *("messages", "rejected_messages", "conversations"),
    *("conversation", "conversation_a", "conversation_b"),
}


@dataclass(frozen=True)
class Choice:
    """The layouts of a row.

    Attributes:
        prompt: None if the responses contain the prompt.
        responses: None if the row has neither a pair nor a completion.
        clash: several columns that could each hold the prompt.
    """

    prompt: Layout | None
    responses: Layout | None
    clash: tuple[Layout, ...] = ()


def choose(use: Use, fields: Mapping[str, Any]) -> Choice:
    """The layouts of a row: by its columns that are not null, else by all of its columns."""
    present = frozenset(name for name, value in fields.items() if value is not None)
    return _choose(use, present, frozenset(fields))


@lru_cache(maxsize=256)
def _choose(use: Use, present: frozenset[str], there: frozenset[str]) -> Choice:
    responses = _responses_layout(use, present) or _responses_layout(use, there)
    if responses is not None and _holds_prompt(responses):
        return Choice(None, responses)
    taken = set() if responses is None else set(responses.columns)
    prompts = PROMPTS if use != "prompt" else (*PROMPTS, BENCHMARK_TURNS)
    free = [layout for layout in prompts if not taken & set(layout.needs)]
    if "prompt" in there:
        return Choice(free[0], responses)
    for columns in (present, there):
        fitting = [layout for layout in free if layout.fits(columns)]
        parts = {name for layout in fitting for name in layout.also}
        fitting = [layout for layout in fitting if not parts & set(layout.needs)]
        if len(fitting) > 1:
            return Choice(None, responses, tuple(fitting))
        if fitting:
            return Choice(fitting[0], responses)
    return Choice(None, responses)


def _holds_prompt(responses: Layout) -> bool:
    needs = set(responses.needs)
    if responses.use == "completion":
        return bool(needs & {*_CONVERSATIONS, "text"})
    return HISTORY_COLUMN in needs or bool(needs & _CONVERSATIONS)


def _responses_layout(use: Use, columns: frozenset[str]) -> Layout | None:
    if use == "prompt":
        return None
    pair = first_fit(PAIRS, columns)
    if use == "pair":
        return pair
    alone = first_fit(COMPLETIONS, columns)
    if pair is None or alone is None:
        return alone or pair
    is_prompt = alone.needs == ("messages",) and "prompt" not in columns
    plain = alone.needs in (("completion",), ("messages",), ("text",)) and not is_prompt
    return alone if plain else pair


def holds_prompt(found: Mapping[str, Any]) -> bool:
    """Whether the responses are conversations that begin before the assistant's turn."""
    values = [structured(found.get(name)) for name in ("chosen", "rejected")]
    return all(
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and (value[0].get("role") or value[0].get("from")) in ("system", "user", "human")
        for value in values
    )


def clash_text(layouts: Sequence[Layout]) -> str:
    """The message about several columns that could each hold the prompt."""
    names = [layout.needs[0] for layout in layouts]
    return (
        f"{' and '.join(names)} could each hold the prompt; set columns, for example "
        f"{{prompt: {names[0]}}}, or {{prompt: [{', '.join(names)}]}} to join them"
    )


def use_of(rows: Sequence[Mapping[str, Any]]) -> Use | None:
    """The use of rows, by their columns; None if they are not training data."""
    there = {name for fields in rows for name in fields}
    if not there or there & {"chosen", "rejected"} or _most(PAIRS, rows):
        return "pair"
    if there & {"completion", "messages", "text", "conversations"}:
        return "completion"
    return "completion" if _most(COMPLETIONS, rows) and _most(PROMPTS, rows) else None


def _most(layouts: Sequence[Layout], rows: Sequence[Mapping[str, Any]]) -> bool:
    return 2 * sum(first_fit(layouts, fields) is not None for fields in rows) > len(rows)
