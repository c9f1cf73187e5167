"""The stage that judges: each policy's responses against the opponent's, with every judge."""

from collections.abc import Callable
from dataclasses import replace

from tokenratio.evaluation.judges.human import HumanSettings
from tokenratio.evaluation.judges.protocol import Judge, JudgeContext
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.results import Measure
from tokenratio.evaluation.verdict_files import judge_all, pair_up
from tokenratio.evaluation.win_report import measure_judgements


class VerdictStage:
    """The judges of an evaluation; each is made once, so that a budget covers all policies.

    Args:
        context: for all policies; its folder is the evaluation's.
    """

    def __init__(self, options: EvaluateOptions, context: JudgeContext) -> None:
        self._against, self._context = options.against, context
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
            note: receives what a reader of the measures must know.
        """
        measures = []
        comparisons = pair_up(generations, opponents)
        folder = self._context.folder / name
        context = replace(self._context, folder=folder, comparisons=comparisons)
        for judge_name, settings in self._settings.items():
            judge = self._judges.get(judge_name) or settings.make(context)
            if judge is None:
                continue
            is_human = isinstance(settings, HumanSettings)
            if not is_human:  # people have a sheet for each policy
                self._judges[judge_name] = judge
            path = folder / f"judgements-{judge_name}.jsonl"
            if is_human:  # the sheet is kept instead, and more of it may be filled in by now
                path.unlink(missing_ok=True)
            against = {"against": self._against}
            found = judge_all(comparisons, judge, path, against, report=context.report)
            measures += measure_judgements(
                found, judge_name, order_matters=judge.order_matters, report=note
            )
        return measures
