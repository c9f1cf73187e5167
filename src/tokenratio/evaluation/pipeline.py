"""An evaluation from prompts to measures, in stages with files between them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from tokenratio.data import describe_splits
from tokenratio.data.sources import Source, draw_worlds
from tokenratio.data.worlds import draws_from_policy
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.backends import TimedBackend, TransformersBackend
from tokenratio.evaluation.fooled_reward import fooled_reward
from tokenratio.evaluation.frontier import frontier_lines
from tokenratio.evaluation.inputs import (
    LoadedPolicy,
    ModelPool,
    PolicyTemplates,
    PromptSet,
    Subject,
    subjects_of,
)
from tokenratio.evaluation.judges.bradley_terry import weights_digest
from tokenratio.evaluation.judges.model_settings import ImplicitSettings
from tokenratio.evaluation.judges.protocol import JudgeContext
from tokenratio.evaluation.model_measures import measure_model, measure_suite
from tokenratio.evaluation.options import REFERENCE, EvaluateOptions
from tokenratio.evaluation.policy_measures import measure_log, measure_responses, measure_world
from tokenratio.evaluation.response_files import AnsweredPrompt, write_responses
from tokenratio.evaluation.results import Measure, PolicyMeasures, table
from tokenratio.evaluation.verdict_stage import VerdictStage
from tokenratio.models.device import describe_device, describe_sampling
from tokenratio.models.generation import policy_sampler
from tokenratio.models.loading import load_tokenizer
from tokenratio.models.processes import current
from tokenratio.run_folder import METRICS_FILE, replace_text

ModelMeasures = tuple[list[Measure], list[str]]
# Responses and measures by policy, the opponent's responses, digests of prompts and pairs.
ModelRuns = tuple[
    dict[str, list[AnsweredPrompt]],
    dict[str, ModelMeasures],
    list[AnsweredPrompt] | None,
    dict[str, str],
]


def evaluate(
    policies: Sequence[str | Path],
    options: EvaluateOptions,
    *,
    report: Callable[[str], None] = print,
    progress: bool = False,
) -> list[PolicyMeasures]:
    """Evaluate policies on the same prompts and pairs; the reference, if any, comes first.

    Writes `NAME/generations.jsonl`, `NAME/judgements-JUDGE.jsonl` and `NAME/measures.json` for
    each policy, and `table.md`, to `options.output_dir`. Generations and judgements that an earlier
    call with the same settings wrote there are reused.

    Args:
        policies: folders of runs, other models, or files of generations; each may be
            `NAME=` one of these.
        report: receives, line by line, what was reused and any notes.
        progress: draw progress bars.
    Raises:
        TokenRatioError: a setting, model, file or judge cannot be used; another process is using
            the output folder.
    """
    with current().held(options.output_dir):
        evaluation = _Evaluation(policies, options, report, progress)
        run = evaluation.run_models()
        # Judges and statistics: an endpoint must not be asked twice.
        return current().on_first(lambda: _conclude(evaluation.measure(*run), options, report))


def _conclude(
    found: list[PolicyMeasures], options: EvaluateOptions, report: Callable[[str], None]
) -> list[PolicyMeasures]:
    """Write the table and report what a reader must know."""
    lines = frontier_lines(found, REFERENCE)
    notes = [f"{policy.policy}: {note}" for policy in found for note in policy.notes]
    alarms = [note for note in notes if "ALARM" in note or "WATCH" in note]
    text = table(found) + "\n" + "".join(f"\n{line}\n" for line in [*lines, *alarms])
    replace_text(Path(options.output_dir) / "table.md", text)
    for line in [*notes, *lines]:
        report(line)
    return found


class _Evaluation:
    """The stages, and what the policies share: prompts, models, judges."""

    def __init__(
        self,
        policies: Sequence[str | Path],
        options: EvaluateOptions,
        report: Callable[[str], None],
        progress: bool,
    ) -> None:
        self._options, self._report, self._progress = options, report, progress
        self._folder = Path(options.output_dir)
        subjects = subjects_of(policies)
        starts = filter(None, (subject.start for subject in subjects))
        self._reference = options.reference or next(starts, None)
        if self._reference is not None:
            subjects = [Subject(REFERENCE, self._reference, {}), *subjects]
        options.check_policies([subject.name for subject in subjects])
        self._subjects = subjects
        self._draws_pairs = draws_from_policy(options.pairs)
        named = (options.prompts, None if self._draws_pairs else options.pairs)
        for source in dict.fromkeys(filter(None, named)):
            for line in describe_splits(source, split=options.split):
                report(line)
        self._prompts = PromptSet(options, report)
        self._templates = PolicyTemplates(subjects, options, report)
        kept = [self._reference]
        for judge in options.judge_settings().values():
            if isinstance(judge, ImplicitSettings):
                kept += [judge.policy, judge.reference]
        self._models = ModelPool(filter(None, kept), dtype=options.dtype)
        context = JudgeContext(
            world=options.prompts,
            reference=self._reference,
            folder=self._folder,
            cache=self._folder / "verdicts.sqlite",
            comparisons=(),
            load_model=self._models.model,
            day=self._templates.day,
            report=report,
            progress=progress,
        )
        self._judges = VerdictStage(options, context)

    def run_models(self) -> ModelRuns:
        """Each model runs once, for its responses and measures; judges need only the responses.

        Several processes share this (`processes.current`).
        """
        opponents = self._prompts.opponents()
        if not all(subject.is_file for subject in self._subjects):
            samples = describe_sampling(self._options.dtype)
            self._report(
                f"device: {describe_device()}; samples in {samples}, measures in "
                f"{self._models.dtype}"
            )
        pairs = self._pairs()
        generations: dict[str, list[AnsweredPrompt]] = {}
        of_models: dict[str, ModelMeasures] = {}
        # Files first: what is wrong with one should show before anything is computed.
        for subject in sorted(self._subjects, key=lambda subject: not subject.is_file):
            if subject.is_file:
                generations[subject.name] = self._prompts.responses(subject.path)
                of_models[subject.name] = [], []
            else:
                generations[subject.name], of_models[subject.name] = self._run_model(subject, pairs)
        opponents = opponents or generations.get(self._options.against)
        return generations, of_models, opponents, self._prompts.digests(pairs)

    def measure(
        self,
        generations: dict[str, list[AnsweredPrompt]],
        of_models: dict[str, ModelMeasures],
        opponents: list[AnsweredPrompt] | None,
        contents: dict[str, str],
    ) -> list[PolicyMeasures]:
        """Judge each policy and save its measures."""
        found: list[PolicyMeasures] = []
        for subject in self._subjects:
            measures, notes = self._measure(
                subject, generations[subject.name], of_models[subject.name], opponents
            )
            if found and found[0].policy == REFERENCE:
                notes += fooled_reward(found[0].measures, measures)
            settings = {
                **asdict(self._options),
                "dtype": self._models.dtype,
                "sampling_dtype": self._models.sampling_dtype,
                "template_date": self._templates.written_day,
                "reference": self._reference,
                "path": subject.path,
            }
            policy = PolicyMeasures(
                subject.name, subject.group, settings, tuple(measures), tuple(notes), contents
            )
            policy.save(self._folder / subject.name)
            found.append(policy)
        return found

    def _pairs(self) -> "Source | None":
        """The held-out pairs; drawn from the reference, for a world without its own responses."""
        options = self._options
        if not self._draws_pairs or self._reference is None:
            return options.pairs
        model = self._load(self._models.sampling_model, self._subjects[0])  # the reference
        tokenizer, template = self._templates.of(self._reference, load_tokenizer(self._reference))
        sampler = policy_sampler(
            model,
            tokenizer,
            max_new_tokens=options.max_new_tokens,
            max_prompt_length=options.max_prompt_length,
            template=template,
            batch_size=options.batch_size,
            seed=options.seed,
            progress=self._progress,
        )
        self._report(f"{options.pairs}: responses drawn from the reference")
        return draw_worlds(options.pairs, sampler)

    def _run_model(
        self, subject: Subject, pairs: "Source | None"
    ) -> tuple[list[AnsweredPrompt], ModelMeasures]:
        """A policy's responses, and the measures that need its model."""
        options = self._options
        generations: list[AnsweredPrompt] = []
        suite: list[Measure] = []
        if self._prompts.prompts or options.suite:
            # A call of its own: its model's memory is free before the one to score with is loaded.
            generations, suite = self._sample(subject)
        if not generations and pairs is None:  # a suite alone: nothing is left to score
            return generations, (suite, [])
        ref_model = None
        if self._reference is not None and subject.name != REFERENCE:
            ref_model = self._models.model(self._reference)
        model = self._load(self._models.model, subject)
        tokenizer, template = self._templates.of(subject.path, load_tokenizer(subject.path))
        policy = LoadedPolicy(model, ref_model, tokenizer, template, options.batch_size)
        measures, notes = measure_model(
            subject, policy, generations, options, self._reference, pairs
        )
        return generations, (measures + suite, notes)

    def _sample(self, subject: Subject) -> tuple[list[AnsweredPrompt], list[Measure]]:
        """A policy's responses to the prompts, and its scores on the suite."""
        options = self._options
        model = self._load(self._models.sampling_model, subject)
        tokenizer, template = self._templates.of(subject.path, load_tokenizer(subject.path))
        generations: list[AnsweredPrompt] = []
        if self._prompts.prompts:
            backend = TransformersBackend(
                model,
                tokenizer,
                max_new_tokens=options.max_new_tokens,
                max_prompt_length=options.max_prompt_length,
                template=template,
                num_samples=options.num_samples,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
                batch_size=options.batch_size,
                progress=self._progress,
            )
            settings = backend.settings() | {"prompts": options.prompts, "split": options.split}
            # With the weights' digest: a folder may have been trained again.
            settings |= {"dtype": self._models.sampling_dtype, "weights": weights_digest(model)}
            path = self._folder / subject.name / "generations.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            timed = TimedBackend(backend)
            generations = write_responses(
                self._prompts.prompts, timed, path, settings, report=self._report
            )
            if rate := timed.rate():
                self._report(f"{subject.name}: {rate}")
        if options.suite is None:
            return generations, []
        return generations, current().on_first(lambda: measure_suite(subject, model, options))

    def _load(self, load: Callable[[str], PreTrainedModel], subject: Subject) -> PreTrainedModel:
        """A policy's model; the error for a recorded reference that is gone says what to do."""
        try:
            return load(subject.path)
        except TokenRatioError as error:
            if subject.name != REFERENCE or self._options.reference is not None:
                raise
            raise TokenRatioError(
                f"{error}: the runs recorded it as their reference; give --reference"
            ) from None

    def _measure(
        self,
        subject: Subject,
        generations: list[AnsweredPrompt],
        of_model: ModelMeasures,
        opponents: list[AnsweredPrompt] | None,
    ) -> ModelMeasures:
        """All measures of one policy, and notes for the reader."""
        measures: list[Measure] = []
        notes: list[str] = []
        if generations:
            if self._prompts.world is not None:
                measures += measure_world(generations, self._prompts.world)
            if subject.name != self._options.against and opponents is not None:
                measures += self._judges.measure(subject.name, generations, opponents, notes.append)
            measures += measure_responses(generations)
        measures += of_model[0]
        notes += of_model[1]
        if (Path(subject.path) / METRICS_FILE).is_file():
            try:
                found, sentences = measure_log(Path(subject.path))
            except TokenRatioError as error:
                found, sentences = [], [f"its stability is not measured: {error}"]
            measures += found
            notes += sentences
        return measures, notes
