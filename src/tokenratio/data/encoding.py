"""Text to token ids.

Prompt and response are tokenised separately and their ids joined. In the joined text a token could
straddle the boundary, and the responses of a pair would begin at different states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenratio.data.chat import RenderedExample
from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer puts around a text.

    Attributes:
        prefix: ids it adds in front (usually BOS); often empty.
        start: ids of an empty prompt, because the first response token needs a state: the prefix,
            else BOS, else EOS.
        eos: the id that ends a response, unless the chat template has an end of turn.
        eos_text: the same as text.
        lead: "\\n" if the tokenizer adds a space before every text (SentencePiece, as in Mistral),
            else empty. Responses are tokenised after it and its ids dropped, because no model
            generates that space after a prompt.
    """

    prefix: tuple[int, ...]
    start: tuple[int, ...]
    eos: int
    eos_text: str
    lead: str


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens; None for no limit.

    Attributes:
        max_length: of prompt and response together; responses are cut on the right.
        max_prompt_length: of the prompt, its prefix included; prompts are cut on the left.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None

    def check(self, special: SpecialTokens) -> None:
        """Raise `TokenRatioError` when no row could ever fit."""
        shortest = len(special.prefix) + 1
        for name, value, least in (
            ("max_length", self.max_length, 2),
            ("max_prompt_length", self.max_prompt_length, shortest),
        ):
            if value is not None and value < least:
                raise TokenRatioError(f"{name} is {value}; it must be at least {least}, or null.")


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one row, as int32 arrays: a list of Python integers takes nine times the memory.

    Attributes:
        prompt_ids: never empty; every response follows these ids.
        response_ids: one array per side, never empty; ends with the end token unless it was cut.
        prompt_cut: tokens cut off the prompt's left.
        response_cuts: tokens cut off each response's right, its end included.
        left_out: text of the row that the template does not render, by side.
    """

    prompt_ids: NDArray[np.int32]
    response_ids: tuple[NDArray[np.int32], ...]
    prompt_cut: int
    response_cuts: tuple[int, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Tokens cut off the prompt, then off each response."""
        return (self.prompt_cut, *self.response_cuts)


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> SpecialTokens:
    """What the tokenizer adds, found by using it; its settings do not tell. It must have an EOS."""
    if tokenizer.eos_token_id is None:
        raise TokenRatioError("The tokenizer has no EOS token; set tokenizer.eos_token.")
    prefix = _own_prefix(tokenizer)
    first = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = prefix or tuple(token for token in first if token is not None)[:1]
    return SpecialTokens(
        prefix, start, tokenizer.eos_token_id, tokenizer.eos_token, _response_lead(tokenizer)
    )


def _own_prefix(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    added = _ids(tokenizer, [""], add_special_tokens=True)[0]
    # On "" alone an EOS at the end looks like a BOS at the front (GPT-2 has one token for both),
    # so a text is put between them.
    bare = _ids(tokenizer, ["a"])[0]
    framed = _ids(tokenizer, ["a"], add_special_tokens=True)[0]
    if bare:
        for cut in range(len(added) + 1):
            if framed == [*added[:cut], *bare, *added[cut:]]:
                return tuple(added[:cut])
    # The tokenizer drops "a", which is not in its vocabulary.
    ends = added and added[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id
    return tuple(added[:-1] if ends else added)


def _response_lead(tokenizer: "PreTrainedTokenizerBase") -> str:
    bare, newline, both = _ids(tokenizer, ["a", "\n", "\na"])
    inside = both[len(newline) :]
    return "\n" if both[: len(newline)] == newline and inside != bare else ""


def tokenise(
    tokenizer: "PreTrainedTokenizerBase",
    rendered: Sequence[RenderedExample],
    special: SpecialTokens,
) -> list[tuple[list[int], ...]]:
    """Token ids of each row's prompt, without special tokens, and of each of its responses.

    A response ends once, with the template's end of turn, or else with EOS. White space after an
    EOS at the end of a text is dropped.
    """
    prompts = _ids(tokenizer, [row.prompt for row in rendered])
    texts = [
        _ended(response, special.eos_text) if end is None else response
        for row in rendered
        for response, end in zip(row.responses, row.ends, strict=True)
    ]
    responses = iter(_response_ids(tokenizer, texts, special.lead))
    return [
        (prompt, *(_close(next(responses), end, special.eos) for end in row.ends))
        for row, prompt in zip(rendered, prompts, strict=True)
    ]


def _response_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], lead: str
) -> list[list[int]]:
    if not lead:
        return _ids(tokenizer, texts)
    front = _ids(tokenizer, [lead])[0]
    ids = _ids(tokenizer, [lead + text for text in texts])
    # If the response's first token merges with the lead, the added space is kept instead.
    return [
        row[len(front) :] if row[: len(front)] == front else _ids(tokenizer, [text])[0]
        for row, text in zip(ids, texts, strict=True)
    ]


