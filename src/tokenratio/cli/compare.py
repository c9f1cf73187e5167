"""`tokenratio compare A B ...`: are the differences between evaluated policies more than chance?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.measures import Measure, PolicyMeasures
from tokenratio.run_folder import replace_text
from tokenratio.settings import option

if TYPE_CHECKING:  # scipy is imported by who compares
    from tokenratio.evaluation.comparison import PolicyComparison, PolicyValues

USAGE = """usage: tokenratio compare A B ... [--flag value ...]

Each is a folder that `tokenratio evaluate` wrote for a policy, or NAME=FOLDER,FOLDER,... for the
training seeds of one method. Differences are paired by prompt, and by seed where there are several;
p-values are corrected over all comparisons made (Holm).

Exit code 0; with --require MEASURE 1 unless A is better than every other in it, beyond chance.
"""


_SOURCES = ("prompts", "pairs")
# Of an evaluation's settings, those that change what its values mean.
_SETTINGS = (
    *(*_SOURCES, "split", "num_samples", "temperature", "top_p", "max_new_tokens"),
    *("max_length", "beta", "reference", "against", "judges"),
)


@dataclass(frozen=True)
class CompareOptions:
    """What `compare` can be told."""

    measures: list[str] | None = option(
        None, "Measures to compare; default: all that have a better direction."
    )
    all_pairs: bool = option(
        False, "Compare all pairs of policies, not only A with each of the others."
    )
    require: str | None = option(None, "Exit code 1 unless A is better in this measure.")
    num_resamples: int = option(10_000, "Resamples of the bootstrap and of the sign-flip test.")
    seed: int = option(0, "Seed of the resampling.")
    output: str | None = option(None, "JSON file for all figures.")

    def __post_init__(self) -> None:
        if self.num_resamples < 100:
            raise TokenRatioError(f"num_resamples must be at least 100, not {self.num_resamples}")
        if self.seed < 0:
            raise TokenRatioError(f"seed must be 0 or positive, not {self.seed}")
        if self.output is not None and Path(self.output).is_dir():
            raise TokenRatioError(f"--output {self.output} is a folder")


@dataclass(frozen=True)
class Entry:
    """One policy: its measures from every training seed."""

    name: str
    runs: tuple[PolicyMeasures, ...]

    def values(self, name: str) -> "PolicyValues":
        """Of all seeds, told apart by their place in the list."""
        from tokenratio.evaluation.comparison import PolicyValues

        prompts: list[str] = []
        values: list[float] = []
        seeds: list[int] = []
        for seed, run in enumerate(self.runs):
            measure = run.named(name)
            if measure is None or not measure.values:
                raise TokenRatioError(f"{self.name}: no values of {name} in every run")
            for prompt, _, value in measure.values:
                prompts.append(prompt)
                values.append(value)
                seeds.append(seed)
        return PolicyValues(self.name, values, prompts, seeds if len(self.runs) > 1 else None)


def report_comparisons(policies: list[str], options: CompareOptions) -> int:
    """Print every comparison; the exit code says whether what `require` names holds."""
    entries = [_entry(given) for given in policies]
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise TokenRatioError("two policies have one name: give names, as in a=FOLDER b=FOLDER")
    measures = _measures(entries, options)
    _check_contents(entries)
    notes = _setting_notes(entries)
    for note in notes:
        print(note)
    if notes and options.require is not None:
        raise TokenRatioError("--require needs evaluations made alike: see the notes above")
    found = compare(entries, measures, options)
    for measure, comparison in found:
        print(f"{measure.name}: {_line(measure, comparison)}")
    if options.output is not None:
        document = [{"measure": m.name, **_figures(c)} for m, c in found]
        replace_text(Path(options.output), json.dumps(document, indent=2) + "\n")
    if options.require is None:
        return 0
    required = [
        (measure, comparison)
        for measure, comparison in found
        if measure.name == options.require and comparison.name_a == entries[0].name
    ]
    return 0 if all(_is_better(*each) for each in required) else 1


COMMAND = Command(
    USAGE,
    report_comparisons,
    argument="two policies or more",
    several=True,
    least=2,
    options=(CompareOptions,),
)


def compare(
    entries: Sequence[Entry], measures: Sequence[Measure], options: CompareOptions
) -> list[tuple[Measure, "PolicyComparison"]]:
    """Every measure for every two policies asked for, corrected together."""
    from tokenratio.evaluation.comparison import holm, paired_comparison

    pairs = list(combinations(entries, 2)) if options.all_pairs else []
    pairs = pairs or [(entries[0], other) for other in entries[1:]]
    made = [
        (
            measure,
            paired_comparison(
                a.values(measure.name),
                b.values(measure.name),
                num_resamples=options.num_resamples,
                seed=options.seed,
            ),
        )
        for measure in measures
        for a, b in pairs
    ]
    corrected = holm([comparison for _, comparison in made])
    return [(measure, each) for (measure, _), each in zip(made, corrected, strict=True)]


def _entry(given: str) -> Entry:
    name, named, paths = given.partition("=")
    if not named or Path(given).exists():
        name, paths = "", given
    runs = tuple(PolicyMeasures.load(path) for path in paths.split(","))
    return Entry(name or runs[0].policy, runs)


def _check_contents(entries: Sequence[Entry]) -> None:
    """Refuse to pair values of different prompts or pairs that go by one id."""
    known: dict[str, str] = {}
    for run in (run for entry in entries for run in entry.runs):
        for id, digest in run.contents.items():
            if known.setdefault(id, digest) != digest:
                raise TokenRatioError(
                    f"these are evaluations on different data: {id} is another in {run.policy}"
                )


def _setting_notes(entries: Sequence[Entry]) -> list[str]:
    """In which settings the evaluations differ, where that matters.

    Raises:
        TokenRatioError: they are of two worlds' prompts, whose ids are mere numbers.
    """
    from tokenratio.data.worlds import is_world_source

    notes = []
    for name in _SETTINGS:
        found = [run.settings.get(name) for entry in entries for run in entry.runs]
        different = [value for i, value in enumerate(found) if value not in found[:i]]
        said = ", ".join(map(str, different))
        if name in _SOURCES and sum(is_world_source(str(value)) for value in different) > 1:
            raise TokenRatioError(f"these are evaluations on different {name}: {said}")
        if len(different) > 1:
            notes.append(f"note: the evaluations differ in {name}: {said}")
    return notes


def _measures(entries: Sequence[Entry], options: CompareOptions) -> list[Measure]:
    shared = [
        measure
        for measure in entries[0].runs[0].measures
        if measure.values and all(_has(entry, measure.name) for entry in entries)
    ]
    names = [measure.name for measure in shared]
    wanted = options.measures or [m.name for m in shared if m.better is not None]
    if options.require is not None and options.require not in wanted:
        wanted = [*wanted, options.require]
    for name in wanted:
        if name not in names:
            raise TokenRatioError(
                f"not every policy has values of {name!r}; all have: {', '.join(names) or 'none'}"
            )
    if not wanted:
        raise TokenRatioError("the policies share no measure that has values by prompt")
    chosen = [measure for measure in shared if measure.name in wanted]
    undirected = [m.name for m in chosen if m.name == options.require and m.better is None]
    if undirected:
        raise TokenRatioError(f"{undirected[0]} has no better direction: it cannot be required")
    return chosen


def _has(entry: Entry, name: str) -> bool:
    found = [run.named(name) for run in entry.runs]
    return all(measure is not None and measure.values for measure in found)


def _line(measure: Measure, comparison: "PolicyComparison") -> str:
    is_share = measure.unit == "share"
    unit = "points" if is_share else measure.unit
    higher = measure.better != "lower"
    said = comparison.line(scale=100 if is_share else 1, unit=unit, higher_is_better=higher)
    return said.replace("  (", " (")  # a measure without a unit


def _is_better(measure: Measure, comparison: "PolicyComparison") -> bool:
    sign = -1 if measure.better == "lower" else 1
    return comparison.significant and sign * comparison.difference > 0


def _figures(comparison: "PolicyComparison") -> dict[str, Any]:
    names = ("name_a", "name_b", "difference", "p_value", "adjusted_p", "num_prompts")
    low, high = comparison.interval
    figures = {name: getattr(comparison, name) for name in names}
    figures |= {"standard_error": comparison.standard_error, "interval": [low, high]}
    return figures | {
        "significant": bool(comparison.significant),
        "num_seeds": comparison.num_seeds,
        "num_unpaired": comparison.num_unpaired,
    }
