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
    """What a judge compares: two responses to one prompt, in the order in which it reads them.

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
        """What a verdict is about, the order included; for digests."""
        from tokenratio.data.chat import prompt_value

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


@dataclass(frozen=True)
class JudgeContext:
    """What a judge may be made from besides its settings.

    Attributes:
        world: the prompts' source, if it is a world's.
        reference: of implicit rewards, unless the judge's settings name one.
        folder: where a sheet to fill in goes.
        cache: the file of paid answers, unless the judge's settings name one.
        comparisons: what will be asked.
        load_model: loads a policy by hub name or folder, or shares one that is loaded.
        day: what templates that write today's date take for today, if it is fixed.
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
        """The judge; None if it cannot judge yet, because people have a sheet to fill in.

        Raises:
            TokenRatioError: what the judge cannot be made from.
        """
        ...


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
