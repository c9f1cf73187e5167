"""The stage that judges: each policy's responses against the opponent's, with every judge."""

from collections.abc import Callable
from pathlib import Path

from tokenratio.evaluation.inputs import ModelPool
from tokenratio.evaluation.judges.human import HumanSettings
from tokenratio.evaluation.judges.protocol import Judge, JudgeContext
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.evaluation.policy_measures import measure_judgements
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.results import Measure
from tokenratio.evaluation.verdict_files import judge_all, pair_up


class VerdictStage:
    """The judges of an evaluation; each is made once, so that a budget covers all policies.

    Args:
        reference: path of the reference, for judges that need one.
        day: what chat templates take for today, if it is fixed.
        report: receives what was kept of an earlier call and how the judging went.
        progress: draw progress bars.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        *,
        reference: str | None,
        models: ModelPool,
        day: str | None,
        report: Callable[[str], None],
        progress: bool,
    ) -> None:
        self._options, self._report = options, report
        self._reference, self._models = reference, models
        self._day, self._progress = day, progress
        self._settings = options.judge_settings()
        self._judges: dict[str, Judge] = {}

    def measure(
        self,
        name: str,
        generations: list[AnsweredPrompt],
        opponents: list[AnsweredPrompt],
        note: Callable[[str], None],
    ) -> list[Measure]:
        """Judge one policy and measure the outcome; judgements go to its folder.

        Args:
            name: of the policy.
            note: receives what a reader of the measures has to know.
        """
        measures = []
        comparisons = pair_up(generations, opponents)
        folder = Path(self._options.output_dir)
        for judge_name, settings in self._settings.items():
            context = JudgeContext(
                world=self._options.prompts,
                reference=self._reference,
                folder=folder / name,
                cache=folder / "verdicts.sqlite",
                comparisons=comparisons,
                load_model=self._models.model,
                day=self._day,
                report=self._report,
                progress=self._progress,
            )
            judge = self._judges.get(judge_name) or settings.make(context)
            if judge is None:
                continue
            is_human = isinstance(settings, HumanSettings)
            if not is_human:  # people have a sheet for each policy
                self._judges[judge_name] = judge
            path = folder / name / f"judgements-{judge_name}.jsonl"
            if is_human:  # the sheet is what is kept, and it may have been filled in further
                path.unlink(missing_ok=True)
            found = judge_all(
                comparisons, judge, path, {"against": self._options.against}, report=self._report
            )
            measures += measure_judgements(
                found, judge_name, order_matters=judge.order_matters, report=note
            )
        return measures
