"""What `run.json` records of a run, and what may differ when the run is resumed."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokenratio.errors import TokenRatioError
from tokenratio.masking import mask_secrets
from tokenratio.models.pretrained_arguments import WHERE_KWARGS, loading_arguments
from tokenratio.models.reference import describe_reference
from tokenratio.records import as_shape
from tokenratio.run_folder import RUN_FILE, ResumableRecord, read_run_file, versions
from tokenratio.training.arguments import shown

# Settings that change neither the order of the rows nor the arithmetic. All others must stay the
# same, including those that transformers adds later.
MAY_DIFFER = frozenset(
    (
        *("output_dir", "run_name", "project", "resume_from_checkpoint", "do_train", "do_eval"),
        "resume_with_changes",
        *("do_predict", "local_rank", "debug", "skip_memory_metrics", "check_reference"),
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "report_to"),
        *("log_on_each_node", "log_level", "log_level_replica", "logging_nan_inf_filter"),
        *("disable_tqdm", "include_num_input_tokens_seen", "trackio_space_id"),
        *("trackio_bucket_id", "trackio_static_space_id"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "prediction_loss_only"),
        *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches"),
        *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics"),
        *("bf16_full_eval", "fp16_full_eval", "load_best_model_at_end"),
        *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node"),
        *("save_only_model", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
        *("ddp_timeout", "ddp_backend", "use_cpu", "reference_cache_dir", "token_scores"),
        # The rows themselves are compared.
        *("on_bad_row", "train_split", "eval_split", "max_eval_samples"),
        *("columns", "data_cache_dir", "dataset_num_proc"),
    )
)
# These may grow; the effect on the learning rate is logged.
_LENGTH = ("num_train_epochs", "max_steps")
# These learning rates depend on when evaluations take place.
_FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
_PER_DEVICE = "per_device_train_batch_size"
_WHEN_EVALUATED = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start")
# A run without a best checkpoint may start to select one.
_OF_THE_BEST = ("metric_for_best_model", "greater_is_better")
_COMPARED_VERSIONS = ("torch", "transformers", "tokenratio")
# A checkpoint does not fit a run with another of these.
_OF_THE_CHECKPOINT = ("loss", "optim", "optim_args", "optim_target_modules", "baseline_hidden_size")
# Differences that are neither said nor recorded.
_UNSAID = (
    *("output_dir", "run_name", "logging_dir", "disable_tqdm", "local_rank", "debug"),
    *("resume_from_checkpoint", "resume_with_changes", "hub_token"),
)
Kind: TypeAlias = Literal["safe", "inexact", "other run"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Something that a resumed run has otherwise than the run had.

    Attributes:
        name: a setting, or what else it is.
        kind: `safe` if the run ends as it would have; `inexact` if it can go on, and ends
            otherwise; `other run` if the checkpoint does not fit.
    """

    name: str
    was: Any
    now: Any
    kind: Kind


def check_same_run(
    checkpoint: Path, identity: Mapping[str, Any], *, with_changes: bool = False
) -> list[Change]:
    """Refuse to resume with anything that would change what the run computes.

    A policy built from the checkpoint would become its own reference; another batch size or seed
    would repeat some rows and skip others.

    Args:
        identity: what `run.json` would hold now.
        with_changes: accept what is `inexact`.
    Returns:
        What differs, and is accepted.
    Raises:
        TokenRatioError: something else differs; names it.
    """
    # Settings first, because another method has another reference.
    changes = check_same_settings(checkpoint, identity, with_changes=with_changes)
    began, now, run = _record_of(checkpoint), _as_read(identity), f"the run of {checkpoint}"
    reference, old_reference = now.get("reference") or {}, began.get("reference") or {}
    if reference.get("sha256") != old_reference.get("sha256"):
        raise TokenRatioError(
            f"the reference is not the one that {run} began with "
            f"({describe_reference(old_reference)}): start from the same model as then, not from a "
            "checkpoint"
        )
    start, old_start = now.get("starts_from") or {}, began.get("starts_from") or {}
    if old_start.get("sha256", start.get("sha256")) != start.get("sha256"):
        raise TokenRatioError(
            f"the model below the adapter is not the one that {run} began with "
            f"({old_start.get('base')}): start from the same model as then"
        )
    if now["data"]["train"]["digest"] != began["data"]["train"]["digest"]:
        is_tokenizer = began.get("tokenizer", now.get("tokenizer")) != now.get("tokenizer")
        what = "tokenizer or its chat template differs" if is_tokenizer else "training data differ"
        raise TokenRatioError(
            f"the {what} from what {run} began with: restore it, or start a new run in another "
            "output_dir"
        )
    for name in _COMPARED_VERSIONS:
        was, is_now = (of.get(name) for of in (began.get("versions", {}), versions()))
        if None not in (was, is_now) and was != is_now:
            _log.warning("the run began with %s %s, and continues with %s", name, was, is_now)
    return changes


