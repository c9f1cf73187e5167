"""Conversations in the forms that data sets use, converted to `{"role", "content"}` messages."""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.records import kind_of, parse_json, structure_fault

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]

# Templates silently skip turns with an unknown role.
ROLES = ("system", "developer", "user", "assistant", "tool")
# Names of the same roles in ShareGPT, LLaMA-Factory, ms-swift and older data sets.
_ROLE_NAMES = {
    **{name: name for name in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
    **dict.fromkeys(
        ("function", "observation", "ipython", "function_response", "tool_response"), "tool"
    ),
}
# Python's own text of a conversation, as pandas and NumPy write it to CSV.
_PYTHON_TEXT_LIMIT = 1_000_000
# NumPy, and with it `Dataset.to_csv`, puts a line end and no comma between the items of a list. A
# line end inside a text is written "\\n" there.
_NO_COMMA = re.compile(r"\}\n\s*\{")


def text_or_messages(value: object, name: str) -> Text:
    """A column's value as a text or a list of messages.

    Supported: a text; a list of messages (`role` and `content`, or ShareGPT's `from` and `value`);
    a single message; a list of `{"input", "output"}` exchanges.

    Raises:
        RowDefectError: the value is something else; `name` is the column.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and _is_message(value):
        value = [value]
    if not isinstance(value, list | tuple):
        raise wrong_type(name, value, "a string or messages")
    if value and all(map(_is_exchange, value)):
        return _exchanges([(item["input"], item["output"]) for item in value], name)
    return [_message(item, f"message {number} of {name}") for number, item in enumerate(value, 1)]


def earlier_turns(value: object, name: str) -> list[Message]:
    """The turns of a `history` column; empty for null and for an empty text.

    Supported: `[[question, answer], ...]`, messages, and either as JSON text; others are refused.
    """
    value = structured(value)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        raise wrong_type(name, value, "earlier turns ([[question, answer], ...] or messages)")
    if isinstance(value, Sequence) and all(isinstance(item, list | tuple) for item in value):
        if any(len(item) != 2 for item in value):
            raise RowDefectError(
                DefectKind.BAD_CONVERSATION, f"an item of {name} is not [question, answer]"
            )
        return _exchanges([tuple(item) for item in value], name)
    turns = text_or_messages(value, name)
    assert not isinstance(turns, str)
    return turns


def structured(value: object) -> object:
    """The list or object that a text holds as JSON or as a Python literal; else the value.

    >>> structured('["a", "b"]'), structured("{'a': None}"), structured("[sic]")
    (['a', 'b'], {'a': None}, '[sic]')
    """
    if not isinstance(value, str):
        return value
    start = value.lstrip()[:2]
    if start[:1] not in ("[", "{") and start not in ('"[', '"{'):
        return value
    try:
        found = parse_json(value)
    except json.JSONDecodeError:
        pass
    except ValueError:  # JSON, but with a repeated key or too many levels
        return value
    else:
        inner = structured(found) if isinstance(found, str) else None  # JSON of JSON
        return found if inner is None else value if inner is found else inner
    if start[:1] == '"' or len(value) > _PYTHON_TEXT_LIMIT:
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            found = ast.literal_eval(_NO_COMMA.sub("}, {", value.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
    return value if structure_fault(found) else found


def messages_in(text: str) -> list[Any] | None:
    """The messages that a text holds as JSON or as a Python literal; None for other texts.

    >>> messages_in('[{"role": "user", "content": "Hi"}]')
    [{'role': 'user', 'content': 'Hi'}]
    >>> messages_in('[{"name": "Ada"}]')
    """
    value = structured(text)
    value = value["messages"] if is_envelope(value) else value
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list) and items and all(map(_is_message, items)):
        return items
    return None


def is_envelope(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is an object with `messages`, and perhaps others such as `tools`.

    >>> is_envelope({"messages": [{"role": "user", "content": "Hi"}], "tools": []})
    True
    """
    return isinstance(value, Mapping) and isinstance(value.get("messages"), list | tuple)


def is_broken_messages(text: str) -> bool:
    """Whether a text begins like messages but cannot be parsed, for example because it was cut off.

    >>> is_broken_messages("[{'role': 'user', 'content': 'Hi'}, {'role': 'assist")
    True
    """
    start = text.lstrip()
    if start[:1] != "[" or start[1:].lstrip()[:1] != "{" or structured(text) is not text:
        return False
    quoted = {f"{mark}{key}{mark}" for key in ("role", "from") for mark in "'\""}
    return any(key in text for key in quoted)


def with_context(turns: list[Message], system: str | None, history: list[Message]) -> list[Message]:
    """A conversation after a system prompt and earlier turns; refuses two system prompts."""
    own = turns[0] if turns and turns[0]["role"] in ("system", "developer") else None
    rest = turns if own is None else turns[1:]
    if history and rest[: len(history)] != history:
        rest = [*history, *rest]
    if rest and rest[0]["role"] in ("system", "developer") and own is None:
        own, rest = rest[0], rest[1:]
    if system and own is not None and own.get("content", "").strip() != system.strip():
        raise RowDefectError(
            DefectKind.BAD_CONVERSATION,
            "the system column and the system turn of the conversation differ",
        )
    if system and own is None:
        own = {"role": "system", "content": system}
    return rest if own is None else [own, *rest]


def wrong_type(
    name: str, value: object, wanted: str, kind: DefectKind = DefectKind.NON_STRING_FIELD
) -> RowDefectError:
    """The error for a value that is not what its column should hold."""
    return RowDefectError(kind, f"{name} is {kind_of(value)}, not {wanted}")


def _is_message(item: object) -> bool:
    if not isinstance(item, Mapping):
        return False
    if isinstance(item.get("role"), str):
        return not {"content", "value", "tool_calls"}.isdisjoint(item)
    return isinstance(item.get("from"), str) and "value" in item


def _is_exchange(item: object) -> bool:
    return isinstance(item, Mapping) and {"input", "output"} <= {*item}


def _exchanges(pairs: Sequence[tuple[Any, Any]], name: str) -> list[Message]:
    turns = []
    for question, answer in pairs:
        for role, content in (("user", question), ("assistant", answer)):
            if not isinstance(content, str):
                raise RowDefectError(
                    DefectKind.NON_STRING_FIELD,
                    f"an exchange of {name} holds {kind_of(content)}, not a string",
                )
            turns.append({"role": role, "content": content})
    return turns


def _message(item: object, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise wrong_type(where, item, "an object")
    # Without null values, which templates would render.
    message = {key: value for key, value in item.items() if value is not None}
    for ours, other in (("role", "from"), ("content", "value")):
        if ours not in message and other in message:
            message[ours] = message.pop(other)
    role = message.get("role")
    if isinstance(role, str):
        role = _ROLE_NAMES.get(role.lower(), role)
    if role == "tool_call":
        message = {**_tool_calls(message.pop("content", None), where), **message}
        role = "assistant"
    if role not in ROLES:
        raise RowDefectError(
            DefectKind.BAD_CONVERSATION,
            f"the role of {where} is {'missing' if role is None else repr(role)}, not one of "
            f"{', '.join(ROLES)}",
        )
    message["role"] = role
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = message["content"] = _joined(content, where)
    if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        raise wrong_type(f"the content of {where}", content, "a string")
    return message


def _joined(parts: Sequence[object], where: str) -> str:
    """The text of a content that is a list of parts, as multimodal data sets write it."""
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            what = f"a part of type {kind!r}" if isinstance(kind, str) else kind_of(part)
            raise RowDefectError(
                DefectKind.NON_STRING_FIELD,
                f"the content of {where} holds {what}; only text is supported",
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(content: object, where: str) -> Message:
    """The calls of a `function_call` turn; its content is JSON of one or more calls."""
    found = structured(content)
    calls: list[Any] = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise RowDefectError(
            DefectKind.BAD_CONVERSATION,
            f'{where} is a tool call, but not JSON with "name" and "arguments"',
        )
    functions = [{"name": c["name"], "arguments": c.get("arguments", {})} for c in calls]
    return {"tool_calls": [{"type": "function", "function": f} for f in functions]}
