"""The layouts of public data sets, and which of them a row has.

A layout says which columns hold a prompt, a pair or a completion, and converts a row's fields to
the canonical ones: `prompt`, `chosen`, `rejected`, `completion`, `messages`, `text`. Any prompt can
be combined with any pair or completion. The first layout with all its columns present is used.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.messages import structured, wrong_type
from tokenratio.data.rankings import (
    Fields,
    by_id,
    by_labels,
    by_order,
    by_rank,
    by_rating,
    by_score,
    by_strength,
    by_winner,
)
from tokenratio.data.template import reserved_argument
from tokenratio.records import kind_of

Use = Literal["prompt", "pair", "completion"]


@dataclass(frozen=True)
class Layout:
    """One way to hold a prompt, a pair or a completion.

    Attributes:
        use: what it holds.
        needs: required columns.
        also: optional columns.
        seen_in: data sets and tools that use it.
        read: from a row's fields to the canonical ones.
        note: explanation for the documentation, if the columns' names are not enough.
    """

    use: Use
    needs: tuple[str, ...]
    seen_in: str
    read: Callable[[Fields], dict[str, Any]]
    also: tuple[str, ...] = ()
    note: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns it reads."""
        return (*self.needs, *self.also)

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether all needed columns are among these."""
        return set(self.needs) <= set(columns)


def first_fit(layouts: Sequence[Layout], columns: Iterable[str]) -> Layout | None:
    """The first layout whose needed columns are all there."""
    columns = set(columns)
    return next((layout for layout in layouts if layout.fits(columns)), None)


# Columns that any layout may have; they make the rows conversations.
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
HISTORY_COLUMN = "history"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Whether to train on a completion (KTO).
LABEL_COLUMNS = ("label", "kto_tag")
_GOOD = frozenset(
    {True, "true", "1", "1.0", "good", "desirable", "chosen", "accepted", "thumbs_up", "yes"}
)
_BAD = frozenset(
    {
        *(False, -1, "false", "0", "0.0", "-1", "-1.0"),
        *("bad", "undesirable", "rejected", "thumbs_down", "no"),
    }
)


def _from(**columns: str) -> Callable[[Fields], dict[str, Any]]:
    """Reads our fields from the columns of these names."""
    return lambda fields: {ours: fields[column] for ours, column in columns.items()}


def _instruction(fields: Fields) -> dict[str, Any]:
    instruction, addition = fields["instruction"], fields.get("input")
    if addition is None or addition == "":
        return {"prompt": instruction}
    if not isinstance(instruction, str) or not isinstance(addition, str):
        raise RowDefectError(
            DefectKind.NON_STRING_FIELD,
            f"instruction is {kind_of(instruction)} and input {kind_of(addition)}, not strings",
        )
    return {"prompt": f"{instruction}\n{addition}" if instruction else addition}


def _first_turn(fields: Fields) -> dict[str, Any]:
    turns = structured(fields["turns"])
    return {"prompt": turns[0] if isinstance(turns, list) and turns else turns}


def _last_answer_chosen(fields: Fields) -> dict[str, Any]:
    messages = structured(fields["messages"])
    if not isinstance(messages, list) or not messages:
        raise wrong_type("messages", messages, "a list of messages")
    rejected = structured(fields["rejected_response"])
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    return {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}


def _prompt(column: str, seen_in: str, note: str = "") -> Layout:
    return Layout("prompt", (column,), seen_in, _from(prompt=column), note=note)


def _pair(chosen: str, rejected: str, seen_in: str, note: str = "") -> Layout:
    read = _from(chosen=chosen, rejected=rejected)
    return Layout("pair", (chosen, rejected), seen_in, read, note=note)


def _completion(column: str, seen_in: str, ours: str = "completion", note: str = "") -> Layout:
    return Layout("completion", (column,), seen_in, _from(**{ours: column}), note=note)


PROMPTS: tuple[Layout, ...] = (
    _prompt("prompt", "TRL, Axolotl, UltraFeedback"),
    Layout(
        "prompt",
        ("instruction",),
        "Alpaca, LLaMA-Factory, AlpacaEval, argilla",
        _instruction,
        also=("input",),
        note="and input on a new line",
    ),
    _prompt("question", "Intel/orca_dpo_pairs, Axolotl"),
    _prompt("query", "ms-swift"),
    _prompt("input", "distilabel; OpenAI's preference format", "text or messages"),
    _prompt("context", "nvidia/HelpSteer3"),
    _prompt("messages", "Axolotl chat_template"),
    _prompt("conversations", "LLaMA-Factory sharegpt"),
    _prompt("conversation", "lmsys"),
)

BENCHMARK_TURNS = Layout(
    "prompt", ("turns",), "MT-Bench", _first_turn, note="the first; for generation only"
)

PAIRS: tuple[Layout, ...] = (
    _pair("chosen", "rejected", "TRL, LLaMA-Factory, Axolotl, Anthropic/hh-rlhf"),
    _pair("chosen_response", "rejected_response", "argilla, Axolotl chatml.argilla"),
    _pair("response", "rejected_response", "ms-swift"),
    Layout(
        "pair",
        ("messages", "rejected_response"),
        "ms-swift",
        _last_answer_chosen,
        note="the last turn of messages is chosen, those before are the prompt",
    ),
    _pair(
        "messages",
        "rejected_messages",
        "ms-swift",
        "whole conversations, of which the prompt is what both begin with",
    ),
    _pair("preferred_output", "non_preferred_output", "OpenAI's preference format"),
    _pair("response_j", "response_k", "lvwerra/stack-exchange-paired"),
    Layout("pair", ("answers",), "berkeley-nest/Nectar", by_rank, note="best and worst by rank"),
    Layout("pair", ("generations", "order"), "argilla/distilabel", by_order, note="as order says"),
    *(
        Layout(
            "pair",
            ("generations", name),
            "argilla/distilabel",
            by_rating(name),
            note=f"best and worst by {name}",
        )
        for name in ("ratings", "rating", "scores")
    ),
    Layout(
        "pair",
        ("completions",),
        "openbmb/UltraFeedback",
        by_score,
        note="best and worst by overall_score or score",
    ),
    *(
        Layout("pair", ("response_0", "response_1", name), "PKU-Alignment/PKU-SafeRLHF", by_id)
        for name in ("better_response_id", "safer_response_id")
    ),
    Layout(
        "pair",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        "stanfordnlp/SHP",
        by_labels,
        note="history is the prompt; labels 1 prefers A",
    ),
    *(
        Layout("pair", names, seen_in, by_strength(*names), note="below 0 prefers the first")
        for names, seen_in in (
            (("response_1", "response_2", "preference_strength"), "nvidia/HelpSteer2"),
            (("response1", "response2", "overall_preference"), "nvidia/HelpSteer3"),
        )
    ),
    *(
        Layout("pair", (a, b, "winner"), "lmsys arena", by_winner(a, b), note="ties are refused")
        for a, b in (("conversation_a", "conversation_b"), ("response_a", "response_b"))
    ),
)

_LAST_TURN = "the last turn is trained on"
COMPLETIONS: tuple[Layout, ...] = (
    _completion("completion", "TRL"),
    _completion("messages", "TRL, OpenAI, ms-swift", "messages", _LAST_TURN),
    _completion("text", "TRL", "text", "all of it is trained on"),
    _completion(
        "chosen", "preference rows of any layout", "chosen", "the chosen side is trained on"
    ),
    _completion("conversations", "ShareGPT, LLaMA-Factory", "messages", _LAST_TURN),
    _completion("conversation", "lmsys, LDJnr/Capybara", "messages", _LAST_TURN),
    _completion("output", "Alpaca, LLaMA-Factory"),
    _completion("response", "ms-swift, OpenOrca"),
    _completion("answer", "question and answer sets"),
)


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


def verdict(value: object) -> bool | None:
    """The meaning of a completion's label: good (True), bad (False) or unknown (None).

    >>> verdict(True), verdict("False"), verdict("undesirable"), verdict("sports")
    (True, False, False, None)
    """
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float):
        return None
    return True if key in _GOOD else False if key in _BAD else None


def system_of(fields: Mapping[str, Any]) -> str | None:
    """The system prompt of a row; None if missing or empty."""
    name = next((name for name in SYSTEM_COLUMNS if name in fields), None)
    value = None if name is None else fields[name]
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    raise wrong_type(str(name), value, "a string")


def template_kwargs_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own arguments of the chat template."""
    options = structured(fields.get("chat_template_kwargs")) or {}
    if not isinstance(options, dict):
        raise wrong_type("chat_template_kwargs", options, "an object", DefectKind.MALFORMED_ROW)
    # Arrow gives every row the keys of all rows, with null where a row had none.
    options = {name: value for name, value in options.items() if value is not None}
    if reason := reserved_argument(options):
        raise RowDefectError(DefectKind.MALFORMED_ROW, reason)
    return options


def tools_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The schemas of the row's tools; None if it has none."""
    tools = structured(fields.get("tools"))  # often text, since Arrow wants one type per column
    if isinstance(tools, str) and tools.strip():
        raise RowDefectError(DefectKind.MALFORMED_ROW, "tools is a string that is not JSON")
    if not tools or isinstance(tools, str):
        return None
    if not isinstance(tools, list):
        raise wrong_type("tools", tools, "a list of schemas", DefectKind.MALFORMED_ROW)
    return tools
