"""The shapes preference and fine-tuning rows come in, brought to one.

These are TRL's formats: standard (strings) and conversational (lists of `{"role", "content"}`),
with an explicit or an implicit prompt, and the mixture UltraFeedback uses (a string beside whole
conversations).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.files import SourceRow

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = "str | list[Message]"

# A template skips an unknown role in silence, and the turn with it.
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class PreferenceExample:
    """A pair: all three texts are strings, or all three are lists of messages.

    Attributes:
        origin: where the row stands (`SourceRow.origin`).
        prompt: what both responses answer; may be the empty string.
        chosen, rejected: the responses alone, without the prompt.
        tools: JSON schemas given to the chat template.
        template_kwargs: what the row asks of the template besides (`chat_template_kwargs`).
    """

    origin: str
    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompletionExample:
    """A prompt and the one response to learn; both strings or both lists of messages."""

    origin: str
    prompt: Text
    completion: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def parse_preference(row: SourceRow) -> PreferenceExample:
    """Read a preference row: `{"chosen", "rejected"}` with or without `"prompt"`.

    Raises:
        RowDefectError: the row has none of the formats; says which column is why.
    """
    fields = _readable(row)
    prompt, chosen, rejected = _resolve(fields, ("chosen", "rejected"))
    return PreferenceExample(
        row.origin, prompt, chosen, rejected, tools_of(fields), template_kwargs_of(fields)
    )


def parse_completion(row: SourceRow) -> CompletionExample:
    """Read a fine-tuning row.

    `{"prompt", "completion"}`; `{"text"}` (all of it is learnt, the prompt is empty);
    `{"messages"}` (the last turn is learnt, those before are the prompt); or a preference row, of
    which chosen is learnt.

    Raises:
        RowDefectError: the row has none of the formats; says which column is why.
    """
    fields = _readable(row)
    tools = tools_of(fields)
    if "completion" in fields:
        prompt, completion = _resolve(fields, ("completion",))
    elif "messages" in fields:
        messages = _text(fields, "messages")
        if isinstance(messages, str):
            raise RowDefectError(
                DefectKind.MIXED_FORMAT, "messages is a string, not a list of messages"
            )
        prompt, completion = messages[:-1], messages[-1:]
        _check_turns(prompt, [completion])
    elif "text" in fields:
        prompt, completion = "", _text(fields, "text")
        if not isinstance(completion, str):
            raise RowDefectError(
                DefectKind.NON_STRING_FIELD, "text is a list; call the column messages"
            )
    elif "chosen" in fields:
        whole = "prompt" not in fields or (
            isinstance(fields["chosen"], list) and "rejected" in fields
        )
        names = ("chosen", "rejected") if whole else ("chosen",)
        prompt, completion, *_ = _resolve(fields, names)
    else:
        wanted = "prompt and completion, text, messages, or prompt, chosen and rejected"
        raise RowDefectError(
            DefectKind.MISSING_COLUMN, f"it needs {wanted}; it has {sorted(fields)}"
        )
    return CompletionExample(row.origin, prompt, completion, tools, template_kwargs_of(fields))


def extract_prompt(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """The length of the implicit prompt: what both sides begin with (characters or messages).

    TRL's rule: a space before the first difference belongs to the responses, and where one side is
    the beginning of the other, its last element is still its response.

    >>> extract_prompt("The sky is blue.", "The sky is green.")
    10
    """
    shorter = min(len(chosen), len(rejected))
    if not shorter:
        return 0
    pairs = zip(chosen, rejected, strict=False)
    length = next((index for index, (a, b) in enumerate(pairs) if a != b), shorter - 1)
    differs = chosen[length] != rejected[length]
    return length - 1 if differs and length and chosen[length - 1] == " " else length


def _readable(row: SourceRow) -> dict[str, Any]:
    if row.problem is not None:
        raise RowDefectError(DefectKind.MALFORMED_ROW, row.problem)
    return row.fields


def _resolve(fields: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """`[prompt, *responses]`: all strings, or all lists of messages."""
    missing = [name for name in names if name not in fields]
    if missing:
        raise RowDefectError(
            DefectKind.MISSING_COLUMN, f"no {' and no '.join(missing)}; it has {sorted(fields)}"
        )
    responses = [_text(fields, name) for name in names]
    conversational = isinstance(responses[0], list)
    if any(isinstance(response, list) != conversational for response in responses):
        raise RowDefectError(
            DefectKind.MIXED_FORMAT,
            f"of {' and '.join(names)} one is a string, one a list of messages",
        )
    if "prompt" not in fields:
        return _split_implicit(responses)
    prompt = _text(fields, "prompt")
    if isinstance(prompt, list) != conversational:
        if not conversational:
            raise RowDefectError(
                DefectKind.MIXED_FORMAT, f"prompt is a list of messages, {names[0]} a string"
            )
        return _split_mixed(prompt, responses)
    if conversational:
        _check_turns(prompt, responses)
    return [prompt, *responses]


def _split_implicit(responses: list[Any]) -> list[Any]:
    if len(responses) == 1:
        raise RowDefectError(DefectKind.MISSING_COLUMN, "no prompt")
    if any(not response for response in responses):
        raise RowDefectError(DefectKind.BLANK_RESPONSE, "a response is empty")
    if responses[0] == responses[1]:
        # Said here: where nothing differs, nothing tells the prompt from the responses.
        raise RowDefectError(DefectKind.IDENTICAL_PAIR, "chosen and rejected are the same")
    length = extract_prompt(*responses)
    prompt, *rest = responses[0][:length], *(response[length:] for response in responses)
    if isinstance(prompt, list):
        _check_turns(prompt, rest)
    return [prompt, *rest]


def _split_mixed(prompt: str, responses: list[Any]) -> list[Any]:
    """A prompt string beside messages: answers alone, or whole conversations that hold it."""
    if all(response[0]["role"] == "assistant" for response in responses if response):
        turns = [{"role": "user", "content": prompt}]
        _check_turns(turns, responses)
        return [turns, *responses]
    if len(responses) == 1:
        turns, rest = responses[0][:-1], [responses[0][-1:]]
        _check_turns(turns, rest)
    else:
        turns, *rest = _split_implicit(responses)
    said = [turn.get("content", "").strip() for turn in turns if turn["role"] == "user"]
    if prompt.strip() not in said:
        raise RowDefectError(
            DefectKind.MIXED_FORMAT, "the prompt column is no user turn of the conversation"
        )
    return [turns, *rest]


def _text(fields: dict[str, Any], name: str) -> Text:
    value = fields[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise RowDefectError(
            DefectKind.NON_STRING_FIELD, f"{name} is {kind}, not a string or messages"
        )
    return [_message(item, f"message {number} of {name}") for number, item in enumerate(value, 1)]


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowDefectError(
            DefectKind.NON_STRING_FIELD, f"{where} is a {type(item).__name__}, not an object"
        )
    # Arrow fills the keys a message lacks with null; templates take them for present.
    message = {key: value for key, value in item.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowDefectError(
            DefectKind.BAD_CONVERSATION,
            f"the role of {where} is {role!r}, not one of {list(ROLES)}",
        )
    if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        kind = "null" if content is None else f"a {type(content).__name__}"
        raise RowDefectError(
            DefectKind.NON_STRING_FIELD, f"the content of {where} is {kind}, not a string"
        )
    return message


def _check_turns(prompt: list[Message], responses: list[list[Message]]) -> None:
    if not prompt:
        raise RowDefectError(DefectKind.BAD_CONVERSATION, "the prompt has no message")
    for response in responses:
        for turn in response:
            # Every token of a response is trained on, as an action of the policy.
            if turn["role"] != "assistant":
                raise RowDefectError(
                    DefectKind.BAD_CONVERSATION,
                    f"a response holds a turn of {turn['role']!r}; only 'assistant' is learnt",
                )


def template_kwargs_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a row tells the chat template besides its messages.

    Raises:
        RowDefectError: `chat_template_kwargs` is no object.
    """
    options = fields.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise RowDefectError(
            DefectKind.MALFORMED_ROW,
            f"chat_template_kwargs is a {type(options).__name__}, not an object",
        )
    # Arrow gives every row the keys of all rows, with null where a row had none.
    return {name: value for name, value in options.items() if value is not None}


def tools_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The row's tools, JSON schemas; None where it has none.

    Raises:
        RowDefectError: `tools` is neither a list nor the JSON of one.
    """
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)  # often stored as text, since Arrow wants one type per column
        except ValueError as error:
            raise RowDefectError(
                DefectKind.MALFORMED_ROW, f"tools is a string that is not JSON: {error}"
            ) from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowDefectError(
            DefectKind.MALFORMED_ROW, f"tools is a {type(tools).__name__}, not a list of schemas"
        )
    return tools
