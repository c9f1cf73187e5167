"""A preference method: its loss, what has to be computed for it, and its settings."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tokenratio.types import PairStatistics, StepStatistics

Need = Literal["ref_log_probs", "kl_ref_policy", "baseline", "contrast"]
REFERENCE: frozenset[Need] = frozenset({"ref_log_probs"})


class Method(ABC):
    """A preference loss and what has to be computed for it.

    Attributes:
        source: the paper, and the equation in it.
        level: what is compared (docs/method.md §6).
        needs: what the loss reads besides the policy's log-probabilities of both responses:
            `ref_log_probs`; `kl_ref_policy`, the exact KL at every state; `baseline`, a learned one
            (docs/method.md §4); `contrast`, the log-ratio of every token between two models or
            prompts. Nothing else is computed, and a method without a reference loads none.
        settings: the arguments of `per_pair` besides the statistics, with their published defaults.
    """

    source: str
    level: str
    needs: frozenset[Need]
    settings: Mapping[str, Any]

    @abstractmethod
    def per_pair(self, pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
        """The loss of each pair, in nats, unreduced; defaults apply to settings left out."""

    def per_step(self, steps: StepStatistics, **settings: Any) -> Float[Tensor, "*steps"]:
        """The loss of each step, if `is_local`."""
        raise NotImplementedError(f"{type(self).__name__} is not local to its steps")

    @property
    def is_local(self) -> bool:
        """Whether the loss adds up the steps both responses have, each computed from that step.

        Then `per_step` exists, and loss and gradients come out of one pass (docs/method.md §5).
        """
        return False

    @property
    def has_reference(self) -> bool:
        """Whether a reference model is loaded and run."""
        return "ref_log_probs" in self.needs

    @property
    def needs_kl(self) -> bool:
        """Whether the loss reads KL(π_ref ‖ π), and so the reference's whole distribution."""
        return "kl_ref_policy" in self.needs

    @property
    def needs_baseline(self) -> bool:
        """Whether a state baseline is trained as well."""
        return "baseline" in self.needs

    @property
    def needs_contrast(self) -> bool:
        """Whether tokens must be scored before training (`tokenratio score-tokens`)."""
        return "contrast" in self.needs

    @property
    def cost(self) -> str:
        """Its class of cost (docs/performance.md): which models run, and over which tokens."""
        passes = "one pass" if self.is_local else "two passes"
        models = "policy and reference" if self.has_reference else "policy"
        kl = " + KL" if self.needs_kl else ""
        tokens = "shared steps" if self.is_local else "whole responses"
        return f"{models}{kl}; {tokens}, {passes}"

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: those given, defaults for the rest; `TypeError` for those it does not have.

        A generator is ignored where the method fixes its own, so that one call fits all methods.
        """
        unknown = given.keys() - self.settings.keys() - {"generator"}
        if unknown:
            raise TypeError(f"this loss takes no {', '.join(sorted(unknown))}")
        return {name: given.get(name, default) for name, default in self.settings.items()}


@dataclass(frozen=True)
class PairLoss(Method):
    """A method that is a function of whole pairs."""

    function: Callable[..., Float[Tensor, "pairs"]]
    source: str
    level: str
    settings: Mapping[str, Any]
    needs: frozenset[Need] = REFERENCE

    def per_pair(self, pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
        return self.function(pair, **self.complete(settings))
