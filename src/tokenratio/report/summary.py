"""A run in words and tables: what was trained on what, how it went, settings, data, versions."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.results import Measure, PolicyMeasures
from tokenratio.evaluation.stability import ends, stability
from tokenratio.report.artefacts import Artefacts, RunFiles, counted, is_of_run
from tokenratio.report.content import Section, Table
from tokenratio.report.maps import ends_of

_LONGEST_VALUE = 160
_DIGEST = 12  # hex digits


def facts_of(run: RunFiles) -> list[tuple[str, str]]:
    """Names and values that say what was trained on what."""
    from tokenratio.models.reference import describe_reference

    record, found = run.record, [("method", run.method)]
    if model := record.get("model"):
        found.append(("model", shown(model)))
    if isinstance(reference := record.get("reference"), Mapping):
        digest = f" {str(reference.get('sha256') or '')[:_DIGEST]}".rstrip()
        found.append(("reference", f"{describe_reference(reference)}{digest}"))
    for name, adapter in (record.get("adapters") or {}).items():
        parts = ("peft_type", "r", "lora_alpha", "target_modules")
        text = ", ".join(f"{part} {shown(adapter[part])}" for part in parts if adapter.get(part))
        found.append(("adapter" if name == "default" else f"adapter {name}", text))
    for role, account in run.data.items():
        found.append((_role(role), _describe_data(account)))
    steps = "no step logged"
    if run.log is not None:
        steps = counted(run.step, "step")
    if run.progress is not None and run.progress < 1:
        steps += f", {run.progress:.0%} of the run"
    if resumed := len(record.get("resumptions") or ()):
        steps += ", resumed " + ("once" if resumed == 1 else f"{resumed} times")
    found.append(("training", steps))
    if device := record.get("device"):
        processes = record.get("processes") or 1
        found.append(("device", f"{device}" + (f" × {processes}" if processes > 1 else "")))
    return found


def verdict(run: RunFiles, artefacts: Artefacts) -> list[str]:
    """How the run went: what it learnt to tell apart, and how its answers fare."""
    lines = []
    if run.log is None:
        return ["Nothing has been logged yet."]
    if run.progress is not None and run.progress < 1:
        lines.append(f"{run.progress:.0%} of the run is logged, up to step {run.step:,}.")
    values = stability(run.log).values
    _, accuracies = run.log.column("rewards/accuracies")
    held_out = _held_out_accuracy(run)
    if held_out is not None:
        lines.append(f"On held-out pairs the chosen response has the higher reward in {held_out}.")
    elif len(accuracies):
        late = ends(accuracies)[1].mean()
        lines.append(f"At the end, {late:.0%} of the training pairs are ordered as labelled.")
    if "rewards/margins/end" in values:
        start, end = values["rewards/margins/start"], values["rewards/margins/end"]
        lines.append(f"In training the reward margin went from {start:.3g} to {end:.3g}.")
    elif "loss/end" in values:
        start, end = values["loss/start"], values["loss/end"]
        lines.append(f"In training the loss went from {start:.3g} to {end:.3g}.")
    for policy in artefacts.aligned:
        if is_of_run(policy.measures, run):
            lines += _answers_verdict(policy.measures, artefacts)
    return lines


def settings_section(runs: Sequence[RunFiles]) -> Section:
    """Settings that are not the defaults; of several runs those that differ, then the shared."""
    own = {run.name: _own_settings(run) for run in runs if run.config}
    names = {name: None for settings in own.values() for name in settings}
    if len(runs) == 1:
        rows = [(name, shown(value)) for each in own.values() for name, value in each.items()]
        table = Table(("setting", "value"), rows, is_numeric=False)
        tables = [table] if rows else []
        return Section("settings", "Settings", ["Those that are not the defaults."], (), tables)
    values = {
        name: [shown(run.config[name]) if name in run.config else "–" for run in runs]
        for name in {**names, **dict.fromkeys(_differing(runs))}
    }
    header = ["setting", *(run.name for run in runs)]
    differ = [(name, *each) for name, each in values.items() if len(set(each)) > 1]
    tables = [Table(header, differ, "Different between the runs.", is_numeric=False)]
    if same := [(name, each[0]) for name, each in values.items() if len(set(each)) == 1]:
        tables.append(Table(("setting", "value"), same, "The same, and not the default.", False))
    return Section("settings", "Settings", tables=[table for table in tables if table.rows])


def data_section(runs: Sequence[RunFiles]) -> Section:
    """Rows read, kept and refused with the reasons, and lengths."""
    rows, reasons = [], []
    for run in runs:
        for role, account in run.data.items():
            place = _role(role) if len(runs) == 1 else f"{run.name}: {_role(role)}"
            rows += list(_length_rows(place, account))
            reasons += list(_reasons(place, account))
    tables = []
    if rows:
        lengths = ("data", "rows kept", "mean length", "shortest", "longest", "cut", "unit")
        tables.append(Table(lengths, rows, "Lengths after truncation."))
    if reasons:
        header = ("data", "rows", "what", "where", "the first")
        caption = "Rows that were refused, or kept although odd."
        tables.append(Table(header, reasons, caption, is_numeric=False))
    return Section("data", "Data", tables=tables)


def versions_section(runs: Sequence[RunFiles]) -> Section:
    """Versions of what the runs were made with."""
    names = {name: None for run in runs for name in run.record.get("versions") or {}}
    rows = [
        (name, *(str((run.record.get("versions") or {}).get(name, "–")) for run in runs))
        for name in names
    ]
    header = ("package", *(run.name if len(runs) > 1 else "version" for run in runs))
    tables = [Table(header, rows, is_numeric=False)] if rows else []
    return Section("versions", "Versions", tables=tables, is_folded=True)


def shown(value: Any) -> str:
    """A setting's value as text, its middle left out if it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, Mapping):
        text = ", ".join(f"{name}: {shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        text = ", ".join(map(shown, value))
    half = _LONGEST_VALUE // 2
    return text if len(text) <= _LONGEST_VALUE else f"{text[:half]} … {text[-half:]}"


def _own_settings(run: RunFiles) -> dict[str, Any]:
    from tokenratio.training.model_card import own_settings
    from tokenratio.training.run_record import MAY_DIFFER

    try:
        kind = _settings_class(run.record.get("kind") == "reward model")
        return own_settings(kind, run.config, leave_out=MAY_DIFFER)
    except (TokenRatioError, KeyError):  # of another version: what the defaults were is not known
        return {name: v for name, v in run.config.items() if name not in MAY_DIFFER and v}


def _differing(runs: Sequence[RunFiles]) -> list[str]:
    """Settings that all runs know, with other values: a method's defaults are its own."""
    from tokenratio.training.run_record import MAY_DIFFER

    known = [run.config for run in runs if run.config]
    return [
        name
        for name, value in (known[0] if known else {}).items()
        if name not in MAY_DIFFER
        and all(name in config for config in known)
        and any(config[name] != value for config in known)
    ]


@cache
def _settings_class(is_reward: bool) -> Any:
    from tokenratio.training.config import TokenRatioConfig
    from tokenratio.training.reward_trainer import RewardConfig

    return RewardConfig if is_reward else TokenRatioConfig


def _held_out_accuracy(run: RunFiles) -> str | None:
    """The accuracy on held-out pairs with its interval; of the last evaluation without one."""
    figures = (run.held_out or {}).get("held_out") or {}
    accuracy = figures.get("accuracy")
    if isinstance(accuracy, Mapping):
        accuracy = accuracy.get("mean")
    if isinstance(accuracy, float) and math.isfinite(accuracy):
        text = f"{accuracy:.1%}"
        if (ends := figures.get("interval")) is not None:
            text += f" (95 % interval {ends[0]:.1%} to {ends[1]:.1%})"
        return text
    logged = [] if run.log is None else list(run.log.evaluations)
    found = [
        line["eval_rewards/accuracies"] for line in logged if "eval_rewards/accuracies" in line
    ]
    last = found[-1] if found else None
    return f"{last:.1%}" if isinstance(last, float) and math.isfinite(last) else None


def _answers_verdict(policy: PolicyMeasures, artefacts: Artefacts) -> Iterator[str]:
    for measure in policy.measures:
        if measure.name.startswith("win_rate/"):
            judge = measure.name.removeprefix("win_rate/")
            against = policy.settings.get("against") or "the other"
            low, high = ends_of(measure)
            even = ": no clear winner" if low <= 0.5 <= high else ""
            yield f"{judge} prefers its answers to those of {against} in {_share(measure)}{even}."
    reference = None if artefacts.reference is None else artefacts.reference.measures
    before = None if reference is None else reference.named("gold_reward")
    after: Measure | None = policy.named("gold_reward")
    if before is not None and after is not None:
        yield f"Their gold reward is {_mean(after)}, the reference's {_mean(before)}."


def _share(measure: Measure) -> str:
    low, high = ends_of(measure)
    ends = "" if low != low else f" (95 % interval {low:.1%} to {high:.1%})"
    return f"{measure.mean:.1%}{ends}"


def _mean(measure: Measure) -> str:
    low, high = ends_of(measure)
    ends = "" if low != low else f" (95 % interval {low:.3g} to {high:.3g})"
    return f"{measure.mean:.3g}{ends}"


def _describe_data(account: Mapping[str, Any]) -> str:
    sources = [shown(source.get("name")) for source in account.get("sources") or ()]
    kept, digest = account.get("rows_kept"), str(account.get("digest") or "")[:_DIGEST]
    parts = [", ".join(sources), "" if kept is None else counted(kept, "row"), digest]
    return ", ".join(filter(None, parts))


def _role(role: str) -> str:
    return {"train": "training data", "eval": "held-out data"}.get(role, f"data: {role}")


def _length_rows(place: str, account: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    kept = account.get("rows_kept") or 0
    for side, total in (account.get("lengths") or {}).items():
        ends = [(account.get(name) or {}).get(side) for name in ("shortest", "longest")]
        cut = ((account.get("truncated") or {}).get(side) or {}).get("rows", 0)
        yield (
            f"{place}, {side}",
            f"{kept:,}",
            f"{total / max(1, kept):.1f}",
            *("–" if end is None else f"{end:,}" for end in ends),
            counted(cut, "row") if cut else "–",
            str(account.get("unit") or ""),
        )


def _reasons(place: str, account: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for group in ("refused", "odd"):
        for kind, found in (account.get(group) or {}).items():
            examples = found.get("examples") or [{}]
            where = ", ".join(str(example.get("origin")) for example in examples)
            what = kind if group == "refused" else f"{kind} (kept)"
            yield (
                place,
                f"{found.get('rows', 0):,}",
                what,
                where,
                str(examples[0].get("detail") or "–"),
            )
