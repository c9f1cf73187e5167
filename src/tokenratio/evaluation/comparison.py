"""Comparing evaluated policies: which differences are more than chance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from tokenratio.data.worlds import is_world_source
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.paired_comparison import (
    PolicyComparison,
    PolicyValues,
    holm,
    paired_comparison,
)
from tokenratio.evaluation.results import Measure, PolicyMeasures

_SOURCES = ("prompts", "pairs")
# The settings of an evaluation that change what its values mean.
_SETTINGS = (
    *(*_SOURCES, "split", "num_samples", "temperature", "top_p", "max_new_tokens"),
    *("max_length", "beta", "reference", "against", "judges", "dtype", "sampling_dtype"),
)


@dataclass(frozen=True)
class _Policy:
    """A policy's measures from each of its training seeds."""

    name: str
    runs: tuple[PolicyMeasures, ...]

    def has(self, measure: str) -> bool:
        return all(run.values(measure) for run in self.runs)

    def values(self, measure: str) -> PolicyValues:
        """Those of all seeds; a seed's label is its place in the list."""
        rows = [
            (value, prompt, seed)
            for seed, run in enumerate(self.runs)
            for prompt, _, value in run.values(measure)
        ]
        values, prompts, seeds = zip(*rows, strict=True)
        return PolicyValues(self.name, values, prompts, seeds if len(self.runs) > 1 else None)


# What `tokenratio evaluate` found for a policy, or the folder it was written to.
Run = PolicyMeasures | str | Path


def compare(
    policies: Mapping[str, Run | Sequence[Run]] | Sequence[Run],
    *,
    measures: Sequence[str] | None = None,
    require: str | None = None,
    all_pairs: bool = False,
    num_resamples: int = 10_000,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> list[PolicyComparison]:
    """Compare the first policy with each of the others, p-values corrected over all comparisons.

    Args:
        policies: two or more, each a `PolicyMeasures` or a folder that `evaluate` wrote; in a
            mapping from names, each may also be a list: the training seeds of one method.
        measures: names; None for all that every policy has and for which higher or lower is better.
        require: a further measure, for which higher or lower must be better.
        all_pairs: compare every two policies.
        num_resamples, seed: of the bootstrap and of the sign-flip test.
        report: receives a note on each setting in which the evaluations differ.
    Returns:
        For each measure, the comparisons of all pairs; `line()` describes one.
    Raises:
        TokenRatioError: fewer than two policies, or two with the same name; a measure that not all
            have; evaluations on different prompts or with different seeds.
    """
    found = _policies(policies)
    if len(found) < 2:
        raise TokenRatioError(f"compare needs at least two policies, not {len(found)}")
    if len({policy.name for policy in found}) < len(found):
        raise TokenRatioError(
            "two policies have the same name: give names, as in a=FOLDER b=FOLDER"
        )
    chosen = _shared_measures(found, measures, require)
    _check_contents(found)
    for note in _setting_notes(found):
        report(note)
    pairs = list(combinations(found, 2)) if all_pairs else [(found[0], b) for b in found[1:]]
    return holm(
        [
            replace(
                paired_comparison(
                    a.values(measure.name),
                    b.values(measure.name),
                    num_resamples=num_resamples,
                    seed=seed,
                ),
                measure=measure.name,
                unit=measure.unit,
                better=measure.better,
            )
            for measure in chosen
            for a, b in pairs
        ]
    )


def _policies(policies: Mapping[str, Run | Sequence[Run]] | Sequence[Run]) -> list[_Policy]:
    def loaded(runs: Run | Sequence[Run]) -> tuple[PolicyMeasures, ...]:
        listed = [runs] if isinstance(runs, PolicyMeasures | str | Path) else runs
        return tuple(
            run if isinstance(run, PolicyMeasures) else PolicyMeasures.load(run) for run in listed
        )

    if isinstance(policies, Mapping):
        return [_Policy(name, loaded(runs)) for name, runs in policies.items()]
    alone = [loaded(run) for run in policies]
    return [_Policy(runs[0].policy, runs) for runs in alone]


def _shared_measures(
    policies: Sequence[_Policy], measures: Sequence[str] | None, require: str | None
) -> list[Measure]:
    shared = [
        measure
        for measure in policies[0].runs[0].measures
        if all(policy.has(measure.name) for policy in policies)
    ]
    names = [measure.name for measure in shared]
    wanted = list(measures or [measure.name for measure in shared if measure.better is not None])
    if require is not None and require not in wanted:
        wanted.append(require)
    for name in wanted:
        if name not in names:
            raise TokenRatioError(
                f"not every policy has values of {name!r}; all have: {', '.join(names) or 'none'}"
            )
    if not wanted:
        raise TokenRatioError("the policies share no measure that has values by prompt")
    chosen = [measure for measure in shared if measure.name in wanted]
    for measure in chosen:
        if measure.name == require and measure.better is None:
            raise TokenRatioError(
                f"neither direction of {require} is better: it cannot be required"
            )
    return chosen


def _check_contents(policies: Sequence[_Policy]) -> None:
    """Check that no id stands for different prompts or pairs."""
    known: dict[str, str] = {}
    for run in (run for policy in policies for run in policy.runs):
        for id, digest in run.contents.items():
            if known.setdefault(id, digest) != digest:
                raise TokenRatioError(
                    f"the policies were evaluated on different data: {id} differs in {run.policy}"
                )


def _setting_notes(policies: Sequence[_Policy]) -> list[str]:
    """A note on each setting that differs between the evaluations and changes their values.

    Prompts or pairs of two worlds, whose ids are only numbers, are refused.
    """
    notes = []
    for name in _SETTINGS:
        found = [run.settings.get(name) for policy in policies for run in policy.runs]
        different = [value for i, value in enumerate(found) if value not in found[:i]]
        listed = ", ".join(map(str, different))
        if name in _SOURCES and sum(is_world_source(str(value)) for value in different) > 1:
            raise TokenRatioError(f"the policies were evaluated on different {name}: {listed}")
        if len(different) > 1:
            notes.append(f"note: the evaluations differ in {name}: {listed}")
    return notes
