"""Where the prompt ends in texts and conversations that contain prompt and response together."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

# Openings of the assistant's turn in a transcript: Anthropic's HH, Alpaca, Vicuna, and the usual
# chat templates. A line end belongs to the opening if the format has one there; in HH, the space
# after the colon belongs to the response.
_OPENINGS = re.compile(
    r"""
      (?:^|\n)[ ]*(?:Assistant|ASSISTANT|AI|Bot|Answer):
    | (?<=[ \n])(?:ASSISTANT|GPT4\ Correct\ Assistant):
    | (?:^|\n)\#{2,3}\ ?(?:Response|Assistant|Answer)(?::\n{0,2}|\n{1,2})
    | <\|im_start\|>\ ?assistant\n
    | <\|start_header_id\|>assistant<\|end_header_id\|>\n{0,2}
    | <start_of_turn>model\n
    | <\|start_of_role\|>assistant<\|end_of_role\|>
    | <\|CHATBOT_TOKEN\|>
    | <\|(?:assistant|Assistant|ASSISTANT)\|>\n?
    | <\uff5cAssistant\uff5c>
    | \[/INST\]
    """,
    re.VERBOSE,
)
# Scripts that write no spaces between words: a boundary may be between any two characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)


def extract_prompt(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """The length of the implicit prompt: what both sides begin with (characters or messages).

    In transcripts it ends after the last opening of the assistant's turn that both share. Otherwise
    as in TRL: a space before the first difference belongs to the responses, and if one side is the
    beginning of the other, its last element is its response. Unlike TRL, no word is split: the
    prompt ends before it.

    >>> extract_prompt("The sky is blue.", "The sky is green.")
    10
    >>> extract_prompt("Human: Hi\\n\\nAssistant: I am.", "Human: Hi\\n\\nAssistant: I do.")
    21
    >>> extract_prompt("It is an owl.", "It is a crow.")
    5
    """
    shared = common_length(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        opened = opening_end(chosen[:shared])
        if opened:
            return opened
        return _before_word(chosen, rejected, _trl_length(chosen, rejected, shared))
    return _trl_length(chosen, rejected, shared)


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements both begin with."""
    shorter = min(len(first), len(second))
    if isinstance(first, str):
        # Long texts: bisected, so that each comparison runs at the speed of C.
        lengths = range(1, shorter + 1)
        return bisect_left(lengths, True, key=lambda num: first[:num] != second[:num])
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)


def opening_end(text: str) -> int:
    """Where the last opening of an assistant's turn ends in a text; 0 if there is none."""
    return max((found.end() for found in _OPENINGS.finditer(text)), default=0)


def divides_word(text: str, index: int) -> bool:
    """Whether a cut before `index` would be inside a word.

    >>> divides_word("blue sky", 3), divides_word("blue sky", 4), divides_word("don't", 3)
    (True, False, True)
    """
    if not 0 < index < len(text):
        return False
    before, after = text[index - 1], text[index]
    if unicodedata.category(after)[0] == "M":
        return True
    if _in_word(before) and after in "'’":
        return index + 1 < len(text) and _in_word(text[index + 1])
    if before in "'’" and _in_word(after):
        return index > 1 and _in_word(text[index - 2])
    return _in_word(before) and _in_word(after)


def begins_with(response: str, prompt: str) -> int:
    """Where `response` continues after repeating `prompt`; 0 if it does not repeat it.

    White space around the prompt may differ.

    >>> begins_with("What is it?\\nA bird.", "What is it? ")
    11
    """
    whole = prompt.strip()
    if not whole:
        return 0
    if response.startswith(prompt):
        end = len(prompt)
    else:
        skipped = len(response) - len(response.lstrip())
        if not response.startswith(whole, skipped):
            return 0
        end = skipped + len(whole)
    return 0 if divides_word(response, end) else end


def _trl_length(chosen: Sequence[Any], rejected: Sequence[Any], shared: int) -> int:
    shorter = min(len(chosen), len(rejected))
    if not shorter:
        return 0
    length = min(shared, shorter - 1)
    differs = chosen[length] != rejected[length]
    return length - 1 if differs and length and chosen[length - 1] == " " else length


def _before_word(chosen: str, rejected: str, length: int) -> int:
    start = length
    while divides_word(chosen, start) or divides_word(rejected, start):
        start -= 1
    moved = start < length
    return start - 1 if moved and start and chosen[start - 1] == " " else start


def _in_word(character: str) -> bool:
    is_word = character == "_" or unicodedata.category(character)[0] in "LNM"
    return is_word and _UNSPACED.match(character) is None
