"""`tokenratio compare A B ...`: tests whether evaluated policies differ by more than chance."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.results import PolicyMeasures
from tokenratio.names import require_at_least, split_name
from tokenratio.run_folder import replace_text
from tokenratio.settings import option

if TYPE_CHECKING:
    from tokenratio.evaluation.paired_comparison import PolicyComparison

USAGE = """usage: tokenratio compare A B ... [--flag value ...]

A, B, ... are folders that `tokenratio evaluate` wrote for a policy, or NAME=FOLDER,FOLDER,... with
one folder per training seed. Differences are paired by prompt, and by seed if there are several;
p-values are corrected for the number of comparisons (Holm).

The exit code is 0; with --require MEASURE it is 1 unless A is significantly better than all others.
"""


@dataclass(frozen=True)
class CompareOptions:
    """The options of `compare`."""

    measures: list[str] | None = option(
        None, "Measures to compare. Default: all for which higher or lower is better."
    )
    all_pairs: bool = option(False, "Compare all pairs of policies, not only A with the others.")
    require: str | None = option(None, "Exit with 1 unless A is better in this measure.")
    num_resamples: int = option(10_000, "Resamples of the bootstrap and the sign-flip test.")
    seed: int = option(0, "Seed of the resampling.")
    output: str | None = option(None, "JSON file to write all figures to.")

    def __post_init__(self) -> None:
        require_at_least(100, num_resamples=self.num_resamples)
        require_at_least(0, seed=self.seed)
        if self.output is not None and Path(self.output).is_dir():
            raise TokenRatioError(f"--output {self.output} is a folder")


def report_comparisons(policies: list[str], options: CompareOptions) -> int:
    """Print every comparison; returns 1 if A is not better in the measure `require`, else 0."""
    from tokenratio.evaluation.comparison import compare

    named: dict[str, list[PolicyMeasures]] = {}
    for name, runs in map(_runs, policies):
        if name in named:
            raise TokenRatioError(
                f"two policies have the name {name}: name them, as in a=FOLDER b=FOLDER"
            )
        named[name] = runs

    def report(note: str) -> None:
        print(note)
        if options.require is not None:
            raise TokenRatioError("--require needs evaluations with the same settings")

    found = compare(
        named,
        measures=options.measures,
        require=options.require,
        all_pairs=options.all_pairs,
        num_resamples=options.num_resamples,
        seed=options.seed,
        report=report,
    )
    for comparison in found:
        print(f"{comparison.measure}: {comparison.line()}")
    if options.output is not None:
        document = json.dumps([_figures(comparison) for comparison in found], indent=2)
        replace_text(Path(options.output), document + "\n")
    first = next(iter(named))
    required = [c for c in found if c.measure == options.require and c.name_a == first]
    return 0 if all(comparison.a_is_better for comparison in required) else 1


COMMAND = Command(
    USAGE,
    report_comparisons,
    argument="two or more policies",
    several=True,
    least=2,
    options=CompareOptions,
)


def _runs(given: str) -> tuple[str, list[PolicyMeasures]]:
    """The name and the measures of `FOLDER` or `NAME=FOLDER,FOLDER,...`."""
    name, paths = split_name(given)
    runs = [PolicyMeasures.load(path) for path in paths.split(",")]
    return name or runs[0].policy, runs


def _figures(comparison: "PolicyComparison") -> dict[str, Any]:
    names = ("measure", "name_a", "name_b", "difference", "p_value", "adjusted_p", "num_prompts")
    return {
        **{name: getattr(comparison, name) for name in names},
        "standard_error": comparison.standard_error,
        "interval": list(comparison.interval),
        "significant": bool(comparison.significant),
        "num_seeds": comparison.num_seeds,
        "num_unpaired": comparison.num_unpaired,
    }
