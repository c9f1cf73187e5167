"""`tokenratio evaluate RECIPE|RUN ...`: generate, judge, measure; every figure with its error."""

from tokenratio.cli.arguments import describe, read_flags, read_yaml
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.settings import build, fields_of

HELP = """usage: tokenratio evaluate RECIPE.yaml|RUN ... [--flag value ...]

RUN is a folder of a run, another model's folder or hub name, a file of generations, or NAME=one of
these. A recipe's keys and the flags are the same; flags win. Every stage writes a file, which is
resumed: OUTPUT/NAME/generations.jsonl, judgements-JUDGE.jsonl, measures.json; OUTPUT/table.md.
"""


def run(argv: list[str]) -> int:
    """The command; see `HELP`."""
    if "--help" in argv or "-h" in argv:
        print(f"{HELP}\n{describe(fields_of(EvaluateOptions))}")
        return 0
    positional, values = read_flags(argv, fields_of(EvaluateOptions))
    where = "evaluate"
    if len(positional) == 1 and positional[0].endswith((".yaml", ".yml")):
        where = positional.pop()
        values = {**read_yaml(where), **values}
    options = build(EvaluateOptions, values, where)
    runs = positional or options.runs
    if not runs:
        raise TokenRatioError(f"needs a recipe with runs, or runs: {HELP.splitlines()[0]}")
    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.evaluation import evaluate
    from tokenratio.evaluation.measures import table

    quiet_libraries()
    policies = evaluate(runs, options, progress=is_terminal())
    print(table(policies))
    return 0
