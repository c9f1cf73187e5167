"""Pairs of responses, a judge's verdicts on them, and the interface of a judge."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from tokenratio.data.chat import Prompt, prompt_value
from tokenratio.models.response import Response


@dataclass(frozen=True)
class ResponsePair:
    """What a judge compares: two responses to one prompt, in the order in which it reads them.

    Attributes:
        id: of the prompt.
        sample: which of the prompt's pairs it is.
    """

    id: str
    sample: int
    prompt: Prompt
    response_a: Response
    response_b: Response

    def swapped(self) -> "ResponsePair":
        """The same pair in the other order."""
        return replace(self, response_a=self.response_b, response_b=self.response_a)

    def content(self) -> list[Any]:
        """What a verdict is about, the order included; for digests."""
        return [prompt_value(self.prompt), self.response_a.text, self.response_b.text]


@dataclass(frozen=True)
class Verdict:
    """A judge's answer on a pair of responses.

    Attributes:
        probability: that response A is better, in [0, 1]; None where there is no verdict.
        reason: why there is none.
        raw: the judge's own words, where it has any.
        is_final: False where the judge could not be asked, so that asking again may help.
    """

    probability: float | None
    reason: str | None = None
    raw: str | None = None
    is_final: bool = True


class Judge(Protocol):
    """`(prompt, response_a, response_b) → probability that a is better`, many at a time.

    Attributes:
        order_matters: whether the order of the responses can change the verdict, so that both are
            asked for.
    """

    order_matters: bool

    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on besides the texts, as JSON; no secrets."""
        ...

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterable[Verdict]:
        """One verdict for each comparison, in their order, each as early as it can be had."""
        ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A judge that keeps what it was answered, so that it can be read again without asking."""

    def recall(self, comparison: ResponsePair) -> Verdict | None:
        """The verdict in a kept answer, as it is read today; None where none is kept."""
        ...


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
