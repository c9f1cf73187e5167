"""`tokenratio judge OURS --against THEIRS --judge NAME`: whose responses are better."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.cli.endpoint_options import (
    ENDPOINT_FLAGS,
    EndpointOptions,
    refuse_idle,
    split_flags,
)
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.registry import (
    JUDGES,
    ImplicitSettings,
    JudgeContext,
    LLMSettings,
    RewardModelSettings,
    make_judge,
)
from tokenratio.models.template_options import TEMPLATE_FLAGS, TemplateOptions
from tokenratio.settings import build, fields_of, option

if TYPE_CHECKING:
    from tokenratio.evaluation.response_files import AnsweredPrompt

USAGE = """usage: tokenratio judge OURS --against THEIRS --judge NAME [--flag value ...]

OURS is a file of generations. THEIRS is another of the same prompts, or the source that the prompts
came from, whose --column then holds the opponent's responses. Each judge has its own flags:

  gold          --world WORLD: its true reward
  reward-model  --reward_model MODEL: a sequence classifier with one output, hub name or folder
  implicit      --policy MODEL --reference MODEL --beta NUMBER: β times the policy's log-ratio
  llm           --endpoint URL --model NAME --template NAME: a model behind an endpoint, both orders
                asked; the cost is estimated before the first request
  human         --sheet FILE: written to be filled in; run the same command again to read it

