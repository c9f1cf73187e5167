"""The stages of an evaluation, policy by policy, with files between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.evaluate_options import REFERENCE, EvaluateOptions, Subject, subjects_of
from tokenratio.cli.evaluation_templates import EvaluationTemplates
from tokenratio.cli.judges import JudgeContext, kind_of, make_judge
from tokenratio.cli.recipe_models import say_splits
from tokenratio.cli.terminal import is_terminal
from tokenratio.data import PreparedData, prepare_pairs, read_rows, source_digest
from tokenratio.data.chat import Prompt, prompt_value
from tokenratio.data.prompts import read_prompts
from tokenratio.data.template import TemplateSettings
from tokenratio.data.worlds import World, is_world_source, world_of
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.backends import TransformersBackend
from tokenratio.evaluation.frontier import frontier_lines
from tokenratio.evaluation.judges import Judge
from tokenratio.evaluation.judges.bradley_terry import weights_digest
from tokenratio.evaluation.judges.protocol import digest_of
from tokenratio.evaluation.measures import Measure, PolicyMeasures, table
from tokenratio.evaluation.policy_measures import (
    measure_credit,
    measure_judgements,
    measure_log,
    measure_pairs,
    measure_policy,
    measure_responses,
    measure_suite,
    measure_world,
)
from tokenratio.evaluation.response_files import (
    Generation,
    generate_all,
    read_generations,
    reference_generations,
)
from tokenratio.evaluation.verdict_files import judge_all, pair_up
from tokenratio.models.device import default_device
from tokenratio.models.loading import load_model, load_tokenizer
from tokenratio.models.reference import model_digest
from tokenratio.models.state_baseline import read_baseline
from tokenratio.models.token_requests import language_model, own_head
from tokenratio.run_folder import METRICS_FILE, replace_text


def evaluate(
    runs: Sequence[str], options: EvaluateOptions, *, report: Callable[[str], None] = print
) -> list[PolicyMeasures]:
    """Evaluate policies on the same prompts and pairs; returns what `table.md` shows.

    Args:
        runs: folders of runs, other models, files of generations; or `NAME=` one of these.
        report: where it is said what was kept of an earlier call, and what a reader has to know.
    """
    subjects = subjects_of(runs)
    reference = options.reference or next(filter(None, (s.start for s in subjects)), None)
    if reference is not None:
        subjects = [Subject(REFERENCE, reference, {}), *subjects]
    options.check_runs([subject.name for subject in subjects])
    room = _Room(subjects, options, Path(options.output_dir), report)
    opponents = room.given_opponents()
    generations = {s.name: room.generations(s) for s in subjects} if options.prompts else {}
    opponents = opponents or generations.get(options.against)
    policies = [
        room.measure(subject, generations.get(subject.name, []), opponents) for subject in subjects
    ]
    folder = Path(options.output_dir)
    lines = frontier_lines(policies, REFERENCE)
    notes = [f"{policy.policy}: {note}" for policy in policies for note in policy.notes]
    lines += [note for note in notes if "ALARM" in note]
    text = table(policies) + "\n" + "".join(f"\n{line}\n" for line in lines)
    replace_text(folder / "table.md", text)
    for line in [*notes, *(line for line in lines if "ALARM" not in line)]:
        report(line)
    return policies


class _Room:
    """What is shared by the policies of one evaluation."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        options: EvaluateOptions,
        folder: Path,
        report: Callable[[str], None],
    ) -> None:
        self.options, self.folder, self.report = options, folder, report
        self.reference_path = subjects[0].path if subjects[0].name == REFERENCE else None
        self.world: World | None = None
        self.prompts: list[tuple[str, Prompt]] = []
        if options.prompts is not None:
            self.prompts = read_prompts(
                options.prompts, split=options.split, columns=options.columns
            )
            say_splits(options.prompts, options.split, report)
            self.prompts = self._once(self.prompts)[: options.num_prompts]
            if is_world_source(options.prompts):
                self.world = world_of(options.prompts)
        if options.pairs not in (None, options.prompts):
            say_splits(str(options.pairs), options.split, report)
        self._templates = EvaluationTemplates(subjects, options, folder, report)
        self._told: dict[str, TemplateSettings] = {}
        self._models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        # One for all policies: a budget is the evaluation's.
        self._judges: dict[str, Judge] = {}

    def _once(self, prompts: list[tuple[str, Prompt]]) -> list[tuple[str, Prompt]]:
        """Each prompt once: rows with the same one are not independent draws."""
        first: dict[str, tuple[str, Prompt]] = {}
        for id, prompt in prompts:
            first.setdefault(digest_of(prompt_value(prompt)), (id, prompt))
        if len(first) < len(prompts):
            self.report(
                f"{len(prompts)} rows have {len(first)} different prompts: each is asked once"
            )
        return list(first.values())

    def contents(self) -> dict[str, str]:
        """What stands behind the ids, so that other prompts or pairs are never taken for these."""
        contents = {
            f"prompt {id}": digest_of(prompt_value(prompt))[:16] for id, prompt in self.prompts
        }
        if self.options.pairs is not None:
            rows = read_rows(self.options.pairs, split=self.options.split)
            contents |= {f"pair {row.origin}": source_digest([row])[:16] for row in rows}
        return contents

    def _settings(self) -> dict[str, Any]:
        day = self._templates.day if self._templates.is_dated else None
        return {**asdict(self.options), "template_date": day, "reference": self.reference_path}

    def model(self, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model and its tokenizer; the reference stays in memory, one other beside it."""
        if path not in self._models:
            for other in [p for p in self._models if p != self.reference_path]:
                del self._models[other]
            try:
                model = load_model(path)
            except TokenRatioError as error:
                if path != self.reference_path or self.options.reference is not None:
                    raise
                raise TokenRatioError(
                    f"{error}: what the runs say they started from; give --reference"
                ) from None
            model.to(default_device())
            tokenizer, self._told[path] = self._templates.of(path, load_tokenizer(path))
            self._models[path] = (model, tokenizer)
        return self._models[path]

    def generations(self, subject: Subject) -> list[Generation]:
        """Its responses: read, or sampled and written."""
        options = self.options
        if subject.is_file:
            return self._given(subject.path)
        model, tokenizer = self.model(subject.path)
        backend = TransformersBackend(
            model,
            tokenizer,
            max_new_tokens=options.max_new_tokens,
            max_prompt_length=options.max_prompt_length,
            template=self._told[subject.path],
            num_samples=options.num_samples,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=is_terminal(),
        )
        settings = backend.settings() | {"prompts": options.prompts, "split": options.split}
        settings |= {"weights": weights_digest(model)}  # a folder may have been trained again
        path = self.folder / subject.name / "generations.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return generate_all(self.prompts, backend, path, settings, report=self.report)

    def _given(self, path: str) -> list[Generation]:
        """A file's responses to the evaluation's prompts, in their order."""
        found = {generation.id: generation for generation in read_generations(path)}
        missing = [id for id, _ in self.prompts if id not in found]
        if missing:
            raise TokenRatioError(
                f"{path} has no answer to {len(missing)} of {len(self.prompts)} prompts, first "
                f"{missing[0]}"
            )
        for id, prompt in self.prompts:
            if found[id].prompt != prompt:
                raise TokenRatioError(f"{path}: {id} answers another prompt than is asked here")
        return [found[id] for id, _ in self.prompts]

    def given_opponents(self) -> list[Generation] | None:
        """Whom judges compare with, if that is a column or a file rather than a policy."""
        against = self.options.against
        if not self.prompts:
            return None
        if against.startswith("column:"):
            source = str(self.options.prompts)
            given = reference_generations(
                source,
                column=against.removeprefix("column:"),
                split=self.options.split,
                columns=self.options.columns,
            )
            asked = {id for id, _ in self.prompts}
            return [generation for generation in given if generation.id in asked]
        return self._given(against) if against.endswith(".jsonl") else None

    def measure(
        self,
        subject: Subject,
        generations: list[Generation],
        opponents: list[Generation] | None,
    ) -> PolicyMeasures:
        """All that can be said of one policy, written to its folder."""
        options, measures, notes = self.options, [], []
        if generations:
            if self.world is not None:
                measures += measure_world(generations, self.world)
            if subject.name != options.against and opponents is not None:
                measures += self._judged(subject, generations, opponents, notes.append)
            measures += measure_responses(generations)
        if not subject.is_file:
            found, said = self._of_model(subject, generations)
            measures += found
            notes += said
            if options.suite is not None:
                measures += measure_suite(
                    subject.path,
                    options.suite,
                    output=self.folder / subject.name / "suite.json",
                    batch_size=options.batch_size,
                )
        if (Path(subject.path) / METRICS_FILE).is_file():
            try:
                found, said = measure_log(Path(subject.path))
            except TokenRatioError as error:
                found, said = [], [f"its stability is not measured: {error}"]
            measures += found
            notes += said
        policy = PolicyMeasures(
            subject.name,
            subject.loss or subject.name,
            self._settings() | {"path": subject.path},
            tuple(measures),
            tuple(notes),
            self.contents(),
        )
        policy.save(self.folder / subject.name)
        return policy

    def _judged(
        self,
        subject: Subject,
        generations: list[Generation],
        opponents: list[Generation],
        note: Callable[[str], None],
    ) -> list[Measure]:
        judges = self.options.judges
        if judges is None:
            judges = {} if self.world is None else {"gold": {}}
        measures = []
        comparisons = pair_up(generations, opponents)
        for name, settings in judges.items():
            context = JudgeContext(
                world=self.options.prompts,
                reference=self.reference_path,
                folder=self.folder / subject.name,
                cache=self.folder / "verdicts.sqlite",
                comparisons=comparisons,
                day=self._templates.day,
            )
            judge = self._judges.get(name) or make_judge(name, settings or {}, context)
            if judge is None:
                continue
            is_human = kind_of(name, settings or {}) == "human"
            if not is_human:  # whose sheets are the policies' own
                self._judges[name] = judge
            path = self.folder / subject.name / f"judgements-{name}.jsonl"
            if is_human:  # what is kept is the sheet, and it may be filled in further
                path.unlink(missing_ok=True)
            found = judge_all(
                comparisons, judge, path, {"against": self.options.against}, report=self.report
            )
            measures += measure_judgements(
                found, name, order_matters=judge.order_matters, report=note
            )
        return measures

    def _of_model(
        self, subject: Subject, generations: list[Generation]
    ) -> tuple[list[Measure], list[str]]:
        """What needs the policy itself."""
        options, measures, notes = self.options, [], []
        model, tokenizer = self.model(subject.path)
        ref_model = None
        if self.reference_path is not None and subject.name != REFERENCE:
            ref_model = self.model(self.reference_path)[0]
            notes += _reference_note(subject, self.reference_path, ref_model)
            sizes = [own_head(language_model(m)).weight.shape[0] for m in (model, ref_model)]
            if sizes[0] != sizes[1]:
                notes.append(
                    f"it has {sizes[0]} tokens, the reference {sizes[1]}: there is no KL and no "
                    "implicit reward"
                )
                ref_model = None
        if generations:
            measures += measure_policy(
                model,
                ref_model,
                tokenizer,
                generations,
                is_own_distribution=options.temperature == 1 and options.top_p == 1,
                max_prompt_length=options.max_prompt_length,
                template=self._told[subject.path],
                batch_size=options.batch_size,
            )
        if options.pairs is not None and ref_model is not None:
            data, subsets = self._pairs(tokenizer, self._told[subject.path])
            read, kept = data.report.rows_read, data.report.rows_kept
            cut = sum(truncation.rows for truncation in data.report.truncated.values())
            if read > kept or cut:
                notes.append(
                    f"of {read} pairs {read - kept} cannot be used, {cut} sides are cut at "
                    f"max_length {options.max_length}"
                )
            beta = options.beta or subject.config.get("beta") or 0.1
            measures += measure_pairs(
                model,
                ref_model,
                data,
                beta=beta,
                subsets=subsets,
                batch_size=options.batch_size,
            )
            if is_world_source(options.pairs):
                baseline = read_baseline(Path(subject.path))
                if baseline is not None:
                    baseline.to(model.device)
                terms = ["none", "kl"] + ["baseline"] * (baseline is not None)
                try:
                    measures += measure_credit(
                        model,
                        ref_model,
                        tokenizer,
                        data,
                        beta=beta,
                        state_terms=terms,
                        baseline=baseline,
                        batch_size=options.batch_size,
                    )
                except TokenRatioError as error:
                    notes.append(f"its credit is not measured: {error}")
        return measures, notes

    def _pairs(
        self, tokenizer: PreTrainedTokenizerBase, template: TemplateSettings
    ) -> tuple[PreparedData, list[str] | None]:
        options = self.options
        source = str(options.pairs)
        data = prepare_pairs(
            source,
            tokenizer,
            max_length=options.max_length,
            max_prompt_length=options.max_prompt_length,
            split=options.split,
            template=template,
            columns=options.columns,
        )
        if options.subset_column is None:
            return data, None
        rows = {row.origin: row.fields for row in read_rows(source, split=options.split)}
        names = []
        for origin in data.dataset["origin"]:
            if options.subset_column not in rows[origin]:
                raise TokenRatioError(f"{origin} has no column {options.subset_column!r}")
            names.append(str(rows[origin][options.subset_column]))
        return data, names


def _reference_note(subject: Subject, path: str, ref_model: PreTrainedModel) -> list[str]:
    """Say so if the run was trained against another reference than it is measured against."""
    trained_against = subject.record.get("reference")
    if not isinstance(trained_against, Mapping) or "sha256" not in trained_against:
        return []
    init_kwargs = subject.config.get("model_init_kwargs")
    if isinstance(init_kwargs, Mapping):  # such as a dtype, which the digest is of too
        ref_model = load_model(path, dict(init_kwargs))
    if trained_against["sha256"] == model_digest(ref_model):
        return []
    return [
        "ALARM: it was trained against another reference than the one here "
        f"({trained_against.get('description')}); KL and implicit rewards are not those of training"
    ]
