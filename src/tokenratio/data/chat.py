"""Prompts and examples as text: strings as they are, conversations through the chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from tokenratio.data.boundary import common_length
from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.formats import AnyExample, CompletionExample
from tokenratio.data.messages import Message
from tokenratio.data.template import TemplateSettings, TurnEnd, apply_template, special_token_at_end
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversation:
    """Messages to be answered, and the tools and `chat_template_kwargs` of their row."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


# A text is used as it is; a conversation is rendered with the chat template.
Prompt = str | Conversation


@dataclass(frozen=True)
class RenderedExample:
    """Plain text, ready to be tokenised: `prompt + response` is what the model reads.

    Attributes:
        origin: where the row stands.
        prompt: the prompt, with the template's opening of the answer.
        responses: one text per side, without the token that ends it.
        ends: for each response the id of the token with which the template ends it; None where
            EOS does.
    """

    origin: str
    prompt: str
    responses: tuple[str, ...]
    ends: tuple[int | None, ...]


def prompt_of(
    text: str | Sequence[Message] | Conversation,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """A text, or messages with their tools and template arguments, as a prompt."""
    if isinstance(text, str | Conversation):
        return text
    return Conversation(list(text), tools or None, dict(template_kwargs or {}))


def answered(prompt: Prompt, response: str) -> CompletionExample:
    """A prompt and one response to it, as an example of a data set."""
    if isinstance(prompt, str):
        return CompletionExample("A prompt", prompt, response)
    return CompletionExample(
        "A prompt",
        [dict(message) for message in prompt.messages],
        [{"role": "assistant", "content": response}],
        None if prompt.tools is None else list(prompt.tools),
        dict(prompt.template_kwargs),
    )


def prompt_value(prompt: Prompt) -> Any:
    """A prompt as a JSON value that holds all of it; its messages alone, if they are all."""
    if isinstance(prompt, str):
        return prompt
    messages = [dict(message) for message in prompt.messages]
    extras = prompt_extras(prompt)
    return {"messages": messages, **extras} if extras else messages


def prompt_extras(prompt: Prompt) -> dict[str, Any]:
    """The template arguments of a prompt besides its messages, by column name."""
    if isinstance(prompt, str):
        return {}
    extras = {"tools": prompt.tools, "chat_template_kwargs": dict(prompt.template_kwargs)}
    return {name: value for name, value in extras.items() if value}


def render_prompt(
    prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", template: TemplateSettings
) -> str:
    """A prompt as training and generation read it; a conversation ends in the generation prompt.

    Raises:
        RowDefectError: the template fails on it.
        TokenRatioError: it is a conversation, and there is no template.
    """
    if isinstance(prompt, str):
        return prompt
    return render_turns(prompt, prompt.messages, tokenizer, template, add_generation_prompt=True)


def render_turns(
    prompt: Conversation,
    turns: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    template: TemplateSettings,
    *,
    add_generation_prompt: bool = False,
    origin: str = "A prompt",
) -> str:
    """Turns as text, with the tools and template arguments of the prompt they belong to.

    Raises:
        RowDefectError: the template fails on them.
        TokenRatioError: there is no template.
    """
    if tokenizer.chat_template is None:
        raise TokenRatioError(
            f"{origin} is a conversation, and the tokenizer has no chat template: set "
            "chat_template, take a chat model's tokenizer, or give the data as strings "
            "without system, history or tools."
        )
    return apply_template(
        tokenizer,
        turns,
        template,
        tools=prompt.tools,
        template_kwargs=prompt.template_kwargs,
        add_generation_prompt=add_generation_prompt,
    )


def render(
    example: AnyExample,
    tokenizer: "PreTrainedTokenizerBase",
    template: TemplateSettings,
    end: TurnEnd | None,
) -> RenderedExample:
    """Render prompt and responses.

    A response is what the template adds after the rendered prompt, so its first token is the one
    that generation would produce. It ends with the template's end of turn.

    Args:
        end: `turn_end` of tokenizer and template.
    Raises:
        RowDefectError: the template fails on the row, or renders the prompt differently when a
            response follows.
        TokenRatioError: there is no template.
    """
    responses = example.responses
    if isinstance(example.prompt, str):
        plain = cast(tuple[str, ...], tuple(responses.values()))
        return RenderedExample(example.origin, example.prompt, plain, (None,) * len(plain))
    conversation = Conversation(example.prompt, example.tools, example.template_kwargs)
    prompt = render_turns(
        conversation,
        example.prompt,
        tokenizer,
        template,
        add_generation_prompt=True,
        origin=example.origin,
    )
    rendered = []
    for side, turns in responses.items():
        whole = render_turns(conversation, [*example.prompt, *turns], tokenizer, template)
        if not whole.startswith(prompt):
            at = common_length(prompt, whole)
            raise RowDefectError(
                DefectKind.TEMPLATE_FAILURE,
                f"the chat template renders the prompt differently when {side} follows, first at "
                f"character {at}: it has {whole[at : at + 20]!r} in place of "
                f"{prompt[at : at + 20]!r}, so no boundary exists; set chat_template to one that "
                "renders both alike, or give the rows as text",
            )
        rendered.append(_split_end(tokenizer, whole[len(prompt) :], end))
    texts, ends = zip(*rendered, strict=True)
    return RenderedExample(example.origin, prompt, texts, ends)


def _split_end(
    tokenizer: "PreTrainedTokenizerBase", text: str, end: TurnEnd | None
) -> tuple[str, int | None]:
    """A response without the token that ends it, and that token's id."""
    if end is None:
        return text, None
    if text.endswith(end.tail):
        text = text.removesuffix(end.tail) + end.kept
        return text.removesuffix(end.token), end.token_id
    # Some templates end a turn of another kind, such as a tool call, with another token.
    found = special_token_at_end(tokenizer, text.rstrip())
    if found is None:
        return text, None
    token, token_id = found
    return text.rstrip().removesuffix(token), token_id
