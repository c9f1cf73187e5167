"""`tokenratio evaluate RECIPE|RUN ...`: generate, judge, measure; every figure with its error."""

from typing import Any

from tokenratio.cli.command import Command, read_yaml
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.settings import build, fields_of

USAGE = """usage: tokenratio evaluate RECIPE.yaml|RUN ... [--flag value ...]

RUN is a folder of a run, another model's folder or hub name, a file of generations, or NAME=one of
these. A recipe's keys and the flags are the same; flags win. Every stage writes a file, which is
resumed: OUTPUT/NAME/generations.jsonl, judgements-JUDGE.jsonl, measures.json; OUTPUT/table.md.
"""


def print_evaluation(runs: list[str], flags: dict[str, Any]) -> None:
    """Evaluate the runs, or those that one recipe names, and print the table."""
    where = "evaluate"
    if len(runs) == 1 and runs[0].endswith((".yaml", ".yml")):
        where = runs.pop()
        flags = {**read_yaml(where), **flags}
    options = build(EvaluateOptions, flags, where)
    runs = runs or options.runs or []
    if not runs:
        raise TokenRatioError(f"evaluate needs {_ARGUMENT}: {USAGE.splitlines()[0]}")
    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.evaluation import evaluate
    from tokenratio.evaluation.results import table

    quiet_libraries()
    policies = evaluate(runs, options, progress=is_terminal())
    print(table(policies))


_ARGUMENT = "a recipe with runs, or runs"
COMMAND = Command(
    USAGE,
    print_evaluation,
    argument=_ARGUMENT,
    several=True,
    least=0,
    fields=lambda: fields_of(EvaluateOptions),
)
