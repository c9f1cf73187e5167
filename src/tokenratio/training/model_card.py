"""The model card of a run, made from its `run.json` and `eval.json`."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypedDict, cast

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from tokenratio.errors import TokenRatioError
from tokenratio.markdown import markdown_table, markdown_text
from tokenratio.masking import MASK
from tokenratio.models.reference import describe_reference
from tokenratio.records import read_record
from tokenratio.run_folder import CARD_FILE, CARD_MARK, EVAL_FILE, RUN_FILE
from tokenratio.training.method_settings import MethodSettings

# A card with neither this line nor PEFT's heading was written by hand and is kept.
_OF_PEFT = "# Model Card for Model ID"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_PAPER = ("Token-level Bregman Preference Optimization (TBPO)", "2605.12288")


def write_model_card(
    folder: Path, run: Mapping[str, Any], settings: Mapping[str, Any], **metadata: Any
) -> bool:
    """Write `README.md`; return False if the folder has a card that tokenratio did not write.

    Args:
        folder: of the saved model; figures come from its `eval.json`, if this run wrote it.
        run: the contents of `run.json`, secrets masked.
        settings: of the run, those that are not the defaults.
        metadata: for the card's YAML header, such as `license` or `language`; `model_name`.
    """
    path = folder / CARD_FILE
    if path.is_file():
        old = path.read_text(encoding="utf-8", errors="replace")
        if CARD_MARK not in old and _OF_PEFT not in old:
            return False
    model_card(folder, run, settings, **metadata).save(path)
    return True


def own_settings(
    kind: type[TrainingArguments], values: Mapping[str, Any], *, leave_out: Collection[str]
) -> dict[str, Any]:
    """The settings of a run that are not the defaults.

    Args:
        kind: the class of the settings.
        values: the settings with secrets masked, as in `run.json`.
        leave_out: settings that say nothing about the model, such as paths.
    """
    # No second instance of the arguments: that would reset accelerate's state.
    defaults: dict[str, Any] = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
    }
    defaults["accelerator_config"] = AcceleratorConfig().to_dict()
    del defaults["accelerator_config"]["use_configured_state"]  # as in the settings
    if issubclass(kind, MethodSettings):
        method = MethodSettings(loss=values["loss"])
        method.resolve_method()
        defaults |= vars(method)
    return {
        name: value
        for name, value in values.items()
        if name not in leave_out
        and (value or None) != (_plain(defaults.get(name)) or None)
        and value != MASK
    }


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def model_card(
    folder: Path,
    run: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    model_name: str | None = None,
    tags: str | Sequence[str] | None = None,
    **metadata: Any,
) -> ModelCard:
    """The card; see `write_model_card`."""
    is_adapter = bool(run.get("adapters"))
    is_reward = run.get("kind") == "reward model"
    method = "reward-model" if is_reward else str(run["config"]["loss"])
    base = run.get("model")
    given = [tags] if isinstance(tags, str) else list(tags or [])
    data = ModelCardData(
        base_model=metadata.pop("base_model", None) or (base if _is_hub_name(base) else None),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=list(dict.fromkeys(["tokenratio", method, *(["lora"] if is_adapter else []), *given])),
        **{name: value for name, value in metadata.items() if value is not None},
    )
    name = model_name or folder.resolve().name
    own = markdown_table(("setting", "value"), [(n, _value(v)) for n, v in settings.items()])
    packages = (f"{markdown_text(k)} {markdown_text(v)}" for k, v in run["versions"].items())
    sections = {
        "": f"{CARD_MARK}\n\n# {markdown_text(name)}\n\n{_introduction(run, method)}",
        "How to load it": _loading(name, is_adapter, is_reward),
        "Training": _training(run, method),
        "Data": _data(run),
        "Settings": f"Those that are not the defaults.\n\n{own}",
        "Evaluation": _evaluation(held_out_figures(folder)),
        "Versions": ", ".join(packages),
        "Citation": _citation(method),
    }
    body = "\n\n".join(
        (f"## {title}\n\n" if title else "") + text for title, text in sections.items() if text
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _introduction(run: Mapping[str, Any], method: str) -> str:
    what = {
        "sft": "fine-tuned on responses",
        "reward-model": "trained as a reward model on preference pairs (Bradley–Terry)",
    }.get(method, f"aligned with preference pairs by `{method}`")
    return (
        f"{markdown_text(_name_of(run.get('model')))}, {what} with tokenratio. No licence is "
        "stated here: the base model's and the data's apply."
    )


def _loading(name: str, is_adapter: bool, is_reward: bool) -> str:
    kind = "SequenceClassification" if is_reward else "CausalLM"
    package, prefix = (
        ("peft", "AutoPeftModelFor") if is_adapter else ("transformers", "AutoModelFor")
    )
    shown = json.dumps(name).replace("`", "")
    return (
        "```python\n"
        f"from {package} import {prefix}{kind}\n"
        "from transformers import AutoTokenizer\n\n"
        f"model = {prefix}{kind}.from_pretrained({shown})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({shown})\n"
        "```"
    )


def _training(run: Mapping[str, Any], method: str) -> str:
    lines = {"Starting point": _name_of(run.get("model"))}
    starts_from = run.get("starts_from")
    if isinstance(starts_from, Mapping) and starts_from.get("adapters"):
        lines["Its base"] = _name_of(starts_from.get("base"))
        lines["Its adapters"] = _value(starts_from["adapters"])
    lines["Method"] = method if method == "reward-model" else f"{method}: {_source_of(method)}"
    reference = run.get("reference")
    if isinstance(reference, Mapping):
        lines["Reference"] = _name_of(describe_reference(reference))
        lines["Reference, SHA-256"] = reference.get("sha256")
    for adapter, config in (run.get("adapters") or {}).items():
        names = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save")
        shown = {name: config[name] for name in names if config.get(name)}
        lines[f"Adapter {adapter}"] = _value(shown)
    lines["Processes"] = run.get("processes")
    return "\n".join(
        f"- {markdown_text(name)}: {markdown_text(value)}"
        for name, value in lines.items()
        if value is not None
    )


def _data(run: Mapping[str, Any]) -> str:
    rows = []
    for part, account in (run.get("data") or {}).items():
        read, kept = account.get("rows_read"), account.get("rows_kept")
        refused = read - kept if read is not None and kept is not None else None
        rows.append((part, read, kept, refused, account.get("digest")))
    return markdown_table(("part", "rows read", "rows kept", "refused", "SHA-256"), rows)


def _evaluation(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    held_out = figures.get("held_out") or {}
    lines: dict[str, Any] = {}
    accuracy, interval = held_out.get("accuracy"), held_out.get("interval")
    if isinstance(accuracy, Mapping):  # a reward model's
        held_out = {**held_out, "num_pairs": accuracy.get("num")}
        accuracy = accuracy.get("mean")
    if accuracy is not None and interval is not None:
        low, high = interval
        lines["accuracy on held-out pairs, ties count half"] = (
            f"{accuracy:.3f} (95 % {low:.3f}–{high:.3f}; {held_out.get('num_pairs')} pairs, "
            f"{held_out.get('num_ties')} ties)"
        )
    timing = ("_runtime", "_per_second")
    for name, value in figures.items():
        if isinstance(value, int | float) and not name.endswith(timing) and name != "epoch":
            lines[name] = f"{value:.4g}"
    return markdown_table(("measure", "value"), lines.items())


class _HeldOut(TypedDict, total=False):
    accuracy: float | dict[str, Any]
    interval: tuple[float, float]


class _Figures(TypedDict, total=False):
    held_out: _HeldOut | None


def held_out_figures(folder: Path) -> dict[str, Any] | None:
    """The contents of `eval.json`; one older than `run.json` is another run's."""
    path, run = folder / EVAL_FILE, folder / RUN_FILE
    if not path.is_file() or (run.is_file() and path.stat().st_mtime < run.stat().st_mtime):
        return None
    try:
        return cast(dict[str, Any], read_record(_Figures, path))
    except TokenRatioError:  # not worth losing the card, or the checkpoint that it is written for
        return None


