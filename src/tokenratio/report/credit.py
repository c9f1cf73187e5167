"""`inspect_pairs`: preference pairs under policies and their reference, token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tokenratio.data import prepare_pairs
from tokenratio.data.display import printable
from tokenratio.data.sources import draw_worlds, needs_policy, source_name
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.inputs import ModelPool, Subject, subjects_of
from tokenratio.evaluation.model_measures import reference_notes
from tokenratio.models.generation import policy_sampler
from tokenratio.models.loading import check_fits, load_tokenizer, require_same_vocabulary
from tokenratio.models.state_baseline import StateBaseline, read_baseline
from tokenratio.models.template_options import template_of
from tokenratio.models.token_requests import own_head
from tokenratio.models.token_values import TokenValues, token_values
from tokenratio.ratios import baseline_state_weight
from tokenratio.report.credit_data import (
    SIDES,
    InspectedPair,
    InspectedPolicy,
    Inspection,
    padded,
    pair_statistics,
)
from tokenratio.report.credit_methods import (
    MethodValues,
    ShownMethod,
    method_values,
    notes_on_settings,
    shown_methods,
)
from tokenratio.report.credit_options import InspectOptions
from tokenratio.report.credit_pairs import chosen_source, inspected_pairs, notes_on
from tokenratio.training.checkpoints import checkpoints_of, defect

_LONGEST_ROW = 2048
_LONGEST_RESPONSE = 128  # of those drawn for a world without its own


def inspect_pairs(
    policies: Sequence[str | Path],
    options: InspectOptions | None = None,
    *,
    report: Callable[[str], None] = print,
) -> Inspection:
    """Run policies and their reference on preference pairs, and keep what both say of every token.

    Args:
        policies: runs, checkpoints, or other models by name, each perhaps as `NAME=MODEL`; all with
            one tokenizer, and compared with the same reference on the same pairs.
        options: None for what the first run recorded.
        report: called with a line about what is done.
    Returns:
        The figures. `report.credit_page.write_credit_page` makes a page of them, `write_jsonl`
        JSON lines.
    Raises:
        TokenRatioError: no reference or no data is known, a model or the data cannot be used, or
            tokenizers differ.
    """
    options = options or InspectOptions()
    subjects = _subjects(policies, options, report)
    first = subjects[0]
    reference = options.reference or first.start
    if reference is None:
        raise TokenRatioError(
            f"{first.path} did not record what it was trained from: give --reference"
        )
    tokenizer, template = template_of(
        options, load_tokenizer(first.path), first.path, report=report
    )
    for other in [*(subject.path for subject in subjects[1:]), reference]:
        require_same_vocabulary(first.path, other)
    pool = ModelPool([reference], dtype=options.dtype)
    ref_model = pool.model(reference)

    source, how, left_out = chosen_source(options, first)
    name = source_name(source)
    world = options.world or ("" if isinstance(source, list) else name)
    if needs_policy(source):
        report(f"{name}: responses drawn from the reference")
        sampler = policy_sampler(
            ref_model,
            tokenizer,
            max_new_tokens=_LONGEST_RESPONSE,
            template=template,
            batch_size=options.batch_size,
            seed=0,
        )
        source = draw_worlds(source, sampler)
    config = first.config
    data = prepare_pairs(
        source,
        tokenizer,
        max_length=options.max_length or config.get("max_length") or _LONGEST_ROW,
        max_prompt_length=options.max_prompt_length or config.get("max_prompt_length"),
        template=template,
        **how,
    )
    report(f"{len(data.dataset)} pairs of {printable(name)}")
    check_fits(ref_model, data)

    baselines = [read_baseline(Path(subject.path)) for subject in subjects]
    methods, notes = shown_methods(
        options.losses,
        [subject.config for subject in subjects],
        beta=options.beta,
        has_baseline=None not in baselines,
    )
    beta = options.beta or config.get("beta") or 0.1
    given = {} if options.beta is None else {"beta": options.beta}
    runs = {subject.name: {**subject.config, **given} for subject in subjects}
    notes += notes_on_settings(runs, methods, beta=beta)
    notes += _notes_on_references(subjects, reference, ref_model)
    pairs, texts, value_name, unknown = inspected_pairs(data, tokenizer, world)
    inspected = []
    for subject, baseline in zip(subjects, baselines, strict=True):
        model = pool.model(subject.path)
        _require_same_size(model, ref_model, subject.path)
        check_fits(model, data)
        report(f"{subject.name}: policy and reference read {2 * len(pairs)} responses")
        found = _policy(subject, model, ref_model, pairs, methods, baseline, options)
        inspected.append(found)
    return Inspection(
        reference=reference,
        source=name,
        beta=beta,
        pairs=pairs,
        methods=methods,
        policies=inspected,
        texts=texts,
        value_name=value_name,
        notes=[*notes, *unknown, *left_out, *notes_on(data)],
    )


def _subjects(
    policies: Sequence[str | Path], options: InspectOptions, report: Callable[[str], None]
) -> list[Subject]:
    """The policies; after each run, if they are asked for, its checkpoints come before it."""
    found = []
    for subject in subjects_of(policies):
        if subject.is_file:
            raise TokenRatioError(f"{subject.path} is a file of responses: name a model or a run")
        held = checkpoints_of(subject.path) if options.checkpoints else []
        if options.checkpoints and not held:
            report(f"{subject.path} has no checkpoints")
        for checkpoint in held:
            if (fault := defect(checkpoint, digests=False)) is not None:
                report(f"{checkpoint} is left out: {fault}")
                continue
            found += subjects_of([f"{subject.name}.{checkpoint.name}={checkpoint}"])
        found.append(subject)
    return found


def _notes_on_references(
    subjects: Sequence[Subject], reference: str, ref_model: PreTrainedModel
) -> list[str]:
    """Which runs were trained against another reference; each recorded one is compared once."""
    notes: dict[str, list[str]] = {}
    for subject in subjects:
        key = str((subject.record.get("reference") or {}).get("sha256"))
        if key not in notes:
            notes[key] = [
                f"{subject.name}: {note}" for note in reference_notes(subject, reference, ref_model)
            ]
    return [note for each in notes.values() for note in each]


def _require_same_size(model: PreTrainedModel, ref_model: PreTrainedModel, name: str) -> None:
    sizes = [len(own_head(each).weight) for each in (model, ref_model)]
    if sizes[0] != sizes[1]:
        raise TokenRatioError(
            f"{name} predicts {sizes[0]} tokens, the reference {sizes[1]}: they cannot be compared"
        )


def _policy(
    subject: Subject,
    model: PreTrainedModel,
    ref_model: PreTrainedModel,
    pairs: Sequence[InspectedPair],
    methods: Sequence[ShownMethod],
    baseline: StateBaseline | None,
    options: InspectOptions,
) -> InspectedPolicy:
    if baseline is not None:
        baseline.to(model.device)
    found = token_values(
        model,
        ref_model,
        [getattr(pair, side).row for side in SIDES for pair in pairs],
        with_kl=True,
        baseline=baseline,
        top=options.top,
        batch_size=options.batch_size,
    )
    chosen, rejected = found[: len(pairs)], found[len(pairs) :]
    values = [_method_values(shown, chosen, rejected, subject.config) for shown in methods]
    return InspectedPolicy(subject.name, chosen, rejected, values)


def _method_values(
    shown: ShownMethod,
    chosen: Sequence[TokenValues],
    rejected: Sequence[TokenValues],
    config: Mapping[str, Any],
) -> MethodValues:
    pair = pair_statistics(chosen, rejected)
    if shown.method.needs_baseline:
        longest = pair.chosen.mask.shape[1]
        is_either = pair.chosen.mask | pair.rejected.mask
        log_weight = baseline_state_weight(
            padded([values.baseline for values in chosen], longest),
            padded([values.baseline for values in rejected], longest),
            pair.pair_mask if shown.method.is_local else is_either,
            center=bool(config.get("center_baseline")),
            clamp=config.get("baseline_clamp") or 10.0,
        )
        pair = replace(pair, log_state_weight=log_weight)
    return method_values(shown, pair)
