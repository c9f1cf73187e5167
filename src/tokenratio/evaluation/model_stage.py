"""The stage that runs the policy itself: entropy, KL, held-out pairs, credit, general ability."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.data import PreparedData, prepare_pairs, read_rows
from tokenratio.data.template import TemplateSettings
from tokenratio.data.worlds import is_world_source, world_of
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.credit import StateTerm
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.evaluation.policy_measures import (
    measure_credit,
    measure_pairs,
    measure_policy,
    measure_suite,
)
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.results import Measure
from tokenratio.evaluation.subjects import Subject
from tokenratio.models.loading import load_model
from tokenratio.models.reference import describe_reference, model_digest
from tokenratio.models.state_baseline import read_baseline
from tokenratio.models.token_requests import own_head


def measure_model(
    subject: Subject,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateSettings,
    generations: list[AnsweredPrompt],
    options: EvaluateOptions,
    *,
    ref_model: PreTrainedModel | None,
    reference_path: str | None,
) -> tuple[list[Measure], list[str]]:
    """What takes a policy's own model to measure, and notes for the reader.

    Args:
        ref_model: None for the reference itself, and where there is none.
    """
    measures: list[Measure] = []
    notes: list[str] = []
    if ref_model is not None and reference_path is not None:
        notes += _reference_note(subject, reference_path, ref_model)
        sizes = [own_head(each).weight.shape[0] for each in (model, ref_model)]
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
            template=template,
            batch_size=options.batch_size,
        )
    if options.pairs is not None and ref_model is not None:
        data, subsets = _held_out_pairs(options.pairs, tokenizer, template, options)
        read, kept = data.report.rows_read, data.report.rows_kept
        cut = sum(truncation.rows for truncation in data.report.truncated.values())
        if read > kept or cut:
            notes.append(
                f"of {read} pairs {read - kept} cannot be used, {cut} sides are cut at "
                f"max_length {options.max_length}"
            )
        beta = options.beta or subject.config.get("beta") or 0.1
        measures += measure_pairs(
            model, ref_model, data, beta=beta, subsets=subsets, batch_size=options.batch_size
        )
        if is_world_source(options.pairs):
            baseline = read_baseline(Path(subject.path))
            if baseline is not None:
                baseline.to(model.device)
            terms: list[StateTerm] = ["none", "kl"]
            if baseline is not None:
                terms.append("baseline")
            try:
                measures += measure_credit(
                    model,
                    ref_model,
                    tokenizer,
                    data,
                    world=world_of(options.pairs),
                    beta=beta,
                    state_terms=terms,
                    baseline=baseline,
                    batch_size=options.batch_size,
                )
            except TokenRatioError as error:
                notes.append(f"its credit is not measured: {error}")
    if options.suite is not None:
        measures += measure_suite(
            subject.path,
            options.suite,
            policy=model,
            output=Path(options.output_dir) / subject.name / "suite.json",
            batch_size=options.batch_size,
        )
    return measures, notes


def _held_out_pairs(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateSettings,
    options: EvaluateOptions,
) -> tuple[PreparedData, list[str] | None]:
    """The pairs as token ids, and the subset of each if there are subsets."""
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
    """An alarm if the run was trained against another reference than it is measured against."""
    trained_against = subject.record.get("reference")
    if not isinstance(trained_against, Mapping) or "sha256" not in trained_against:
        return []
    if trained_against["sha256"] == model_digest(ref_model):
        return []
    init_kwargs = subject.config.get("model_init_kwargs")
    if isinstance(init_kwargs, Mapping) or ref_model.dtype != torch.float32:
        # The digest depends on the dtype, so compare in that of the training run.
        as_trained = load_model(path, dict(init_kwargs or {}))
        if trained_against["sha256"] == model_digest(as_trained):
            return []
    return [
        "ALARM: it was trained against another reference than the one here "
        f"({describe_reference(trained_against)}); KL and implicit rewards are not those of "
        "training"
    ]