def _citation(method: str) -> str:
    entries = {"tokenratio": _PAPER} if method.startswith("tbpo") else {}
    if not entries and method not in ("sft", "reward-model"):
        source = _source_of(method)
        found = _ARXIV.search(source)
        if found is None:
            return markdown_text(source)
        entries = {method: (source.partition(",")[0], found[1])}
    return "\n".join(
        f"```bibtex\n@misc{{{key},\n  title = {{{{{title}}}}},\n  eprint = {{{number}}},\n"
        "  archivePrefix = {arXiv}\n}\n```"
        for key, (title, number) in entries.items()
    )


def _source_of(method: str) -> str:
    """The paper of a method, in words."""
    from tokenratio.losses import METHODS

    if method.startswith("tbpo"):
        return f"{_PAPER[0]}, arXiv {_PAPER[1]}"
    return METHODS[method].source.partition(";")[0]


def _value(value: Any) -> str:
    plain = json.loads(json.dumps(value, default=str))
    return ", ".join(_leaves(plain)) if isinstance(plain, dict | list) else str(_name_of(plain))


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    """A nested value in words, its paths shortened."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        yield f"{name} {' '.join(str(_name_of(each)) for each in value)}".strip()
    else:
        yield f"{name} {_name_of(value)}".strip()


def _name_of(value: Any) -> Any:
    """A name to publish: only the last part of a path, also of one in parentheses."""
    if isinstance(value, Mapping):
        names = ("name", "path")
        return _name_of(next((value[name] for name in names if value.get(name)), ""))
    if not isinstance(value, str) or _is_hub_name(value):
        return value
    value = re.sub(r"\((.*)\)", lambda found: f"({_name_of(found[1])})", value)
    outside, parenthesis, rest = value.partition(" (")
    return re.split(r"[/\\]", outside.rstrip("/\\"))[-1] + parenthesis + rest


def _is_hub_name(value: Any) -> bool:
    is_name = isinstance(value, str) and _HUB_NAME.fullmatch(value) is not None
    return is_name and not Path(value).exists()
