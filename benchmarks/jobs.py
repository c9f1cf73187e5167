"""What is measured: which case on which model and batches, for which question."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lengths
from cases import CASES
from lengths import Lengths
from models import MODELS, ModelSpec

STUDIES = ("step", "prompt", "growth")
PRODUCT = "matrix_product"  # the bare product of the head, not a step
_GROWTH_CASES = ("tbpo_a", "trl_dpo_completions")
_PROMPT_CASES = ("tbpo_a", "tbpo_a_pruned", "tbpo_a_neither")
_PAIRS, _BATCHES = 4, 2
_GROWTH_ROUNDS = 1  # curves need less precision than ratios


@dataclass(frozen=True)
class Job:
    """One process's work; the fields go into its row of the results."""

    study: str
    x: int
    workload: str
    model: str
    spec: ModelSpec
    case: str
    batches: list[list[Lengths]]
    rounds: int


def cpu_jobs(
    studies: Sequence[str], models: Sequence[str], cases: Sequence[str], rounds: int
) -> list[Job]:
    jobs = []
    for study in studies:
        if study == "growth":
            jobs += _growth(cases, min(rounds, _GROWTH_ROUNDS))
            continue
        names = [lengths.DEFAULT] if study == "step" else ["tldr", "hh", "alpaca"]
        chosen = (*CASES, PRODUCT) if study == "step" else _PROMPT_CASES
        for name in names:
            batches = lengths.draw(name, batches=_BATCHES, pairs=_PAIRS)
            source = name if lengths.has_data() else f"{name} (synthetic)"
            workload = f"{source}: {lengths.describe(batches)}"
            for model in models:
                for case in chosen:
                    if case in cases:
                        spec = MODELS[model]
                        jobs.append(Job(study, 0, workload, model, spec, case, batches, rounds))
    return jobs


def cuda_jobs(models: Sequence[str], cases: Sequence[str], rounds: int) -> list[Job]:
    """Two rows of 1,024 tokens for each of 8 pairs: nothing to prune, a quarter of it prompt."""
    batches = [[(256, 768, 768)] * 8] * 2
    workload = f"fixed: {lengths.describe(batches)}"
    return [
        Job("step", 0, workload, model, MODELS[model], case, batches, rounds)
        for model in models
        for case in (*CASES, PRODUCT)
        if case in cases
    ]


def smoke_jobs() -> list[Job]:
    batches = [[(9, 12, 5), (4, 3, 8)]]
    return [
        Job("step", 0, "smoke", "32k", MODELS["smoke"], case, batches, 1)
        for case in ("tbpo_a", "straightforward")
    ]


def _growth(cases: Sequence[str], rounds: int) -> Iterator[Job]:
    points = [("vocabulary", v, v, 192, 4) for v in (8_000, 16_000, 32_000, 64_000, 128_000)]
    points += [("length", n, 32_000, n, 2) for n in (64, 128, 256, 512, 1024)]
    points += [("pairs", b, 32_000, 192, b) for b in (1, 2, 4, 8, 16)]
    for study, x, vocabulary, response, pairs in points:
        spec = ModelSpec(256, 4, 4, 688, vocabulary)
        # min/max as in real data; either side may be the longer one.
        shorter = round(0.55 * response)
        sides = [(response, shorter), (shorter, response)]
        batches = [[(response // 2, *sides[i % 2]) for i in range(pairs)]]
        workload = f"fixed: {lengths.describe(batches)}"
        for case in _GROWTH_CASES:
            if case in cases:
                yield Job(study, x, workload, "growth", spec, case, batches, rounds)
