"""Requests to an OpenAI-compatible server, and its replies, which are validated before use."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from tokenratio.models.response import Response

if TYPE_CHECKING:
    from tokenratio.data.chat import Prompt
    from tokenratio.evaluation.endpoint import EndpointSettings


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        id: identifies it to the caller.
        prompt: a text, or a conversation, which is sent with its tools and template arguments.
        max_tokens: most tokens in an answer.
        temperature, top_p: None leaves them to the server.
        num_choices: answers wanted; servers that support several charge for the prompt once.
        seed: None sends none.
        label: its name in messages; default: the id.
    """

    id: str
    prompt: "Prompt"
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    num_choices: int = 1
    seed: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.label or self.id


def arguments_of(request: Request, settings: "EndpointSettings", have: int) -> dict[str, Any]:
    """The arguments for the client; `have` choices were received before."""
    prompt = request.prompt
    if settings.api == "completions":
        arguments: dict[str, Any] = {"prompt": prompt}
    elif isinstance(prompt, str):
        arguments = {"messages": [{"role": "user", "content": prompt}]}
    else:
        arguments = {"messages": [dict(message) for message in prompt.messages]}
    arguments["model"] = settings.model
    arguments[settings.max_tokens_name] = request.max_tokens
    for name in ("temperature", "top_p"):
        if getattr(request, name) is not None:
            arguments[name] = getattr(request, name)
    if request.num_choices - have > 1:
        arguments["n"] = request.num_choices - have
    if request.seed is not None:
        arguments["seed"] = request.seed + have  # or the second answer would be the first again
    extra_body = dict(settings.extra_body)
    if not isinstance(prompt, str):
        if prompt.tools:
            # Tool calls of the policy are read as text.
            arguments |= {"tools": list(prompt.tools), "tool_choice": "none"}
        if prompt.template_kwargs:  # the name in vLLM and SGLang
            given = extra_body.get("chat_template_kwargs", {})
            extra_body["chat_template_kwargs"] = {**given, **prompt.template_kwargs}
    return arguments | {"extra_body": extra_body}


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
        num_choices: the most to take.
    Raises:
        ReplyError: not JSON, or without choices that have text.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise ReplyError(f"the answer is not JSON: {text[:100]!r}") from None
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or not choices:
        # Some gateways wrap another server's error like this.
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
        # Null if a filter removed it or the model refused.
        text = _text(message.get("content")) or message.get("refusal") or ""
    else:
        text = choice.get("text")
    if not isinstance(text, str):
        raise ReplyError("a choice holds no text")
    reason = choice.get("finish_reason")
    ids = choice.get("token_ids")  # from vLLM with `return_token_ids`
    if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        ids = None
    return Response(
        text,
        "eos" if reason == "stop" else reason if isinstance(reason, str) and reason else "unknown",
        None if ids is None else tuple(ids),
    )


def _text(content: Any) -> Any:
    """The text of a message, which may be in parts (reasoning separate from the answer)."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "".join(str(part.get("text") or "") for part in parts)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait that a reply asks for, as a number or a date; 0 by default."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError, OSError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return 0.0


def may_have_cost(error: Exception) -> bool:
    """Whether the server may have received the request, and charged for it."""
    if isinstance(error, TimeoutError | ReplyError):
        return True
    broken = type(error).__name__ == "APIConnectionError"
    return broken and type(error.__cause__).__name__ != "ConnectError"


def reason_of(error: Any) -> str:
    body = error.body
    if isinstance(body, Mapping):
        return str(body.get("message") or body.get("detail") or body)
    return str(body or error.message)
