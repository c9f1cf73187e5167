"""The measures that run the policy: entropy, KL, held-out pairs, credit, general ability."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tokenratio.data import PreparedData, prepare_pairs, read_rows
from tokenratio.data.sources import Source
from tokenratio.data.worlds import is_world_source, world_of
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.credit import token_scores
from tokenratio.evaluation.credit_measures import measure_credit
from tokenratio.evaluation.distance import kl_policy_ref, mean_token_losses
from tokenratio.evaluation.diversity import predictive_entropy
from tokenratio.evaluation.estimates import Estimate
from tokenratio.evaluation.held_out_pairs import held_out_pairs, shares_won
from tokenratio.evaluation.inputs import LoadedPolicy, Subject
from tokenratio.evaluation.options import REFERENCE, EvaluateOptions
from tokenratio.evaluation.policy_measures import measure_by_prompt
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.results import Better, Measure, measure_of
from tokenratio.evaluation.suite import run_suite
from tokenratio.models.generation import encode_prompts
from tokenratio.models.loading import load_model
from tokenratio.models.reference import describe_reference, model_digest
from tokenratio.models.state_baseline import read_baseline
from tokenratio.models.token_requests import own_head
from tokenratio.models.token_rows import TokenRow

_SIDES = ("chosen", "rejected")


def measure_model(
    subject: Subject,
    policy: LoadedPolicy,
    generations: list[AnsweredPrompt],
    options: EvaluateOptions,
    reference_path: str | None,
    pairs: "Source | None",
) -> tuple[list[Measure], list[str]]:
    """All measures that need the policy's own model, and notes for the reader.

    Args:
        pairs: what `options.pairs` names, or the pairs drawn for it.
    """
    measures: list[Measure] = []
    notes: list[str] = []
    if policy.ref_model is not None and reference_path is not None:
        notes += reference_notes(subject, reference_path, policy.ref_model)
        sizes = [own_head(each).weight.shape[0] for each in (policy.model, policy.ref_model)]
        if sizes[0] != sizes[1]:
            notes.append(
                f"its vocabulary has {sizes[0]} tokens, the reference's {sizes[1]}: KL and "
                "implicit reward are not measured"
            )
            policy = replace(policy, ref_model=None)
    if generations:
        measures += measure_policy(
            policy,
            generations,
            reference=policy.model if subject.name == REFERENCE else policy.ref_model,
            is_own_distribution=options.temperature == 1 and options.top_p == 1,
            max_prompt_length=options.max_prompt_length,
        )
    if pairs is not None and policy.ref_model is not None:
        data, subsets = _read_pairs(pairs, policy, options)
        read, kept = data.report.rows_read, data.report.rows_kept
        cut = sum(truncation.rows for truncation in data.report.truncated.values())
        if read > kept or cut:
            notes.append(
                f"{read - kept} of {read} pairs cannot be used; {cut} sides are cut at "
                f"max_length {options.max_length}"
            )
        beta = options.beta or subject.config.get("beta") or 0.1
        measures += measure_pairs(policy, data, beta=beta, subsets=subsets)
        if is_world_source(options.pairs or ""):
            baseline = read_baseline(Path(subject.path))
            if baseline is not None:
                baseline.to(policy.model.device)
            world = world_of(str(options.pairs))
            try:
                measures += measure_credit(policy, data, world=world, beta=beta, baseline=baseline)
            except TokenRatioError as error:
                notes.append(f"credit is not measured: {error}")
    return measures, notes


def measure_policy(
    policy: LoadedPolicy,
    generations: Sequence[AnsweredPrompt],
    *,
    reference: PreTrainedModel | None,
    is_own_distribution: bool,
    max_prompt_length: int | None = None,
) -> list[Measure]:
    """Entropy at the samples' states; KL to the reference and perplexity under it, if there is one.

    Args:
        reference: the policy itself if it is the reference, which has no `ref_model`.
        is_own_distribution: the samples were drawn at temperature 1 with all tokens kept; else the
            KL would not be the policy's, and is left out.
        max_prompt_length: in tokens, as when the samples were drawn.
    """
    prompts = encode_prompts(
        policy.tokenizer,
        [generation.prompt for generation in generations],
        template=policy.template,
        max_prompt_length=max_prompt_length,
    )
    samples = []
    for generation, prompt_ids in zip(generations, prompts, strict=True):
        if any(sample.token_ids is None for sample in generation.samples):
            raise TokenRatioError(
                f"{generation.id}: a response without token_ids cannot be scored again"
            )
        samples.append([TokenRow(prompt_ids, tuple(s.token_ids or ())) for s in generation.samples])
    size = policy.batch_size
    entropy = predictive_entropy(policy.model, samples, batch_size=size)
    measures = [
        measure_by_prompt("diversity/entropy", entropy, generations, "higher", "nats per token")
    ]
    rows = [sample for group in samples for sample in group]
    if reference is not None:
        losses = mean_token_losses(reference, rows, batch_size=size)
        measures.append(_perplexity(losses, generations))
    if policy.ref_model is not None and is_own_distribution:
        kl = iter(kl_policy_ref(policy.model, policy.ref_model, rows, batch_size=size))
        values = [(g.id, i, next(kl)) for g in generations for i in range(len(g.samples))]
        measures.append(measure_of("kl_policy_ref", values, unit="nats per response"))
    return measures


def _perplexity(losses: Sequence[float], generations: Sequence[AnsweredPrompt]) -> Measure:
    """exp of the responses' mean loss; its standard error by the delta method."""
    each = iter(losses)
    values = [(g.id, i, next(each)) for g in generations for i in range(len(g.samples))]
    loss = measure_of("", values)
    perplexity = math.exp(loss.mean)
    error = perplexity * loss.standard_error
    return Measure("perplexity_ref", perplexity, error, loss.num)


