"""What a resumed run must share with its beginning."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from tokenratio.errors import TokenRatioError
from tokenratio.models.pretrained_arguments import WHERE_KWARGS, loading_arguments
from tokenratio.models.reference import describe_reference
from tokenratio.run_folder import RUN_FILE, mask_secrets, read_run_file, versions

# Settings that change neither the order of the rows nor the arithmetic. All others are held to
# what the run began with, so that one that transformers adds is held until it is listed here.
MAY_DIFFER = frozenset(
    (
        *("output_dir", "run_name", "project", "resume_from_checkpoint", "do_train", "do_eval"),
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
# These may grow; what that does to the learning rate is logged.
_LENGTH = ("num_train_epochs", "max_steps")
# A learning rate that follows the evaluations depends on when they are.
_FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
_WHEN_EVALUATED = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start")
# A run that had no best checkpoint so far may begin to look for one.
_OF_THE_BEST = ("metric_for_best_model", "greater_is_better")
_COMPARED_VERSIONS = ("torch", "transformers", "tokenratio")
_log = logging.getLogger(__name__)


def check_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume with anything that would change what the run computes.

    A policy built from the checkpoint itself would silently become its own reference; another batch
    size or seed would repeat some rows and leave out others.

    Args:
        identity: what `run.json` would hold now.
    Raises:
        TokenRatioError: what differs.
    """
    began = read_run_file(checkpoint, checkpoint.parent)
    if began is None:
        raise TokenRatioError(
            f"neither {checkpoint} nor the folder it is in holds a {RUN_FILE}: what the run began "
            "with cannot be checked, so it cannot be resumed exactly"
        )
    now = json.loads(json.dumps(mask_secrets(identity), default=str))
    run = f"the run of {checkpoint}"
    reference, old_reference = now.get("reference") or {}, began.get("reference") or {}
    if began.get("kind") != now.get("kind"):
        raise TokenRatioError(
            f"{run} trained a {began.get('kind', 'policy')}, not a {now.get('kind', 'policy')}"
        )
    # Settings first: another method has another reference.
    for name, was, is_now in _differences(began, now):
        raise TokenRatioError(
            f"{run} began with {name} {_shown(was)}, not {_shown(is_now)}; set it back, or start a "
            "new run in another output_dir"
        )
    if reference.get("sha256") != old_reference.get("sha256"):
        raise TokenRatioError(
            f"the reference is not the one that {run} began with "
            f"({describe_reference(old_reference)}): start from the same model as then, not from a "
            "checkpoint"
        )
    if now["data"]["train"]["digest"] != began["data"]["train"]["digest"]:
        raise TokenRatioError(f"the training data, tokenizer or lengths are not those of {run}")
    for name in _COMPARED_VERSIONS:
        was, is_now = (of.get(name) for of in (began.get("versions", {}), versions()))
        if None not in (was, is_now) and was != is_now:
            _log.warning("the run began with %s %s, and continues with %s", name, was, is_now)


def _differences(
    began: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that may not differ and does, as it was and as it is."""
    if "processes" in began and began["processes"] != now["processes"]:
        yield "processes", began["processes"], now["processes"]
    was, is_now = began["config"], now["config"]
    may_differ = set(MAY_DIFFER)
    if is_now.get("lr_scheduler_type") in _FOLLOWS_EVALUATION:
        may_differ -= set(_WHEN_EVALUATED)
    elif was.get("metric_for_best_model") is None:
        may_differ |= set(_OF_THE_BEST)
    # The method itself before what follows from it.
    for name in sorted(is_now, key=lambda name: name != "loss"):
        if name in may_differ or name in _LENGTH or name not in was:
            continue
        old, new = was[name], is_now[name]
        if name == "model_init_kwargs":
            old, new = (
                {k: v for k, v in loading_arguments(value).items() if k not in WHERE_KWARGS}
                for value in (old, new)
            )
        if old != new:
            yield name, old, new
    limits = [(of["max_steps"], of["num_train_epochs"]) for of in (was, is_now)]
    if (limits[0][0] > 0) != (limits[1][0] > 0) or limits[0][0] > limits[1][0]:
        yield "max_steps", limits[0][0], limits[1][0]
    elif limits[1][0] <= 0 and limits[0][1] > limits[1][1]:
        yield "num_train_epochs", limits[0][1], limits[1][1]
    if "adapters" in began and began["adapters"] != now.get("adapters"):
        yield from _adapter_differences(began["adapters"] or {}, now.get("adapters") or {})


def _adapter_differences(
    began: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    if began.keys() != now.keys():
        yield "adapters", sorted(began) or None, sorted(now) or None
    for adapter, settings in now.items():
        was = began.get(adapter, {})
        for name, value in settings.items():
            if name in was and was[name] != value:
                yield f"the adapter's {name}", was[name], value


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def adapter_settings(model: Any) -> dict[str, dict[str, Any]] | None:
    """The settings of each adapter of a PEFT model, for `run.json`; None for another model."""
    if not isinstance(model, PeftModel):
        return None
    leave_out = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
    return {
        name: {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
            if key not in leave_out
        }
        for name, config in model.peft_config.items()
    }
