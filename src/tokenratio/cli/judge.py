"""`tokenratio judge OURS --against THEIRS --judge NAME`: compares two sets of responses."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.registry import JUDGES, judge_settings
from tokenratio.names import require_at_least
from tokenratio.settings import Field, build, check_known, fields_of, option

if TYPE_CHECKING:
    from tokenratio.evaluation.response_files import AnsweredPrompt

USAGE = """usage: tokenratio judge OURS --against THEIRS --judge NAME [--flag value ...]

OURS is a file written by `tokenratio generate`. THEIRS is a second one for the same prompts, or the
data source of the prompts, with the opponent's responses in its column --column. The judges and the
settings they need, as in a recipe of `evaluate`:

{judges}

Writes a line per comparison to --output and all figures to a .summary.json file next to it. Run the
same command again to resume; comparisons already in the output are not judged (or paid for) again.
"""


@dataclass(frozen=True)
class JudgeOptions:
    """Settings of `judge`, apart from those of the judge itself."""

    against: str = option("", "The opponent's responses: a file of generations or a data source.")
    judge: str = option("", f"One of {', '.join(JUDGES)}.")
    output: str = option(
        "judgements.jsonl",
        "Output file. If it was made with the same judge and responses, it is resumed.",
    )
    overwrite: bool = option(False, "Replace an existing output.")
    column: str | None = option(
        None, "If --against is a data source: column of the opponent's responses. Default: chosen."
    )
    split: str | None = option(
        None, "If --against is a data source: its split, the same as for the prompts."
    )
    num_prompts: int | None = option(None, "Use only the first N prompts.")
    seed: int = option(0, "Seed of the interval and of the order in a human judge's sheet.")

    def __post_init__(self) -> None:
        for name in ("against", "judge"):
            if not getattr(self, name):
                raise TokenRatioError(f"judge needs --{name}")
        check_known([self.judge], JUDGES, "judge")
        require_at_least(1, num_prompts=self.num_prompts)
        require_at_least(0, seed=self.seed)


# The kinds of judges that have each setting.
_KINDS: dict[str, list[str]] = {}
for _kind, _settings in JUDGES.items():
    for _name in fields_of(_settings):
        _KINDS.setdefault(_name, []).append(_kind)


def _fields() -> dict[str, Field]:
    """The command's flags, then the settings of the judges."""
    own = fields_of(JudgeOptions)
    return own | {name: _field(name, kinds) for name, kinds in _KINDS.items() if name not in own}


def _field(name: str, kinds: list[str]) -> Field:
    """A judge's setting, with the kinds that have it in its help."""
    helps: dict[str, list[str]] = {}
    for kind in kinds:
        helps.setdefault(fields_of(JUDGES[kind])[name].help, []).append(kind)
    text = " ".join(f"{', '.join(of)}: {help}" for help, of in helps.items())
    return replace(fields_of(JUDGES[kinds[0]])[name], help=text)


def judge_files(ours_path: str, flags: Mapping[str, str | bool]) -> None:
    """Judge a file of generations against another or a data source; print and write the figures."""
    own = fields_of(JudgeOptions)
    options = build(JudgeOptions, {k: v for k, v in flags.items() if k in own}, "judge")
    kind = options.judge
    for flag in flags:
        if flag not in own and kind not in _KINDS[flag]:
            applies = " and ".join(_KINDS[flag])
            raise TokenRatioError(f"--{flag} applies only to judge {applies}, not to {kind}")
    judge_fields = fields_of(JUDGES[kind])
    settings = judge_settings(kind, {k: v for k, v in flags.items() if k in judge_fields})
    from tokenratio.cli.outputs import check_output
    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.evaluation.inputs import ModelPool
    from tokenratio.evaluation.journal import read_settings
    from tokenratio.evaluation.judges.model_settings import ImplicitSettings, RewardModelSettings
    from tokenratio.evaluation.judges.protocol import JudgeContext, digest_of
    from tokenratio.evaluation.response_files import date_of_responses, read_responses
    from tokenratio.evaluation.verdict_files import judge_all, pair_up
    from tokenratio.evaluation.win_report import describe_summary, summarize
    from tokenratio.models.device import describe_device
    from tokenratio.run_folder import replace_text

    quiet_libraries()
    path = Path(options.output)
    given = (ours_path, options.against, getattr(settings, "sheet", None))
    check_output(path, [Path(name) for name in given if name is not None])
    ours = read_responses(ours_path)[: options.num_prompts]
    theirs, opponent = _read_theirs(options)
    comparisons = pair_up(ours, theirs)
    if isinstance(settings, ImplicitSettings | RewardModelSettings):
        print(f"device: {describe_device()}; float32")
    judge = settings.make(
        JudgeContext(
            world=options.against,
            reference=None,
            folder=path.parent,
            cache=Path("~/.cache/tokenratio/verdicts.sqlite").expanduser(),
            comparisons=comparisons,
            load_model=ModelPool().model,
            day=date_of_responses(Path(ours_path)),
            progress=is_terminal(),
        )
    )
    if judge is None:  # a sheet for people to fill in has been written
        return
    # Digests of settings instead of paths: files may be moved, and the texts are checked anyway.
    sides = {"ours": _made_by(ours), "theirs": opponent or _made_by(theirs)}
    judgements = judge_all(comparisons, judge, path, sides, overwrite=options.overwrite)
    summary = {
        "ours": ours_path,
        "theirs": options.against,
        **({} if opponent is None else {"column": opponent["column"]}),
        "judge": kind,
        "settings": next(iter(read_settings(path).values())),
        **summarize(
            judgements,
            prompts=[digest_of(comparison.content()[0]) for comparison in comparisons],
            order_matters=judge.order_matters,
            seed=options.seed,
        ),
    }
    replace_text(
        path.with_suffix(".summary.json"),
        json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    )
    print(describe_summary(summary))


def _describe_judge(kind: str) -> str:
    settings = JUDGES[kind]
    needs = ", ".join(f"--{name}" for name in settings.required)
    text = f"{kind:14}{settings.__doc__}" + (f" Needs {needs}." if needs else "")
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent=" " * 16)


COMMAND = Command(
    USAGE.format(judges="\n".join(map(_describe_judge, JUDGES))),
    judge_files,
    argument="one file of generations",
    fields=_fields,
)


def _read_theirs(options: JudgeOptions) -> "tuple[list[AnsweredPrompt], dict[str, Any] | None]":
    """The opponent's responses, and for a data source its name, split and column."""
    from tokenratio.evaluation.response_files import dataset_responses, read_responses

    name = options.against
    if options.column is None and _holds_generations(Path(name)):
        if options.split is not None:
            raise TokenRatioError(
                f"--split applies only to data sources; {name} is a file of generations"
            )
        return read_responses(name)[: options.num_prompts], None
    column = options.column or "chosen"
    theirs = dataset_responses(name, column=column, split=options.split)
    source = {"source": name, "split": options.split, "column": column}
    return theirs[: options.num_prompts], source


def _holds_generations(path: Path) -> bool:
    """Whether the first line has samples with texts, unlike a data set."""
    try:
        with path.open("rb") as file:
            samples = json.loads(file.readline())["samples"]
        return isinstance(samples[0]["text"], str)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _made_by(generations: "list[AnsweredPrompt]") -> str:
    return " ".join(sorted({generation.settings for generation in generations}))
