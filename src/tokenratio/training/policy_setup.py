"""Sets up the policy to train, its reference and their base."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tokenratio.errors import TokenRatioError
from tokenratio.models.adapter_checks import check_adapter, require_same, sample_log_probs
from tokenratio.models.adapters import (
    add_adapter,
    as_peft_model,
    base_of,
    has_adapter,
    merge_adapters,
)
from tokenratio.models.gguf import is_gguf
from tokenratio.models.loading import check_model, load_model, make_reference
from tokenratio.models.provenance import Origin, absolute, origin_of
from tokenratio.models.reference import Reference, own_weights
from tokenratio.models.token_requests import answer_token_requests, disable_dropout, language_model
from tokenratio.run_folder import BASE_FOLDER, ORIGIN_FILE
from tokenratio.training.adapter_settings import peft_config_of
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.run_checks import check_trained

_log = logging.getLogger(__name__)
_CHANGES = "changes made after it was loaded"


@dataclass
class PolicySetup:
    """What a run starts with.

    Attributes:
        policy: about to be trained.
        reference: π_ref; None for a loss without one.
        origin: what the policy was assembled from, before a new adapter was added.
        base_folder: where to save the base of the policy's adapter; None without an adapter, or if
            the base is already on disk or on the hub.
    """

    policy: PreTrainedModel | PeftModel
    reference: Reference | None
    origin: Origin
    base_folder: Path | None = None

    @property
    def adapters(self) -> PeftModel | None:
        """PEFT's wrapper, if there is one."""
        return self.policy if isinstance(self.policy, PeftModel) else None

    def save_base(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save the model that the policy's adapter belongs to, if it exists nowhere else."""
        if self.base_folder is None or self.adapters is None:
            return
        # Rename it when complete: a partly written folder would pass for a model.
        unfinished = self.base_folder.with_name(f".{self.base_folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        base_of(self.adapters).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        text = json.dumps(self.origin.as_dict(), indent=2) + "\n"
        (unfinished / ORIGIN_FILE).write_text(text, encoding="utf-8")
        shutil.rmtree(self.base_folder, ignore_errors=True)
        os.replace(unfinished, self.base_folder)


def set_up_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    ref_model: str | Path | PreTrainedModel | PeftModel | None,
    peft_config: PeftConfig | Mapping[str, Any] | None,
    args: TokenRatioConfig,
) -> PolicySetup:
    """The policy to be trained and its reference, both computing what the given model computes.

    An adapter of the model is part of both: merged into the base if a new one is added, otherwise
    trained further against a frozen copy of itself.
    """
    if isinstance(model, str | Path):
        model = load_model(model, args.init_kwargs)
    config = None if peft_config is None else peft_config_of(peft_config)
    given: Tensor | None = None
    if has_adapter(model) or config is not None:
        _require_known_kind(model)
        given = sample_log_probs(model)
    origin, precision = origin_of(model), getattr(language_model(model), "dtype", torch.float32)
    is_merged = has_adapter(model) and config is not None
    if is_merged:
        model = merge_adapters(model)
    elif has_adapter(model):
        assert given is not None
        model = as_peft_model(model)
        require_same(given, sample_log_probs(model), f"{origin} was changed", precision=precision)
    answer_token_requests(language_model(model))
    disable_dropout(model)
    reference = None
    if args.method.has_reference:
        reference = make_reference(
            model, ref_model, adds_adapter=config is not None, init_kwargs=args.init_kwargs
        )
    if config is not None:
        set_seed(args.seed)  # Trainer seeds later; the adapter's start is part of the run
        assert isinstance(model, PreTrainedModel)
        model = add_adapter(model, config)
    if isinstance(model, PeftModel):
        is_reference = reference is not None and reference.model is None
        check_adapter(model, given if config is not None else None, is_reference=is_reference)
    if given is not None and ref_model is None and reference is not None and reference.model:
        after = sample_log_probs(reference.model)
        require_same(given, after, "the reference is not the starting policy", precision=precision)
    check_trained(model, args.learning_rate)
    check_model(model)
    # An adapter on top of a merged one exists only with this run's base.
    has_new_base = is_merged or (config is None and len(origin.adapters) > 1)
    return _with_base(PolicySetup(model, reference, origin), args, is_new=has_new_base)


def _require_known_kind(model: PreTrainedModel | PeftModel) -> None:
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise TokenRatioError(
                f"prompt learning ({config.peft_type.value}) is not supported: use LoRA or "
                "another supported adapter"
            )
    if not isinstance(language_model(model), PreTrainedModel):
        answer_token_requests(language_model(model))  # raises what is wrong with it


def _with_base(start: PolicySetup, args: TokenRatioConfig, *, is_new: bool) -> PolicySetup:
    """Set the base of the policy's adapter; a new one is to be saved in the run's folder."""
    if start.adapters is None:
        return start
    config = start.adapters.active_peft_config
    known = absolute(config.base_model_name_or_path or start.origin.base or "")
    # Neither peft nor transformers loads an adapter on a GGUF file.
    is_new = is_new or not known or is_gguf(known)
    if not is_new and args.should_save:  # the process that saves decides
        cache_dir = (args.init_kwargs or {}).get("cache_dir")
        weight = _changed_weight(start.adapters, known, cache_dir)
        if weight is not None:
            is_new = True
            start.origin = Origin("", start.origin.base, (*start.origin.adapters, _CHANGES))
            _log.warning(
                "the model differs from %s (in %s): it is saved as the base of the run's adapter",
                known,
                weight,
            )
    if not is_new:
        config.base_model_name_or_path = known
        return start
    folder = Path(os.path.abspath(Path(args.output_dir).expanduser())) / BASE_FOLDER
    for part in (start.origin.base, *start.origin.adapters):
        if Path(part) == folder.parent or folder in (Path(part), *Path(part).parents):
            raise TokenRatioError(
                f"output_dir {args.output_dir} holds {part}, which the run starts from: choose "
                "another output_dir"
            )
    config.base_model_name_or_path = str(folder)
    start.base_folder = folder
    if start.reference is not None and start.reference.model is None:
        start.reference.origin = Origin(str(folder), start.origin.base, start.origin.adapters)
    return start


def _changed_weight(model: nn.Module, origin: str, cache_dir: str | None) -> str | None:
    """The first weight of a model that differs from its files; None if none is known to.

    A model may have been changed since it was loaded: merged with an adapter, trained, or resized.
    An adapter's weights do not count. Weights that the files hold under another name, quantised or
    pickled are not compared.

    Args:
        origin: a folder, or a hub name of which only what has been downloaded is read.
        cache_dir: where downloads are kept, if not in the usual place.
    """
    inner = language_model(model)
    if getattr(inner, "hf_quantizer", None) is not None:
        return None
    folder = _folder_of(origin, getattr(inner.config, "_commit_hash", None), cache_dir)
    if folder is None:
        return None
    prefix = f"{inner.base_model_prefix}."
    with ExitStack() as files:
        file_of: dict[str, Any] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            file = files.enter_context(safe_open(path, framework="pt"))
            file_of |= dict.fromkeys(file.keys(), file)
        for key, tensor in own_weights(model):
            name = key if key in file_of else key.removeprefix(prefix)
            if name not in file_of or tensor.is_meta:
                continue
            kept = file_of[name].get_tensor(name)
            if kept.shape != tensor.shape or not torch.equal(
                kept.to(tensor.dtype), tensor.detach().cpu()
            ):
                return key
    return None


def _folder_of(name: str, revision: str | None, cache_dir: str | None) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
    except (OSError, ValueError):  # not downloaded, or not a repository's name
        return None