def measure_pairs(
    policy: LoadedPolicy,
    data: PreparedData,
    *,
    beta: float,
    subsets: Sequence[str] | None = None,
) -> list[Measure]:
    """Accuracy and margin of the implicit reward β Σρ on held-out pairs.

    Overall, by subset and by length difference, with the accuracy of "longer wins" to compare.
    """
    rows = list(data.dataset)
    samples = [
        TokenRow(tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"]))
        for side in _SIDES
        for row in rows
    ]
    scores = token_scores(
        policy.model,
        policy.ref_model,
        samples,
        beta=beta,
        state_term="none",
        batch_size=policy.batch_size,
    )
    rewards = [float(score.sum()) for score in scores]
    chosen, rejected = rewards[: len(rows)], rewards[len(rows) :]
    lengths = [[len(row[f"{side}_ids"]) for row in rows] for side in _SIDES]
    prompts = [str(row["prompt_ids"]) for row in rows]
    report = held_out_pairs(chosen, rejected, *lengths, subsets=subsets, prompts=prompts)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    places = _places(prompts, [row["origin"] for row in rows])
    accuracy = [(*p, won) for p, won in zip(places, shares_won(margins).tolist(), strict=True)]
    margin = [(*p, m) for p, m in zip(places, margins, strict=True)]
    overall = report.overall
    measures = [
        measure_of("pairs/accuracy", accuracy, unit="share", better="higher"),
        _share("pairs/longer_wins", overall.longer_wins, None),
        _share(f"pairs/over_{overall.better_rule}_wins", overall.over_length),
        measure_of("pairs/margin", margin, better="higher"),
    ]
    for name, scores_of in report.by_subset.items():
        measures.append(_share(f"pairs/accuracy, {name}", scores_of.accuracy))
    for each in report.by_length:
        name = f"pairs/accuracy, chosen longer by {each.shortest:g} to {each.longest:g}"
        measures.append(_share(name, each.scores.accuracy))
    return measures


def measure_suite(
    subject: Subject, model: PreTrainedModel, options: EvaluateOptions
) -> list[Measure]:
    """General ability, by EleutherAI's harness; see `run_suite`."""
    assert options.suite is not None
    found = run_suite(
        subject.path,
        options.suite,
        policy=model,
        output=Path(options.output_dir) / subject.name / "suite.json",
        batch_size=options.batch_size,
    )
    figures = [
        (f"{s.task} ({s.shots}-shot {s.metric})", s.value, s.stderr, s.n) for s in found.scores
    ]
    figures.append(("mean", found.mean, found.stderr, sum(s.n for s in found.scores)))
    return [
        Measure(f"suite/{name}", value, math.nan if error is None else error, n, "share", "higher")
        for name, value, error, n in figures
    ]


def _read_pairs(
    source: Source, policy: LoadedPolicy, options: EvaluateOptions
) -> tuple[PreparedData, list[str] | None]:
    """The pairs as token ids, and the subset of each if there are subsets."""
    data = prepare_pairs(
        source,
        policy.tokenizer,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        split=options.split,
        template=policy.template,
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


def reference_notes(subject: Subject, path: str, ref_model: PreTrainedModel) -> list[str]:
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
        "ALARM: it was trained against another reference "
        f"({describe_reference(trained_against)}); KL and implicit rewards are not those of "
        "training"
    ]


def _share(name: str, estimate: Estimate, better: Better = "higher") -> Measure:
    return Measure(name, estimate.mean, estimate.standard_error, estimate.num, "share", better)


def _places(prompts: Sequence[str], origins: Sequence[str]) -> list[tuple[str, int]]:
    """For each row the first origin of its prompt, and its number among the rows of that prompt.

    >>> _places(["ash", "bay", "ash"], ["a:1", "a:2", "a:3"])
    [('a:1', 0), ('a:2', 0), ('a:1', 1)]
    """
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    places = []
    for prompt, origin in zip(prompts, origins, strict=True):
        places.append((names.setdefault(prompt, origin), seen[prompt]))
        seen[prompt] += 1
    return places
