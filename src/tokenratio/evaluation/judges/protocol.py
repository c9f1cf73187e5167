"""What a judge is asked, and what it says."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from tokenratio.data.chat import Prompt, prompt_value


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt; the order is the one in which a judge reads them.

    Attributes:
        id: of the prompt.
        sample: which of the prompt's comparisons it is.
        token_ids_a, token_ids_b: of the responses, EOS included, where they are known.
    """

    id: str
    sample: int
    prompt: Prompt
    response_a: str
    response_b: str
    token_ids_a: tuple[int, ...] | None = None
    token_ids_b: tuple[int, ...] | None = None

    def swapped(self) -> "Comparison":
        """The same question the other way round."""
        return replace(
            self,
            response_a=self.response_b,
            response_b=self.response_a,
            token_ids_a=self.token_ids_b,
            token_ids_b=self.token_ids_a,
        )

    def content(self) -> list[Any]:
        """What a verdict is about, the order included; for digests."""
        return [prompt_value(self.prompt), self.response_a, self.response_b]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a comparison.

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

    def __call__(self, comparisons: Sequence[Comparison]) -> Iterable[Verdict]:
        """One verdict for each comparison, in their order, each as early as it can be had."""
        ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A judge that keeps what it was answered, so that it can be read again without asking."""

    def recall(self, comparison: Comparison) -> Verdict | None:
        """The verdict in a kept answer, as it is read today; None where none is kept."""
        ...


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
