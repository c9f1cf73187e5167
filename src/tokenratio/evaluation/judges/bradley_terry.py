"""Verdicts from a score for each response, by the Bradley–Terry model."""

import json
import math
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from tokenratio.data.chat import Prompt, prompt_value
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict
from tokenratio.models.reference import digest_of_weights
from tokenratio.models.response import Response

# The score of each response to a prompt, or why there is none.
Scorer = Callable[[Sequence[tuple[Prompt, Response]]], Sequence[float | str]]


def bradley_terry(
    comparisons: Sequence[ResponsePair], scorer: Scorer, *, at_once: int
) -> Iterator[Verdict]:
    """σ(score of A − score of B) for each comparison.

    Args:
        at_once: comparisons whose responses are scored together, without duplicates. More are
            batched better by length; fewer reach the disk sooner.
    """
    for begin in range(0, len(comparisons), at_once):
        chunk = comparisons[begin : begin + at_once]
        sides = [(c.prompt, side) for c in chunk for side in (c.response_a, c.response_b)]
        different = {_key(*side): side for side in sides}
        scores = dict(zip(different, scorer(list(different.values())), strict=True))
        found = [scores[_key(*side)] for side in sides]
        for a, b in zip(found[::2], found[1::2], strict=True):
            yield _verdict(a, b)


def _verdict(a: float | str, b: float | str) -> Verdict:
    if isinstance(a, str):
        return Verdict(None, f"response A: {a}")
    if isinstance(b, str):
        return Verdict(None, f"response B: {b}")
    for name, score in (("A", a), ("B", b)):
        if not math.isfinite(score):
            return Verdict(None, f"response {name}: its score is {score}")
    margin = a - b
    # exp of a positive number can overflow, exp of a negative one cannot
    tail = math.exp(-abs(margin)) / (1 + math.exp(-abs(margin)))
    return Verdict(1 - tail if margin >= 0 else tail)


def _key(prompt: Prompt, response: Response) -> str:
    return json.dumps([prompt_value(prompt), response.text, response.token_ids])


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of the SHA-256 of a model's weights, including its adapter's."""
    return digest_of_weights(model.named_parameters())[:16]
