"""The policy that a trainer trains, its reference and their base, from what it is given."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
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
from tokenratio.models.loading import check_model, load_model, make_reference
from tokenratio.models.provenance import Origin, absolute, origin_of
from tokenratio.models.reference import Reference
from tokenratio.models.stored_weights import changed_weight
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
        origin: what the policy was put together from, before a new adapter was added.
        base_folder: where the base of the policy's adapter is to be saved; None if it is on disk or
            on the hub already, or there is no adapter.
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
        # Whole or not at all: a folder cut off while being written would be taken for a model.
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

    An adapter that the model has is part of both: merged into the base where a new one is added,
    else trained further against a frozen copy of itself.

    Raises:
        TokenRatioError: a model or an adapter that does not fit, or would be trained wrongly.
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
    # An adapter that stays on top of one that was merged, or a new one on top of any.
    has_new_base = is_merged or (config is None and len(origin.adapters) > 1)
    return _with_base(PolicySetup(model, reference, origin), args, is_new=has_new_base)


def _require_known_kind(model: PreTrainedModel | PeftModel) -> None:
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise TokenRatioError(
                f"prompt learning ({config.peft_type.value}) is not supported: use LoRA, or "
                "another added layer"
            )
    if not isinstance(language_model(model), PreTrainedModel):
        answer_token_requests(language_model(model))  # raises what is wrong with it


def _with_base(start: PolicySetup, args: TokenRatioConfig, *, is_new: bool) -> PolicySetup:
    """Name the base of the policy's adapter, to be saved in the run's folder if it is new."""
    if start.adapters is None:
        return start
    config = start.adapters.active_peft_config
    known = absolute(config.base_model_name_or_path or start.origin.base or "")
    is_new = is_new or not known
    if not is_new and args.should_save:  # the process that saves decides
        cache_dir = (args.init_kwargs or {}).get("cache_dir")
        weight = changed_weight(start.adapters, known, cache_dir=cache_dir)
        if weight is not None:
            is_new = True
            start.origin = Origin("", start.origin.base, (*start.origin.adapters, _CHANGES))
            _log.warning(
                "the model is not as %s holds it (%s differs): it is saved as the base of the "
                "run's adapter",
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
