"""The layouts of public data sets: which columns hold the prompt, the pair, the response.

A layout names the columns it needs and turns a row's fields into the few that the rest of the
library knows: `prompt`, `chosen`, `rejected`, `completion`, `messages`, `text`. The three tables
are independent: any prompt can be combined with any pair or completion. The first layout of a
table whose columns are all present is used.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.messages import kind_of, structured
from tokenratio.data.preferences import (
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

Use = Literal["prompt", "pair", "completion"]


@dataclass(frozen=True)
class Layout:
    """One way to hold a prompt, a pair or a completion.

    Attributes:
        use: what it holds.
        needs: columns that must be there.
        also: columns it reads where they are there.
        seen_in: data sets and tools that have it.
        read: from a row's fields to the canonical ones.
        note: how, in the words of the documentation, where the columns' names do not say it.
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


# Columns that any layout may have besides; they make a conversation of it.
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
HISTORY_COLUMN = "history"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Whether a completion is to be trained on (KTO).
LABEL_COLUMNS = ("label", "kto_tag")


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
        raise RowDefectError(
            DefectKind.NON_STRING_FIELD, f"messages is {kind_of(messages)}, not a list of messages"
        )
    rejected = structured(fields["rejected_response"])
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    return {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}


PROMPTS: tuple[Layout, ...] = (
    Layout("prompt", ("prompt",), "TRL, Axolotl, UltraFeedback", _from(prompt="prompt")),
    Layout(
        "prompt",
        ("instruction",),
        "Alpaca, LLaMA-Factory, AlpacaEval, argilla",
        _instruction,
        also=("input",),
        note="and input on a new line",
    ),
    Layout("prompt", ("question",), "Intel/orca_dpo_pairs, Axolotl", _from(prompt="question")),
    Layout("prompt", ("query",), "ms-swift", _from(prompt="query")),
    Layout(
        "prompt",
        ("input",),
        "distilabel; OpenAI's preference format",
        _from(prompt="input"),
        note="text or messages",
    ),
    Layout("prompt", ("context",), "nvidia/HelpSteer3", _from(prompt="context")),
    Layout("prompt", ("messages",), "Axolotl chat_template", _from(prompt="messages")),
    Layout("prompt", ("conversations",), "LLaMA-Factory sharegpt", _from(prompt="conversations")),
    Layout("prompt", ("conversation",), "lmsys", _from(prompt="conversation")),
)

BENCHMARK_TURNS = Layout(
    "prompt",
    ("turns",),
    "MT-Bench",
    _first_turn,
    note="the first; for generation only",
)

PAIRS: tuple[Layout, ...] = (
    Layout(
        "pair",
        ("chosen", "rejected"),
        "TRL, LLaMA-Factory, Axolotl, Anthropic/hh-rlhf",
        _from(chosen="chosen", rejected="rejected"),
    ),
    Layout(
        "pair",
        ("chosen_response", "rejected_response"),
        "argilla, Axolotl chatml.argilla",
        _from(chosen="chosen_response", rejected="rejected_response"),
    ),
    Layout(
        "pair",
        ("response", "rejected_response"),
        "ms-swift",
        _from(chosen="response", rejected="rejected_response"),
    ),
    Layout(
        "pair",
        ("messages", "rejected_response"),
        "ms-swift",
        _last_answer_chosen,
        note="the last turn of messages is chosen, those before are the prompt",
    ),
    Layout(
        "pair",
        ("messages", "rejected_messages"),
        "ms-swift",
        _from(chosen="messages", rejected="rejected_messages"),
        note="whole conversations, of which the prompt is what both begin with",
    ),
    Layout(
        "pair",
        ("preferred_output", "non_preferred_output"),
        "OpenAI's preference format",
        _from(chosen="preferred_output", rejected="non_preferred_output"),
    ),
    Layout(
        "pair",
        ("response_j", "response_k"),
        "lvwerra/stack-exchange-paired",
        _from(chosen="response_j", rejected="response_k"),
    ),
    Layout("pair", ("answers",), "berkeley-nest/Nectar", by_rank, note="best and worst by rank"),
    Layout(
        "pair",
        ("generations", "order"),
        "argilla/distilabel",
        by_order,
        note="as order says",
    ),
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
    Layout(
        "pair",
        ("response_1", "response_2", "preference_strength"),
        "nvidia/HelpSteer2",
        by_strength("response_1", "response_2", "preference_strength"),
        note="below 0 prefers the first",
    ),
    Layout(
        "pair",
        ("response1", "response2", "overall_preference"),
        "nvidia/HelpSteer3",
        by_strength("response1", "response2", "overall_preference"),
        note="below 0 prefers the first",
    ),
    *(
        Layout("pair", (a, b, "winner"), "lmsys arena", by_winner(a, b), note="ties are refused")
        for a, b in (("conversation_a", "conversation_b"), ("response_a", "response_b"))
    ),
)

COMPLETIONS: tuple[Layout, ...] = (
    Layout("completion", ("completion",), "TRL", _from(completion="completion")),
    Layout(
        "completion",
        ("messages",),
        "TRL, OpenAI, ms-swift",
        _from(messages="messages"),
        note="the last turn is trained on",
    ),
    Layout("completion", ("text",), "TRL", _from(text="text"), note="all of it is trained on"),
    Layout(
        "completion",
        ("chosen",),
        "preference rows of any layout",
        _from(chosen="chosen"),
        note="the chosen side is trained on",
    ),
    Layout(
        "completion",
        ("conversations",),
        "ShareGPT, LLaMA-Factory",
        _from(messages="conversations"),
        note="the last turn is trained on",
    ),
    Layout(
        "completion",
        ("conversation",),
        "lmsys, LDJnr/Capybara",
        _from(messages="conversation"),
        note="the last turn is trained on",
    ),
    Layout("completion", ("output",), "Alpaca, LLaMA-Factory", _from(completion="output")),
    Layout("completion", ("response",), "ms-swift, OpenOrca", _from(completion="response")),
    Layout("completion", ("answer",), "question and answer sets", _from(completion="answer")),
)


def markdown_tables() -> str:
    """The tables of docs/data.md."""
    titles = {"prompt": "Prompt", "pair": "Pair", "completion": "Response (for `sft`)"}
    parts = []
    for layouts in ((*PROMPTS, BENCHMARK_TURNS), PAIRS, COMPLETIONS):
        lines = [f"| {titles[layouts[0].use]} | | seen in |", "|---|---|---|"]
        for layout in layouts:
            columns = ", ".join(f"`{name}`" for name in layout.needs)
            columns += "".join(f" (+ `{name}`)" for name in layout.also)
            lines.append(f"| {columns} | {layout.note} | {layout.seen_in} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
