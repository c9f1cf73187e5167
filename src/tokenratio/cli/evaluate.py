"""`tokenratio evaluate RECIPE|RUN ...`: generates, judges and measures, with standard errors."""

from typing import Any

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.settings import build, fields_of
from tokenratio.yaml_text import read_yaml

USAGE = """usage: tokenratio evaluate RECIPE.yaml|RUN ... [--flag value ...]

RUN is the folder of a run or of another model, a hub name, a file of generations, or NAME=one of
these. Every setting can be a key of the recipe or a flag; flags take precedence. Each run gets a
folder in --output_dir with generations.jsonl, judgements-JUDGE.jsonl and measures.json; table.md
compares all runs. Run the same command again to resume.
"""


def print_evaluation(runs: list[str], flags: dict[str, Any]) -> None:
    """Evaluate the given runs, or those of a recipe, and print the table."""
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


_ARGUMENT = "runs, or a recipe with runs"
COMMAND = Command(
    USAGE,
    print_evaluation,
    argument=_ARGUMENT,
    several=True,
    least=0,
    fields=lambda: fields_of(EvaluateOptions),
)
