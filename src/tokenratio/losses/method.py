"""What a preference method is to the rest of the house: a loss, and what it has to be given."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tokenratio.types import PairStatistics, StepStatistics

Need = Literal["ref_log_probs", "kl_ref_policy", "baseline", "contrast"]


class Method(ABC):
    """A preference loss and what has to be computed for it.

    Attributes:
        source: the paper, and where in it.
        level: what is compared (docs/method.md §6).
        needs: what must be known beside the policy's log-probabilities of both responses:
            `ref_log_probs`; `kl_ref_policy`, the exact KL at every state; `baseline`, a learned one
            (docs/method.md §4); `contrast`, two models' or prompts' log-ratio of every token.
            Nothing else is computed, and what needs no reference loads none.
        settings: the arguments of `per_pair` beside the statistics, and their published defaults.
    """

    source: str
    level: str

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]: ...

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]: ...

    @abstractmethod
    def per_pair(self, pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
        """The loss of each pair, in nats, unreduced."""

    @property
    def is_local(self) -> bool:
        """Whether the loss is a sum over the steps both responses have, each looked at by itself.

        Then `per_step` exists, and loss and gradients come out of one pass (docs/method.md §5).
        """
        return False

    def per_step(self, step: StepStatistics, **settings: Any) -> Float[Tensor, "steps"]:
        """The loss of each step, where `is_local`."""
        raise NotImplementedError(f"{type(self).__name__} is not local to its steps")

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference model to be loaded and run."""
        return "ref_log_probs" in self.needs

    @property
    def state_weight(self) -> Literal["none", "kl", "baseline"]:
        """What corrects for the two prefixes being different states (docs/method.md §2)."""
        return "none"

    @property
    def cost(self) -> str:
        """Its class of cost (docs/performance.md): what is run, and what the vocabulary costs."""
        passes = "one pass" if self.is_local else "two passes"
        models = "policy" if not self.has_reference else "policy and reference"
        kl = " + KL" if "kl_ref_policy" in self.needs else ""
        tokens = "shared steps" if self.is_local else "whole responses"
        return f"{models}{kl}; {tokens}, {passes}"


@dataclass(frozen=True)
class PairLoss(Method):
    """A method that is a function of its own."""

    function: Callable[..., Float[Tensor, "pairs"]]
    source: str
    level: str
    defaults: Mapping[str, Any]
    needs_beside: frozenset[Need] = field(default=frozenset({"ref_log_probs"}))

    @property
    def needs(self) -> frozenset[Need]:
        return self.needs_beside

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.defaults

    def per_pair(self, pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
        return self.function(pair, **{**self.defaults, **settings})
