"""Text of a row that the chat template does not render: reasoning, tool calls, tools, turns.

Changed white space and escaped characters do not count.
"""

import html
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tokenratio.data.chat import Conversation, RenderedExample, render_turns
from tokenratio.data.display import quoted
from tokenratio.data.formats import AnyExample
from tokenratio.data.messages import Message, Text
from tokenratio.data.template import TemplateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The keys of a message that hold its text; most templates omit others, such as ids, on purpose.
_SPOKEN = ("reasoning_content", "reasoning", "thinking", "content")
_SHOWN = 24


def left_out(
    example: AnyExample,
    rendered: RenderedExample,
    tokenizer: "PreTrainedTokenizerBase",
    template: TemplateSettings,
) -> dict[str, str]:
    """The row's text that `render` left out, by side (`tools`, `prompt`, `chosen`, …).

    Args:
        rendered: from `render` with the same settings.
    Returns:
        Only sides with missing text.
    """
    if isinstance(example.prompt, str):
        return {}
    missing = {
        "tools": _missing(_tool_texts(example.tools or template.tools or ()), rendered.prompt),
        "prompt": _missing(_spoken(example.prompt), rendered.prompt),
    }
    sides = example.responses.items()
    for (side, turns), text, end in zip(sides, rendered.responses, rendered.ends, strict=True):
        missing[side] = _missing(_spoken(turns), text)
        if missing[side]:
            # Part of it may be in the generation prompt, or be the end of the turn.
            opening = _generation_prompt(example, rendered, tokenizer, template)
            closing = "" if end is None else tokenizer.convert_ids_to_tokens(end)
            missing[side] = _missing(_spoken(turns), f"{opening}{text}{closing}")
    return {side: text for side, text in missing.items() if text}


def describe_omissions(missing: Mapping[str, str]) -> str:
    """What is left out, in words: `58 characters of chosen: '<think> The user …'`."""
    return "; ".join(
        f"{len(text):,} characters of {side}: {quoted(text[:_SHOWN], _SHOWN)}"
        + ("…" if len(text) > _SHOWN else "")
        for side, text in missing.items()
    )


def _generation_prompt(
    example: AnyExample,
    rendered: RenderedExample,
    tokenizer: "PreTrainedTokenizerBase",
    template: TemplateSettings,
) -> str:
    turns = cast(Sequence[Message], example.prompt)
    conversation = Conversation(turns, example.tools, example.template_kwargs)
    before = render_turns(conversation, turns, tokenizer, template)
    return rendered.prompt[len(before) :] if rendered.prompt.startswith(before) else ""


def _missing(texts: Iterator[str], rendered: str) -> str:
    """The parts of the texts that are not in the rendered text, up to white space."""
    whole = _squeezed(rendered)
    if "&" in rendered:  # some templates escape for HTML
        whole = f"{whole}\n{_squeezed(html.unescape(rendered))}"
    parts = (_unrendered(text, whole) for text in texts)
    return " ".join(part for part in parts if part)


def _unrendered(text: str, whole: str) -> str:
    """The words between the longest rendered beginning and the longest rendered end."""
    # As it is, or as JSON; arguments that are JSON already are then escaped twice.
    forms = (text, _json(text), _json(text, False), _json(_json(text, False), False))
    if any(_squeezed(form) in whole for form in forms):
        return ""
    words = text.split()
    end = _longest(words, whole, from_end=True)
    words = words[: len(words) - end]
    return " ".join(words[_longest(words, whole, from_end=False) :])


def _json(text: str, ensure_ascii: bool = True) -> str:
    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]


def _longest(words: Sequence[str], whole: str, *, from_end: bool) -> int:
    """How many words of the beginning (or end) are rendered in one piece."""

    def is_left_out(num: int) -> bool:
        piece = words[len(words) - num :] if from_end else words[:num]
        return "".join(piece) not in whole

    return bisect_left(range(1, len(words) + 1), True, key=is_left_out)


def _spoken(turns: Text) -> Iterator[str]:
    for turn in turns:
        assert not isinstance(turn, str)
        for key in _SPOKEN:
            yield from _strings(turn.get(key))
        for call in turn.get("tool_calls") or ():
            # {"function": {"name", "arguments"}}, or the inner object alone.
            inner = call.get("function", call) if isinstance(call, Mapping) else call
            if isinstance(inner, Mapping):
                yield from _strings(inner.get("name"))
                yield from _strings(_parsed(inner.get("arguments")))


def _tool_texts(tools: Sequence[Any]) -> Iterator[str]:
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if isinstance(inner, Mapping):
            yield from _strings(inner.get("name"))
            for text in _strings(inner.get("description")):
                # Templates that write tools as code put each line in a comment of its own.
                yield from text.splitlines()


def _parsed(arguments: Any) -> Any:
    """Arguments of a call: an object, or the JSON of one, which templates may reformat."""
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        # Only the text of a content block counts; arguments have any names.
        values = [value.get("text")] if value.get("type") == "text" else value.values()
        for each in values:
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _squeezed(text: str) -> str:
    return "".join(text.split())
