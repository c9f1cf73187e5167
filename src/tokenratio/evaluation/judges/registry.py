"""The judges of `evaluate` and `judge`, made from what a recipe or flags say of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.budget import Budget
from tokenratio.evaluation.endpoint import EndpointSettings
from tokenratio.models.template_options import TemplateOptions, template_of
from tokenratio.settings import build, check_known, option

if TYPE_CHECKING:
    from tokenratio.evaluation.judges import Judge, ResponsePair

_NAME = re.compile(r"(?!\.)[\w.-]{1,60}")


@dataclass(frozen=True)
class JudgeContext:
    """What a judge may be made from beside its settings.

    Attributes:
        world: the prompts' source, if it is a world's.
        reference: of implicit rewards, if their judge names none.
        folder: where a sheet to be filled in goes.
        cache: the file of paid answers.
        comparisons: what will be asked.
        day: what templates that write today's date take for today, if it is fixed.
        report: receives what the user has to know or do.
        progress: draw progress bars.
    """

    world: str | None
    reference: str | None
    folder: Path
    cache: Path
    comparisons: "Sequence[ResponsePair]"
    day: str | None = None
    report: Callable[[str], None] = print
    progress: bool = False


@dataclass(frozen=True)
class GoldSettings:
    """The reward a world knows."""

    world: str | None = option(None, "Default: that of the prompts.")


@dataclass
class RewardModelSettings(TemplateOptions):
    """A sequence classifier with one output."""

    model: str = option("", "Its folder or hub name.")
    batch_size: int = option(16, "Rows run at once.")
    max_length: int | None = option(None, "Tokens; default: the model's.")
    as_chat: bool = option(True, "Through its chat template, if any.")


@dataclass
class ImplicitSettings(TemplateOptions):
    """What a policy itself prefers: β times its log-ratio to a reference."""

    policy: str = option("", "Its folder or hub name.")
    reference: str | None = option(None, "Likewise; default: the evaluation's.")
    beta: float = option(0.1, "Scale; it changes no verdict's side.")
    batch_size: int = option(16, "Rows run at once.")
    max_length: int | None = option(None, "Tokens of a row; responses are cut on the right.")
    max_prompt_length: int | None = option(None, "Tokens of a prompt, cut on the left.")


@dataclass(frozen=True)
class LLMSettings(EndpointSettings, Budget):
    """A language model behind an OpenAI-compatible endpoint."""

    base_url: str = option("", "Its address, version included.")
    model: str = option("", "Its name there.")
    template: str = option("mt-bench", "The question: see docs/evaluation.md.")
    temperature: float | None = option(0.0, "null leaves it out.")
    max_tokens: int | None = option(None, "Longest answer, reasoning included; the template's.")

    def __post_init__(self) -> None:
        EndpointSettings.__post_init__(self)
        Budget.__post_init__(self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise TokenRatioError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True)
class HumanSettings:
    """A sheet that people fill in."""

    sheet: str | None = option(None, "Default: sheet.jsonl in the policy's folder.")
    seed: int = option(0, "Which response is which, and the order.")


def make_judge(name: str, settings: Mapping[str, Any], context: JudgeContext) -> "Judge | None":
    """The judge of that name; None for people who have not judged yet: their sheet is written.

    Raises:
        TokenRatioError: settings it does not have or needs, or what the judge itself refuses.
    """
    return JUDGES[kind_of(name, settings)][1](judge_settings(name, settings), context)


def kind_of(name: str, settings: Mapping[str, Any]) -> str:
    """What kind of judge a name stands for: itself, or what its settings say under `judge`.

    Raises:
        TokenRatioError: there is no such kind, or the name cannot be a file's.
    """
    if not isinstance(settings, Mapping):
        raise TokenRatioError(f"judge {name} must hold `key: value` lines")
    kind = str(settings.get("judge", name))
    check_known([kind], JUDGES, "judge")
    if not _NAME.fullmatch(name):
        raise TokenRatioError(f"{name!r} cannot be a judge's name: letters, digits, . _ -")
    return kind


def judge_settings(name: str, settings: Mapping[str, Any]) -> Any:
    """What a judge is told, checked without loading anything.

    Raises:
        TokenRatioError: settings it does not have or needs.
    """
    kind = kind_of(name, settings)
    own = {key: value for key, value in settings.items() if key != "judge"}
    built = build(JUDGES[kind][0], own, f"judge {name}")
    for needed in _NEEDED.get(kind, ()):
        if not getattr(built, needed):
            raise TokenRatioError(f"judge {name} needs {needed}")
    return built


def _gold(settings: GoldSettings, context: JudgeContext) -> "Judge":
    from tokenratio.evaluation.judges import GoldJudge

    world = settings.world
    if world is None:
        if context.world is None or not context.world.startswith("world:"):
            raise TokenRatioError("judge gold needs world: the prompts are of none")
        world = context.world.removeprefix("world:").partition("?")[0]
    return GoldJudge.of_world(world)


def _reward_model(settings: RewardModelSettings, context: JudgeContext) -> "Judge":
    from tokenratio.evaluation.judges import RewardModelJudge
    from tokenratio.models.device import default_device
    from tokenratio.models.loading import load_tokenizer
    from tokenratio.run_folder import read_run_file

    tokenizer = load_tokenizer(settings.model)
    tokenizer, template = template_of(
        settings, tokenizer, settings.model, day=context.day, report=context.report
    )
    return RewardModelJudge.load(
        settings.model,
        {"device_map": str(default_device())},
        tokenizer=tokenizer,
        template=template,
        as_chat=settings.as_chat,
        as_trained=(read_run_file(settings.model) or {}).get("kind") == "reward model",
        batch_size=settings.batch_size,
        max_length=settings.max_length,
    )


def _implicit(settings: ImplicitSettings, context: JudgeContext) -> "Judge":
    from tokenratio.evaluation.judges import ImplicitRewardJudge
    from tokenratio.models.device import default_device
    from tokenratio.models.loading import load_model, load_tokenizer

    device = default_device()
    name = settings.reference or context.reference
    if name is None:
        raise TokenRatioError("judge implicit needs reference")
    policy, reference = load_model(settings.policy), load_model(name)
    tokenizer = load_tokenizer(settings.policy)
    tokenizer, template = template_of(
        settings, tokenizer, settings.policy, day=context.day, report=context.report
    )
    return ImplicitRewardJudge(
        policy.to(device),
        tokenizer,
        template=template,
        ref_model=reference.to(device),
        beta=settings.beta,
        name=settings.policy,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
    )


def _llm(settings: LLMSettings, context: JudgeContext) -> "Judge":
    from tokenratio.evaluation.endpoint import Endpoint
    from tokenratio.evaluation.judges import LLMJudge, VerdictCache

    def part(of: type) -> Any:
        return of(**{f.name: getattr(settings, f.name) for f in fields(of)})

    endpoint = Endpoint(
        part(EndpointSettings),
        budget=part(Budget),
        report=context.report,
        progress=context.progress,
    )
    return LLMJudge(
        endpoint,
        settings.template,
        VerdictCache(context.cache),
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
    )


def _human(settings: HumanSettings, context: JudgeContext) -> "Judge | None":
    from tokenratio.evaluation.judges import HumanJudge, write_sheet

    sheet = Path(settings.sheet) if settings.sheet else context.folder / "sheet.jsonl"
    if sheet.exists():
        judge = HumanJudge(sheet, seed=settings.seed)
        unmatched = judge.num_unmatched(context.comparisons)
        if unmatched:
            context.report(
                f"{sheet}: {unmatched} lines belong to other comparisons and are ignored"
            )
        return judge
    sheet.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(context.comparisons, sheet, seed=settings.seed)
    context.report(f'{sheet}: fill in verdict with "1", "2" or "tie", then run the same again')
    return None


_NEEDED = {
    "reward-model": ("model",),
    "implicit": ("policy",),
    "llm": ("base_url", "model"),
}
JUDGES: dict[str, tuple[type, Callable[[Any, JudgeContext], "Judge | None"]]] = {
    "gold": (GoldSettings, _gold),
    "reward-model": (RewardModelSettings, _reward_model),
    "implicit": (ImplicitSettings, _implicit),
    "llm": (LLMSettings, _llm),
    "human": (HumanSettings, _human),
}