def check_same_settings(
    checkpoint: Path, identity: Mapping[str, Any], *, with_changes: bool = False
) -> list[Change]:
    """As `check_same_run`, for `kind`, `config`, `processes` and `adapters` alone.

    Args:
        identity: may lack all of these but `config`.
    """
    began, now, run = _record_of(checkpoint), _as_read(identity), f"the run of {checkpoint}"
    if began.get("kind") != now.get("kind"):
        raise TokenRatioError(
            f"{run} trained a {began.get('kind', 'policy')}, not a {now.get('kind', 'policy')}"
        )
    changes = list(_changes(began, now))
    for change in changes:
        if change.kind == "safe" or (change.kind == "inexact" and with_changes):
            continue
        instead = "set it back, or start a new run in another output_dir"
        if change.kind == "inexact":
            instead += (
                ", or pass --resume_with_changes true to continue anyway (the result will differ)"
            )
        raise TokenRatioError(
            f"{run} began with {change.name} {shown(change.was)}, not {shown(change.now)}; "
            f"{instead}"
        )
    return changes


def report_changes(changes: list[Change]) -> None:
    """Log what differs from the run as it was."""
    for kind, text in (
        ("safe", "the resumed run has different settings; they do not affect the result: %s"),
        ("inexact", "resume_with_changes: from here on the run differs from the original: %s"),
    ):
        said = [
            f"{change.name} {shown(change.was)} -> {shown(change.now)}"
            for change in changes
            if change.kind == kind and change.name not in _UNSAID
        ]
        if said:
            _log.warning(text, ", ".join(said))


def resumed_record(
    checkpoint: Path, step: int, identity: Mapping[str, Any], output_dir: str | Path
) -> dict[str, Any]:
    """What `run.json` of a resumed run holds: its start, and a list of its resumptions.

    Each entry of `resumptions` has the time, the checkpoint and its step, and under the names they
    have at the start those values that differ from the start.
    """
    began, now = _record_of(checkpoint, as_begun=True), _as_read(identity)
    is_inside = checkpoint.resolve().parent == Path(output_dir).resolve()
    history = (read_run_file(output_dir) if is_inside else None) or began
    entry: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": checkpoint.name,
        "step": step,
    }
    old, new = began["config"], now["config"]
    parts = {
        "config": {k: v for k, v in new.items() if k in old and k not in _UNSAID and v != old[k]},
        "data": {k: v for k, v in now["data"].items() if v != began.get("data", {}).get(k)},
        "versions": {k: v for k, v in versions().items() if v != began.get("versions", {}).get(k)},
    }
    entry |= {name: part for name, part in parts.items() if part}
    if now["processes"] != began.get("processes"):
        entry["processes"] = now["processes"]
    return {
        **began,
        **{name: now[name] for name in now.keys() & {"run_folder"}},
        "config": {**old, "output_dir": new["output_dir"]},
        "resumptions": [*_resumptions(history), entry],
    }


