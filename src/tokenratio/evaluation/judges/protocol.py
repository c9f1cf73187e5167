"""Pairs of responses, a judge's verdicts on them, and the interface of a judge."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from tokenratio.models.response import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenratio.data.chat import Prompt


@dataclass(frozen=True)
class ResponsePair:
    """Two responses to one prompt, in the order in which a judge reads them.

    Attributes:
        id: of the prompt.
        sample: which of the prompt's pairs it is.
    """

    id: str
    sample: int
    prompt: "Prompt"
    response_a: Response
    response_b: Response

    def swapped(self) -> "ResponsePair":
        """The same pair in the other order."""
        return replace(self, response_a=self.response_b, response_b=self.response_a)

    def content(self) -> list[Any]:
        """Prompt and responses in their order, as JSON; for digests."""
        from tokenratio.data.chat import prompt_value

        return [prompt_value(self.prompt), self.response_a.text, self.response_b.text]


@dataclass(frozen=True)
class Verdict:
    """A judge's answer on a pair of responses.

    Attributes:
        probability: that response A is better, in [0, 1]; None without a verdict.
        reason: why there is no verdict.
        raw: the judge's own words, if any.
        is_final: False if the judge could not be asked, so that asking again may help.
    """

    probability: float | None
    reason: str | None = None
    raw: str | None = None
    is_final: bool = True


class Judge(Protocol):
    """`(prompt, response_a, response_b) → probability that a is better`, many at a time.

    Attributes:
        order_matters: whether the order of the responses can change the verdict; both orders are
            then judged.
    """

    order_matters: bool

    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on besides the texts, as JSON; no secrets."""
        ...

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterable[Verdict]:
        """One verdict for each comparison, in their order, each as soon as it is known."""
        ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A judge that keeps the answers it got, so that they can be parsed again without asking."""

    def recall(self, comparison: ResponsePair) -> Verdict | None:
        """The verdict in a kept answer, parsed by this version; None without an answer."""
        ...


@dataclass(frozen=True)
class JudgeContext:
    """What judges are made from, besides their settings.

    Attributes:
        world: the prompts' source, which may be a world.
        reference: of implicit rewards, unless the judge's settings name one.
        folder: for a sheet to fill in.
        cache: the file of paid answers, unless the judge's settings name one.
        comparisons: to be judged.
        load_model: returns a policy by name, loaded once.
        day: today's date for chat templates that write it, if it is fixed.
        report: receives what the user has to know or do.
        progress: draw progress bars.
    """

    world: str | None
    reference: str | None
    folder: Path
    cache: Path
    comparisons: Sequence[ResponsePair]
    load_model: "Callable[[str], PreTrainedModel]"
    day: str | None = None
    report: Callable[[str], None] = print
    progress: bool = False


class JudgeSettings(Protocol):
    """The settings of one kind of judge: a dataclass whose fields are options.

    Attributes:
        required: the fields that must be given.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    required: ClassVar[tuple[str, ...]]

    def make(self, context: JudgeContext) -> Judge | None:
        """The judge; None while people have a sheet to fill in.

        Raises:
            TokenRatioError: a setting or something in the context is missing or wrong.
        """
        ...


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
