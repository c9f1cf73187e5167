"""The chat template: its settings, the date it writes, and the token that ends a turn."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.template_limits import render_within_limits
from tokenratio.errors import TokenRatioError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = "strftime_now"  # the only input of a template besides its arguments
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ"
# Arguments of `apply_chat_template` and of the template that rows and settings must not replace;
# `documents` may be given.
RESERVED_ARGUMENTS = frozenset(
    (
        *("conversation", "conversations", "messages", "tools", "chat_template", "self"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "raise_exception", _CLOCK),
    )
)
# Two days that differ in year, month, day and weekday.
_TWO_DAYS = (date(1999, 11, 28), date(2004, 5, 3))
# Placeholders for contents, which no template changes.
_MARKS = ("XfirstmarkX", "XsecondmarkX")
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def _today() -> date:
    return date.today()


@dataclass(frozen=True)
class TemplateSettings:
    """Arguments of the chat template besides the messages. A row's own values take precedence.

    Attributes:
        kwargs: further arguments of the template, such as `enable_thinking`.
        tools: JSON schemas, for rows that have none.
        day: the date that a template writes as today's.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Any] | None = None
    day: date = field(default_factory=lambda: _today())

    @classmethod
    def of(
        cls,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        template_date: str | None = None,
    ) -> "TemplateSettings":
        """From settings as recipes, flags and `run.json` hold them; None for the defaults."""
        day = _today() if template_date is None else parse_day(template_date)
        return cls(dict(chat_template_kwargs or {}), tools or None, day)

    def __post_init__(self) -> None:
        if reason := reserved_argument(self.kwargs):
            raise TokenRatioError(reason)

    def record(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """The settings that this tokenizer's template uses, as arguments of `of`."""
        found = {
            "chat_template_kwargs": dict(self.kwargs),
            "tools": list(self.tools or ()),
            "template_date": self.day.isoformat() if depends_on_day(tokenizer, self) else None,
        }
        return {name: value for name, value in found.items() if value}


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends the assistant's last turn.

    Attributes:
        tail: all it writes after the turn's content.
        kept: the part of the tail that ends with the token at which generation stops.
        token: that token's text; `token_id` its id.
    """

    tail: str
    kept: str
    token: str
    token_id: int


def reserved_argument(template_kwargs: Mapping[str, Any]) -> str | None:
    """Why arguments of the chat template cannot be used; None if they can."""
    for name in template_kwargs:
        if name in RESERVED_ARGUMENTS:
            return f"chat_template_kwargs must not have {name}: it would change how rows are read"
    return None


def parse_day(text: str) -> date:
    """An ISO date; raises `TokenRatioError` for any other text."""
    try:
        return date.fromisoformat(str(text))
    except ValueError:
        raise TokenRatioError(
            f"template_date must be a date such as 2025-03-01, not {text!r}"
        ) from None


def with_chat_template(
    tokenizer: "PreTrainedTokenizerBase", chat_template: str | None
) -> "PreTrainedTokenizerBase":
    """A copy of the tokenizer with another template; the tokenizer itself if that is None.

    Args:
        chat_template: a file, or the template itself.
    """
    if chat_template is None:
        return tokenizer
    text = chat_template
    if "{" not in text:
        try:
            text = Path(os.path.expanduser(chat_template)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenRatioError(
                f"cannot read chat_template {chat_template!r}: {error}; give a file or the "
                "template itself"
            ) from None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text
    return tokenizer


def apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    template: TemplateSettings,
    *,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Messages as text; every conversation is rendered here.

    Args:
        tools, template_kwargs: the row's own, which take precedence over those of `template`.
    Raises:
        RowDefectError: the template fails on these messages.
        TokenRatioError: it exceeds a limit (`template_limits`).
    """
    if template_kwargs and (reason := reserved_argument(template_kwargs)):
        raise RowDefectError(DefectKind.MALFORMED_ROW, reason)
    tools = list(tools or template.tools or ()) or None
    options = {**template.kwargs, **(template_kwargs or {})}
    try:
        text = tokenizer.get_chat_template(None, tools)
        if _CLOCK in text:
            options["chat_template"] = _with_day(text, template.day)

        def rendered() -> str:
            return cast(
                str,
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    **options,
                ),
            )

        return render_within_limits(tokenizer.name_or_path, text, rendered)
    except TokenRatioError:
        raise
    except Exception as error:  # whatever the template's Jinja raises: refusals, type errors
        raise RowDefectError(
            DefectKind.TEMPLATE_FAILURE,
            f"the chat template fails: {type(error).__name__}: {first_line(error)}",
        ) from error