def _record_of(checkpoint: Path, *, as_begun: bool = False) -> dict[str, Any]:
    """`run.json` of a checkpoint, with what its last resumption changed unless `as_begun`."""
    found = read_run_file(checkpoint, checkpoint.parent)
    if found is None:
        raise TokenRatioError(
            f"neither {checkpoint} nor the folder it is in holds a {RUN_FILE}: the run's settings "
            "cannot be checked, so it cannot be resumed exactly"
        )
    as_shape(ResumableRecord, found, f"{RUN_FILE} of the run of {checkpoint}")
    resumptions = _resumptions(found)
    if as_begun or not resumptions:
        return found
    last = resumptions[-1]
    mappings = {k: {**found.get(k, {}), **last.get(k, {})} for k in ("config", "data", "versions")}
    return {**found, **mappings, "processes": last.get("processes", found.get("processes"))}


def _resumptions(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = run.get("resumptions")
    return found if isinstance(found, list) else []


def _as_read(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as `run.json` would return it."""
    read: dict[str, Any] = json.loads(json.dumps(mask_secrets(identity), default=str))
    return read


def _changes(began: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What differs between the settings of a run and of its resumption; safe changes come last."""
    was, is_now = began["config"], now["config"]
    may_differ, safe = set(MAY_DIFFER), []
    wrappers = [of.get("wrapper") for of in (began, now)]
    alike = None in wrappers or {*wrappers} <= {"none", "ddp"}  # which save the same files
    if wrappers[0] != wrappers[1] and not alike:
        yield Change("wrapper", wrappers[0], wrappers[1], "other run")
    if began.get("processes") != now.get("processes") and "processes" in began.keys() & now.keys():
        rows = {of["processes"] * of["config"][_PER_DEVICE] for of in (began, now)}
        kind: Kind = (
            "safe" if len(rows) == 1 else "inexact"
        )  # the order of the rows follows from it
        change = Change("processes", began["processes"], now["processes"], kind)
        if kind == "inexact":
            yield change
        else:
            safe.append(change)
            may_differ.add(_PER_DEVICE)
    if is_now.get("lr_scheduler_type") in _FOLLOWS_EVALUATION:
        may_differ -= set(_WHEN_EVALUATED)
    elif was.get("metric_for_best_model") is None:
        may_differ |= set(_OF_THE_BEST)
    fixed = set(_OF_THE_CHECKPOINT)
    if {was.get("lr_scheduler_type"), is_now.get("lr_scheduler_type")} & set(_FOLLOWS_EVALUATION):
        fixed |= {"lr_scheduler_type", "learning_rate"}
    # The method before the settings that follow from it.
    for name in sorted(is_now, key=lambda name: name != "loss"):
        if name in _LENGTH or name not in was:
            continue
        old, new = was[name], is_now[name]
        if name == "model_init_kwargs":
            old, new = (
                {k: v for k, v in loading_arguments(value).items() if k not in WHERE_KWARGS}
                for value in (old, new)
            )
        if old == new:
            continue
        if name in may_differ:
            safe.append(Change(name, old, new, "safe"))
        else:
            yield Change(name, old, new, "other run" if name in fixed else "inexact")
    yield from _length_changes(was, is_now)
    if "adapters" in began and "adapters" in now and began["adapters"] != now["adapters"]:
        yield from _adapter_changes(began["adapters"] or {}, now["adapters"] or {})
    yield from safe


def _length_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """A run may become longer, measured as before."""
    (steps, epochs), (new_steps, new_epochs) = (
        (max(of["max_steps"], 0), of["num_train_epochs"]) for of in (was, now)
    )
    if steps != new_steps:
        kind: Kind = "safe" if 0 < steps < new_steps else "inexact"
        yield Change("max_steps", was["max_steps"], now["max_steps"], kind)
    if epochs != new_epochs and not new_steps:
        kind = "safe" if epochs < new_epochs else "inexact"
        yield Change("num_train_epochs", epochs, new_epochs, kind)


def _adapter_changes(began: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    if began.keys() != now.keys():
        yield Change("adapters", sorted(began) or None, sorted(now) or None, "other run")
    for adapter, settings in now.items():
        was = began.get(adapter, {})
        for name, value in settings.items():
            if name in was and was[name] != value:
                yield Change(f"the adapter's {name}", was[name], value, "other run")
