"""Examples rendered to text: strings as they are, conversations through the chat template."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.formats import CompletionExample, Message, PreferenceExample
from tokenratio.data.validation import responses_of
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedExample:
    """Plain text, ready to be tokenised: `prompt + response` is what the model reads.

    Attributes:
        origin: where the row stands.
        prompt: the prompt, with the template's opening of the answer.
        responses: one text per side, as the template closes it.
    """

    origin: str
    prompt: str
    responses: tuple[str, ...]


def require_chat_template(tokenizer: "PreTrainedTokenizerBase", origin: str) -> None:
    """Raise unless the tokenizer can render the conversation at `origin`."""
    if tokenizer.chat_template is None:
        raise TokenRatioError(
            f"{origin} is a conversation, and the tokenizer has no chat template: set "
            "tokenizer.chat_template, take a chat model's tokenizer, or give the data as strings."
        )


def render(
    example: PreferenceExample | CompletionExample, tokenizer: "PreTrainedTokenizerBase"
) -> RenderedExample:
    """Render prompt and responses.

    A response is what the template adds to the rendered prompt when the response's turns follow,
    so the boundary is the one generation meets: after the template's generation prompt.

    Raises:
        RowDefectError: the template fails on the row, or renders the prompt differently when an
            answer follows, so that no boundary exists.
        TokenRatioError: there is no template.
    """
    responses = responses_of(example)
    if isinstance(example.prompt, str):
        return RenderedExample(example.origin, example.prompt, tuple(responses.values()))
    require_chat_template(tokenizer, example.origin)
    options = {**example.template_kwargs, "tools": example.tools}
    prompt = _apply(tokenizer, example.prompt, **options, add_generation_prompt=True)
    rendered = []
    for side, turns in responses.items():
        whole = _apply(tokenizer, [*example.prompt, *turns], **options)
        if not whole.startswith(prompt):
            raise RowDefectError(
                DefectKind.TEMPLATE_FAILURE,
                f"the chat template renders the prompt differently when {side} follows, first at "
                f"character {_first_difference(prompt, whole)}",
            )
        rendered.append(whole[len(prompt) :])
    return RenderedExample(example.origin, prompt, tuple(rendered))


def _apply(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    **options: Any,
) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (
        Exception
    ) as error:  # whatever the template's Jinja raises: its own refusals, type errors
        reason = str(error).strip().split("\n")[0]
        raise RowDefectError(
            DefectKind.TEMPLATE_FAILURE,
            f"the chat template fails: {type(error).__name__}: {reason}",
        ) from error


def _first_difference(prompt: str, whole: str) -> int:
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