def depends_on_day(tokenizer: "PreTrainedTokenizerBase", template: TemplateSettings) -> bool:
    """Whether the template writes the current date."""
    if tokenizer.chat_template is None or _CLOCK not in str(tokenizer.chat_template):
        return False
    user = {"role": "user", "content": _MARKS[0]}
    system = {"role": "system", "content": _MARKS[1]}
    for messages, tools in (([user], None), ([system, user], None), ([user], [_PROBE_TOOL])):
        try:
            early, late = (
                apply_template(tokenizer, messages, replace(template, day=day), tools=tools)
                for day in _TWO_DAYS
            )
        except RowDefectError:
            continue
        if early != late:
            return True
    return False


def turn_end(tokenizer: "PreTrainedTokenizerBase", template: TemplateSettings) -> TurnEnd | None:
    """The token that ends the assistant's turns; None if the template writes none.

    It is the last added token that the template writes after a turn whether or not another turn
    follows. Some templates add another token at the end of the conversation; it does not count.
    """
    if tokenizer.chat_template is None:
        return None
    first, second = _MARKS
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": first}]
    followed = [*turns, {"role": "user", "content": second}]
    try:
        tail = apply_template(tokenizer, turns, template).rpartition(first)[2]
    except RowDefectError:
        return None
    common = tail
    try:
        whole = apply_template(tokenizer, followed, template)
    except RowDefectError:
        pass
    else:
        between = whole.partition(first)[2].partition(second)[0]
        common = os.path.commonprefix([tail, between])  # noqa: RUF071 - characters are meant
    found = _last_token(tokenizer, common) or _last_token(tokenizer, tail)
    if found is None:
        return None
    end, token, token_id = found
    return TurnEnd(tail, tail[:end], token, token_id)


def default_system_prompt(
    tokenizer: "PreTrainedTokenizerBase", template: TemplateSettings
) -> str | None:
    """What the template writes as a system turn of its own before that of a conversation.

    Raises:
        TokenRatioError: it writes the conversation's own system prompt more than once.
    """
    system, user = (
        {"role": r, "content": m} for r, m in zip(("system", "user"), _MARKS, strict=True)
    )
    try:
        text = apply_template(tokenizer, [system, user], template, add_generation_prompt=True)
    except RowDefectError:
        return None  # reported for each row
    before, _, after = text.partition(_MARKS[0])
    if _MARKS[0] in after:
        raise TokenRatioError(
            "the chat template writes a conversation's system prompt twice: set chat_template to "
            "one that writes it once, or remove the system messages"
        )
    end = turn_end(tokenizer, template)
    if end is None:
        return None
    own, found, _ = before.removeprefix(end.token).rpartition(end.token)
    return own if found else None


def special_token_at_end(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[str, int] | None:
    """The special token that a text ends with, and its id."""
    found = _last_token(tokenizer, text, only_special=True)
    return found[1:] if found is not None and found[0] == len(text) else None


def _last_token(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, only_special: bool = False
) -> tuple[int, str, int] | None:
    """Where the last (and longest) added token in a text ends, its text and its id."""
    found = [
        (text.rfind(token.content) + len(token.content), len(token.content), token.content, id)
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and token.content in text and (token.special or not only_special)
    ]
    if not found:
        return None
    end, _, content, id = max(found)
    return end, content, id


@lru_cache(maxsize=16)
def _with_day(template: str, day: date) -> str:
    """The template with its clock fixed to one day.

    transformers always passes templates the real clock and does not accept a function as an
    argument, so the clock is redefined as a macro that replaces each directive of the format.
    """
    moment = datetime.combine(day, time())
    directives = [f"%{flag}{letter}" for letter in _DIRECTIVES for flag in ("", "-")]
    values = json.dumps({directive: moment.strftime(directive) for directive in directives})
    # Jinja drops the newline after a block, so the template still begins at the start of a line.
    return (
        f"{{% macro {_CLOCK}(format) %}}{{% set result = namespace(text=format) %}}"
        f"{{% for directive, value in {values}.items() %}}"
        "{% set result.text = result.text | replace(directive, value) %}{% endfor %}"
        f"{{{{ result.text | replace('%%', '%') }}}}{{% endmacro %}}\n{template}"
    )