Writes a line per comparison to --output and all figures to the .summary.json beside it. The same
command resumes an interrupted one; nothing is asked, or paid for, twice.
"""

# The flags that only some judges heed, each with what it is called among that judge's settings.
_SETTINGS: dict[str, dict[str, str]] = {
    "gold": {"world": "world"},
    "reward-model": {
        "reward_model": "model",
        "batch_size": "batch_size",
        "max_length": "max_length",
        **{name: name for name in TEMPLATE_FLAGS},
    },
    "implicit": {
        name: name for name in ("policy", "reference", "beta", "batch_size", *TEMPLATE_FLAGS)
    },
    "llm": {
        **{name: name for name in ("model", "template", "temperature", "max_tokens")},
        **{name: name for name in ENDPOINT_FLAGS},
        "endpoint": "base_url",
    },
    "human": {"sheet": "sheet"},
}
# The names of `TEMPLATES`, of evaluation.judges, which imports torch.
_TEMPLATES = ("mt-bench", "hh-helpful", "hh-harmless", "tldr")
_NEEDED = {
    "reward-model": ("reward_model",),
    "implicit": ("policy", "reference"),
    "llm": ("endpoint", "model"),
    "human": ("sheet",),
}


@dataclass
class JudgeOptions(TemplateOptions):
    """What `judge` can be told, the endpoint apart."""

    against: str = option("", "The other side: a file or a data source.")
    judge: str = option("", f"One of {', '.join(JUDGES)}.")
    output: str = option(
        "judgements.jsonl",
        "Output file. If it was made with the same judge and sides, it is resumed.",
    )
    overwrite: bool = option(False, "Replace an existing output.")
    column: str | None = option(
        None, "If --against is a data source: column of the opponent's responses. [chosen]"
    )
    split: str | None = option(
        None, "If --against is a data source: its split, the same as for the prompts."
    )
    num_prompts: int | None = option(None, "Use only the first N prompts of both sides.")
    seed: int = option(0, "Seed of the interval, and of the order on a human judge's sheet.")
    world: str | None = option(
        None, "gold: the world, such as reviews; default: that of --against."
    )
    reward_model: str | None = option(None, "reward-model: hub name or folder.")
    policy: str | None = option(None, "implicit: hub name or folder.")
    reference: str | None = option(None, "implicit: hub name or folder.")
    beta: float = option(
        ImplicitSettings.beta,
        "implicit: scale of the reward; which response wins does not depend on it.",
    )
    batch_size: int = option(
        RewardModelSettings.batch_size, "Rows at once; applies only to local models."
    )
    max_length: int | None = option(
        None, "reward-model: rows with more tokens than this get no verdict."
    )
    model: str | None = option(None, "llm: the model's name on the server.")
    template: str = option(
        LLMSettings.template, f"llm: the question asked, one of {', '.join(_TEMPLATES)}."
    )
    temperature: float | None = option(
        LLMSettings.temperature, "llm: sampling temperature; null leaves it to the server."
    )
    max_tokens: int | None = option(
        LLMSettings.max_tokens,
        "llm: most tokens in an answer; default: the template's. Judges that reason need more.",
    )
    cache: str = option(
        "~/.cache/tokenratio/verdicts.sqlite", "llm: database of answers, shared by all runs."
    )
    sheet: str | None = option(None, "human: the file to fill in.")

    def __post_init__(self) -> None:
        for name in ("against", "judge"):
            if not getattr(self, name):
                raise TokenRatioError(f"judge needs --{name}")
        if self.judge not in JUDGES:
            raise TokenRatioError(f"no judge {self.judge!r}; there are: {', '.join(JUDGES)}")
        for name in ("num_prompts", "batch_size", "max_length", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TokenRatioError(f"{name} must be at least 1, not {value}")
        if self.seed < 0:
            raise TokenRatioError(f"seed must be at least 0, not {self.seed}")


def judge_file(ours_path: str, flags: dict[str, str | bool]) -> None:
    """Compare two files of generations with a judge; write its judgements and their summary."""
    own, remote = split_flags(flags)
    options = build(JudgeOptions, own, "judge")
    build(EndpointOptions, remote, "judge")  # refuses what the judge's settings would let pass
    _check_flags(options.judge, flags)
    from tokenratio.cli.judge_summary import describe, summarize
    from tokenratio.cli.outputs import check_output
    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.data.worlds import is_world_source
    from tokenratio.evaluation.journal import read_settings
    from tokenratio.evaluation.judges.protocol import digest_of
    from tokenratio.evaluation.response_files import (
        date_of_responses,
        read_responses,
    )
    from tokenratio.evaluation.verdict_files import judge_all, pair_up
    from tokenratio.run_folder import replace_text

    quiet_libraries()
    path = Path(options.output)
    given = (ours_path, options.against, options.sheet)
    check_output(path, [Path(name) for name in given if name is not None])
    ours = read_responses(ours_path)[: options.num_prompts]
    theirs, opponent = _read_theirs(options)
    comparisons = pair_up(ours, theirs)
    names = _SETTINGS[options.judge]
    settings = {names[flag]: value for flag, value in flags.items() if flag in names}
    if options.judge == "human":
        settings["seed"] = str(options.seed)
    context = JudgeContext(
        world=options.against if is_world_source(options.against) else None,
        reference=None,
        folder=path.parent,
        cache=Path(options.cache).expanduser(),
        comparisons=comparisons,
        day=date_of_responses(Path(ours_path)),
        progress=is_terminal(),
    )
    judge = make_judge(options.judge, settings, context)
    if judge is None:  # people are asked; their sheet is written
        return
    # By the settings' digests rather than paths: a file may be moved, and texts are checked anyway.
    sides = {"ours": _made_by(ours), "theirs": opponent or _made_by(theirs)}
    judgements = judge_all(comparisons, judge, path, sides, overwrite=options.overwrite)
    summary = {
        "ours": ours_path,
        "theirs": options.against,
        **({} if opponent is None else {"column": opponent["column"]}),
        "judge": options.judge,
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
    print(describe(summary))


COMMAND = Command(
    USAGE,
    judge_file,
    argument="one file of generations",
    fields=lambda: fields_of(JudgeOptions, EndpointOptions),
)


def _check_flags(judge: str, flags: Mapping[str, str | bool]) -> None:
    """Refuse flags that this judge would not heed, and the lack of those that it needs."""
    for flag in flags:
        heeding = [name for name, settings in _SETTINGS.items() if flag in settings]
        heeding += ["llm"] if flag == "cache" else []
        if heeding and judge not in heeding:
            refuse_idle([flag], [flag], f"is of judge {' and '.join(heeding)}, not of {judge}")
    missing = [name for name in _NEEDED.get(judge, ()) if name not in flags]
    if missing:
        raise TokenRatioError(f"judge {judge} needs --{missing[0]}")


def _read_theirs(options: JudgeOptions) -> "tuple[list[AnsweredPrompt], dict[str, Any] | None]":
    """The opponent's responses; what is said of a data source, None for a file of generations."""
    from tokenratio.evaluation.response_files import dataset_responses, read_responses

    name = options.against
    if options.column is None and _holds_generations(Path(name)):
        if options.split is not None:
            raise TokenRatioError(f"--split is of a data source; {name} is a file of generations")
        return read_responses(name)[: options.num_prompts], None
    column = options.column or "chosen"
    theirs = dataset_responses(name, column=column, split=options.split)
    said = {"source": name, "split": options.split, "column": column}
    return theirs[: options.num_prompts], said


def _holds_generations(path: Path) -> bool:
    """Whether the first line says so: a data set has no samples with texts."""
    try:
        with path.open("rb") as file:
            samples = json.loads(file.readline())["samples"]
        return isinstance(samples[0]["text"], str)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _made_by(generations: "list[AnsweredPrompt]") -> str:
    return " ".join(sorted({generation.settings for generation in generations}))
