"""What is sent to an OpenAI-compatible server: one question, and the fields of its request."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenratio.data.chat import Prompt
    from tokenratio.evaluation.endpoint import EndpointSettings


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        id: what the asker knows it by.
        prompt: a text or a conversation, whose tools and template arguments are sent along.
        max_tokens: longest answer, in tokens.
        temperature, top_p: None leaves them to the server.
        num_choices: answers wanted; they share the prompt's price where the server can do that.
        seed: None sends none.
        label: what messages call it; its id if empty.
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
        """What messages call it."""
        return self.label or self.id


def arguments_of(request: Request, settings: "EndpointSettings", have: int) -> dict[str, Any]:
    """What the client is called with.

    Args:
        have: choices that the request got already.
    """
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
            # What a policy writes is read as text, calls included.
            arguments |= {"tools": list(prompt.tools), "tool_choice": "none"}
        if prompt.template_kwargs:  # as vLLM and SGLang call it
            told = {**extra_body.get("chat_template_kwargs", {}), **prompt.template_kwargs}
            extra_body["chat_template_kwargs"] = told
    return arguments | {"extra_body": extra_body}
