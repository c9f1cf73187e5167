"""What the step is to reach: the rows of the ratio table, with their bounds."""

from dataclasses import dataclass

Bound = tuple[float, float | None] | None  # time ratio, memory ratio


@dataclass(frozen=True)
class Target:
    """One ratio of two cases on the same batches.

    Attributes:
        label: as the table names it.
        workload: how the row's workload begins; None for the default.
        bounds: by model; None where a figure is only reported.
    """

    label: str
    ours: str
    peer: str
    bounds: dict[str, Bound]
    workload: str | None = None

    @property
    def study(self) -> str:
        return "step" if self.workload is None else "prompt"


TARGETS = (
    Target(
        "TBPO-A ÷ TRL DPO as installed (on CPU it scores every position)",
        "tbpo_a",
        "trl_dpo",
        {"32k": (0.20, 0.20), "128k": (0.17, 0.20)},
    ),
    Target(
        "TBPO-A ÷ TRL DPO restricted to completion tokens (as on CUDA: the fair peer)",
        "tbpo_a",
        "trl_dpo_completions",
        {"32k": (0.35, 0.35), "128k": (0.35, 0.40)},
    ),
    Target(
        "TBPO-A ÷ Liger's chunked linear DPO loss",
        "tbpo_a",
        "liger_dpo",
        {"32k": (0.40, 0.55), "128k": (0.38, 0.40)},
    ),
    Target(
        "TBPO-A ÷ straightforward TBPO-A",
        "tbpo_a",
        "straightforward",
        {"32k": (0.25, 0.22), "128k": (0.18, 0.07)},
    ),
    *(
        Target(
            f"pruned and prefix-shared ÷ neither, prompt {tokens} tokens",
            "tbpo_a",
            "tbpo_a_neither",
            {"32k": (bound, None)},
            workload,
        )
        for workload, tokens, bound in (("tldr", 366, 0.55), ("hh", 124, 0.6), ("alpaca", 46, 0.63))
    ),
    Target(
        "TBPO-A ÷ uncorrected TBPO", "tbpo_a", "tbpo", {"32k": (1.15, None), "128k": (1.25, None)}
    ),
    Target(
        "TBPO-Q ÷ uncorrected TBPO", "tbpo_q", "tbpo", {"32k": (1.05, None), "128k": (1.05, None)}
    ),
    Target("TBPO-A ÷ transformer bodies alone (the floor)", "tbpo_a", "body", {}),
)
