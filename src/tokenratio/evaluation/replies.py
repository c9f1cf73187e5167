"""Parsing replies of an OpenAI-compatible server, which are validated before use."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from tokenratio.models.response import Response


class ReplyError(Exception):
    """A reply with status 200 but without an answer."""


@dataclass(frozen=True)
class Answer:
    """The choices of a request, and the tokens used; None if the server does not report them."""

    choices: tuple[Response, ...]
    tokens_in: int | None
    tokens_out: int | None


def read_reply(text: str, num_choices: int) -> Answer:
    """The answer in a reply's body, of `chat/completions` or `completions`.

    Args:
        num_choices: asked for; of more, the first are taken.
    Raises:
        ReplyError: no JSON, or no choices with text in it.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise ReplyError(f"the answer is not JSON: {text[:100]!r}") from None
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or not choices:
        # some gateways wrap an error of the server behind them like this
        raise ReplyError(f"the answer has no choices: {text[:200]}")
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    return Answer(
        tuple(_choice(choice) for choice in choices[:num_choices]),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _choice(choice: Any) -> Response:
    if not isinstance(choice, Mapping):
        raise ReplyError("a choice is not an object")
    message = choice.get("message")
    if isinstance(message, Mapping):
        # content is null where a filter stepped in or the model refused
        text = _text(message.get("content")) or message.get("refusal") or ""
    else:
        text = choice.get("text")
    if not isinstance(text, str):
        raise ReplyError("a choice holds no text")
    reason = choice.get("finish_reason")
    ids = choice.get("token_ids")  # of vLLM, asked with `return_token_ids`
    if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        ids = None
    return Response(
        text,
        "eos" if reason == "stop" else str(reason or "unknown"),
        None if ids is None else tuple(ids),
    )


def _text(content: Any) -> Any:
    """The text of a message, also if it comes in parts (reasoning separate from the answer)."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "".join(str(part.get("text") or "") for part in parts)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a reply asks to wait, given as a number or a date; 0 if it asks for none."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return 0.0


def may_have_cost(error: Exception) -> bool:
    """Whether the server received the request, and so may have processed and charged it."""
    if isinstance(error, TimeoutError | ReplyError):
        return True
    broken = type(error).__name__ == "APIConnectionError"
    return broken and type(error.__cause__).__name__ != "ConnectError"


def reason_of(error: Any) -> str:
    body = error.body
    if isinstance(body, Mapping):
        return str(body.get("message") or body.get("detail") or body)
    return str(body or error.message)
