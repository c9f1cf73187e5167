"""Every case by name."""

from collections.abc import Callable
from dataclasses import dataclass

from models import Models
from ours import ours
from peers import body, liger_dpo, straightforward_tbpo_a, trl_dpo, trl_dpo_completions
from step_case import Step


@dataclass(frozen=True)
class Case:
    """A way to take a step.

    Attributes:
        label: as tables name it.
        make: builds it on models; raises `UnavailableError`.
        agrees_with: cases of the same name here have one loss and one gradient; None stands alone.
    """

    label: str
    make: Callable[[Models], Step]
    agrees_with: str | None = None


CASES = {
    "tbpo_a": Case("TBPO-A", ours("tbpo_a"), "TBPO-A"),
    "tbpo_q": Case("TBPO-Q", ours("tbpo_q"), "uncorrected TBPO"),
    "tbpo": Case("uncorrected TBPO", ours("tbpo"), "uncorrected TBPO"),
    "dpo": Case("our DPO", ours("dpo"), "DPO"),
    "tbpo_a_pruned": Case("TBPO-A, pruned only", ours("tbpo_a", share=False), "TBPO-A"),
    "tbpo_a_neither": Case(
        "TBPO-A, neither pruned nor shared", ours("tbpo_a", prune=False, share=False), "TBPO-A"
    ),
    "straightforward": Case("straightforward TBPO-A", straightforward_tbpo_a, "TBPO-A"),
    "trl_dpo": Case("TRL DPO as installed", trl_dpo, "DPO"),
    "trl_dpo_completions": Case(
        "TRL DPO restricted to completion tokens", trl_dpo_completions, "DPO"
    ),
    "liger_dpo": Case("Liger's chunked linear DPO loss", liger_dpo, "DPO"),
    "body": Case("transformer bodies alone", body),
}
