"""Requests to an OpenAI-compatible server."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenratio.data.chat import Prompt
    from tokenratio.evaluation.endpoint import EndpointSettings


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        id: identifies it to the caller.
        prompt: a text or a conversation, whose tools and template arguments are sent along.
        max_tokens: most tokens in an answer.
        temperature, top_p: None leaves them to the server.
        num_choices: answers wanted; servers that support several charge for the prompt once.
        seed: None sends none.
        label: its name in messages; the id if empty.
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
    """The arguments for the client.

    Args:
        have: choices that the request has received already.
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
            given = {
                **extra_body.get("chat_template_kwargs", {}),
                **prompt.template_kwargs,
            }
            extra_body["chat_template_kwargs"] = given
    return arguments | {"extra_body": extra_body}