def _ended(response: str, eos_text: str) -> str:
    stripped = response.rstrip()
    return stripped if stripped.endswith(eos_text) else response


def _ids(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # no warning about long texts, which are truncated later
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def assemble(
    ids: tuple[list[int], ...], sides: Sequence[str], special: SpecialTokens, limits: Limits
) -> EncodedExample:
    """Join one row: prefix once, prompt cut on the left, responses on the right.

    Args:
        ids: from `tokenise`.
        sides: names of the responses, for messages.
    Raises:
        RowDefectError: an empty response, a prompt that leaves no room for one, or two responses
            with the same remaining tokens.
    """
    prompt, responses = begin(ids[0], special), list(ids[1:])
    if not ids[0]:
        # The response may begin with its own BOS.
        responses = [_without_prefix(response, special.start) for response in responses]
    for side, response in zip(sides, responses, strict=True):
        if len(response) < 2:
            raise RowDefectError(DefectKind.BLANK_RESPONSE, f"{side} has no token but its end")

    prompt, prompt_cut = cut_left(prompt, special.prefix, limits.max_prompt_length)
    kept, cuts = responses, [0] * len(responses)
    if limits.max_length is not None:
        room = limits.max_length - len(prompt)
        if room < 1:
            raise RowDefectError(
                DefectKind.PROMPT_FILLS_MAX_LENGTH,
                f"the prompt has {len(prompt)} tokens, max_length is {limits.max_length}",
            )
        kept = [response[:room] for response in responses]
        cuts = [max(0, len(response) - room) for response in responses]
    if len(kept) == 2 and kept[0] == kept[1]:
        if responses[0] == responses[1]:
            raise RowDefectError(
                DefectKind.IDENTICAL_TOKENS, "the tokenizer makes the same tokens of both responses"
            )
        raise RowDefectError(
            DefectKind.IDENTICAL_AFTER_TRUNCATION,
            f"the first {len(kept[0])} tokens of both are the same",
        )
    return EncodedExample(
        prompt_ids=np.asarray(prompt, np.int32),
        response_ids=tuple(np.asarray(response, np.int32) for response in kept),
        prompt_cut=prompt_cut,
        response_cuts=tuple(cuts),
    )


def begin(prompt: Sequence[int], special: SpecialTokens) -> list[int]:
    """A prompt's ids with the tokenizer's prefix once in front; `special.start` if empty."""
    if not prompt:
        return list(special.start)
    return [*special.prefix, *_without_prefix(list(prompt), special.prefix)]


def _close(response: list[int], end: int | None, eos: int) -> list[int]:
    """The response with exactly one end."""
    ends, length = {eos, end}, len(response)
    while length and response[length - 1] in ends:
        length -= 1
    return [*response[:length], eos if end is None else end]


def _without_prefix(ids: list[int], prefix: tuple[int, ...]) -> list[int]:
    return ids[len(prefix) :] if tuple(ids[: len(prefix)]) == prefix else ids


def cut_left(
    prompt: list[int], prefix: tuple[int, ...], limit: int | None
) -> tuple[list[int], int]:
    """The prefix and the prompt's last tokens, `limit` in all, and how many were cut."""
    if limit is None or len(prompt) <= limit:
        return prompt, 0
    kept = prompt[len(prompt) - (limit - len(prefix)) :]
    return [*prefix, *kept], len(prompt) - limit
