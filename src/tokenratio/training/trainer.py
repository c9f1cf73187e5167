"""The trainer of policies: token statistics in place of logits, and a reference to compare with."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tokenratio.data import PreparedData, padding_id, row_lengths
from tokenratio.data.inspection import end_disagreement
from tokenratio.data.template import with_chat_template
from tokenratio.errors import TokenRatioError
from tokenratio.models.loading import generation_ends, load_tokenizer
from tokenratio.models.reference import Reference, model_digest
from tokenratio.models.state_baseline import (
    OPTIMIZER_FILE,
    StateBaseline,
    load_baseline,
    load_optimizer,
    save_baseline,
    save_optimizer,
)
from tokenratio.models.token_requests import language_model
from tokenratio.training.cache_entry import ReferenceCache, What
from tokenratio.training.callbacks import BaselineStep, MetricsWriter
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.constructors import explain_arguments
from tokenratio.training.displacement import DisplacementAlarm
from tokenratio.training.forward import Forward
from tokenratio.training.metrics import ExampleLosses
from tokenratio.training.pair_config import Role
from tokenratio.training.pair_trainer import PairTrainer, fix_day
from tokenratio.training.policy_setup import set_up_policy
from tokenratio.training.reference_cache import CacheSettings, reference_cache
from tokenratio.training.run_checks import check_run
from tokenratio.training.token_contrast import has_contrast, with_contrast

_log = logging.getLogger(__name__)


@explain_arguments(TokenRatioConfig)
class TokenRatioTrainer(PairTrainer):
    """Trains a causal language model on preference pairs with TBPO, or another of `METHODS`.

    Args:
        model: the name of a model, or a transformers causal language model, PEFT-wrapped or not.
            An adapter that it has is part of the starting policy: trained further, or with
            `peft_config` merged into the model.
        ref_model: the reference; None for a frozen copy of the starting policy, or, with a new
            adapter, for the same weights with the adapter off.
        args: the settings.
        train_dataset: preference pairs (for `loss="sft"`: completions, or pairs whose chosen side
            is taken): a `datasets.Dataset`, a list of dicts, a file or folder, a hub name, or what
            `prepare_pairs` / `prepare_completions` returned.
        eval_dataset: as train_dataset, or a dict of several by name.
        processing_class: the tokenizer, its folder or hub name; by default the one saved with the
            model.
        peft_config: wrap the model in this new adapter: a configuration of PEFT's, or a dict of its
            settings (LoRA, if it has no `peft_type`).
        callbacks: as in transformers.
    Raises:
        TokenRatioError: data, settings or a model that cannot be used.
    """

    args: TokenRatioConfig
    advice: ClassVar[str] = "Lower beta or the learning rate, or use a bounded generator (logistic)"

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        ref_model: str | Path | PreTrainedModel | PeftModel | None = None,
        args: TokenRatioConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | str | Path | None = None,
        peft_config: PeftConfig | Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = TokenRatioConfig(output_dir="tokenratio_output") if args is None else args
        check_run(args, TokenRatioConfig, eval_dataset, callbacks)
        if processing_class is None:
            processing_class = load_tokenizer(model, args.init_kwargs)
        elif isinstance(processing_class, str | Path):
            processing_class = load_tokenizer(processing_class)
        tokenizer = with_chat_template(processing_class, args.chat_template)
        fix_day(args, tokenizer, token_scores=args.token_scores)
        if ref_model is not None and not args.method.has_reference:
            _log.warning("%s has no reference: ref_model is not used", args.loss)
        self._setup = setup = set_up_policy(model, ref_model, peft_config, args)
        policy = setup.policy
        self.forward = Forward(args, language_model(policy), setup.reference, setup.adapters)
        own = [DisplacementAlarm(args), MetricsWriter()]
        super().__init__(
            policy, args, train_dataset, eval_dataset, tokenizer, [*own, *(callbacks or [])]
        )
        self._base_is_saved = False
        if self.reference is not None:
            if not args.keeps_log_probs:
                self.reference.prepare(self.prepare_reference)
            if args.method.needs_baseline:
                self._add_baseline()

    # --- set-up -----------------------------------------------------------------------------------

    def prepare(self, source: Any, *, role: Role = "eval") -> PreparedData | None:
        """Encode a source, and add the columns that the loss and the settings need."""
        data = super().prepare(source, role=role)
        if data is None:
            return None
        if self.args.method.needs_contrast:
            data = with_contrast(data, self.args.token_scores, self.args.loss)
        if self.args.keeps_log_probs:
            assert self.reference is not None
            data = self._ask_reference(data, "log_probs").attach(data)
            self.reference.leave_device()
        return data

    def collators(self) -> tuple[Any, Any]:
        self._warn_of_ends()
        args, cache = self.args, None
        models = [self._bare_model, *(self.reference.models if self.reference else [])]
        if args.cache_reference and not args.keeps_log_probs and self.train_data is not None:
            cache = self._ask_reference(self.train_data, "hidden")
        return args.objective.collators(padding_id(self.processing_class), models, cache)

    def _ask_reference(self, data: PreparedData, what: What) -> ReferenceCache:
        """The reference's outputs on the data, from disk or computed now."""
        args = self.args
        assert self.reference is not None
        settings = CacheSettings(
            root=args.reference_cache_dir,
            batch_size=args.per_device_eval_batch_size,
            device=args.device,
            padding_id=padding_id(self.processing_class),
            autocast=args.autocast_dtype,
            progress=not args.disable_tqdm,
        )
        return reference_cache(self.reference.model or self._setup.policy, data, what, settings)

    def check_encoded(self, rows: Dataset) -> None:
        """Refuse encoded rows that lack columns which `prepare` would have added."""
        lacks = None
        if self.args.keeps_log_probs:  # the rows' own may be another reference's
            lacks = "the reference's log-probabilities, which cache_reference adds"
        elif self.args.method.needs_contrast and not has_contrast(rows):
            lacks = "the contrast of their tokens, which is added"
        if lacks is not None:
            raise TokenRatioError(
                f"these rows lack {lacks} when rows are prepared: evaluate on the source itself, "
                "or on what prepare_pairs returned"
            )

    def _warn_of_ends(self) -> None:
        """Warn if generation with the saved model would run past the template's end of turn."""
        if self.train_data is not None:
            ends = generation_ends(getattr(self._language_model, "generation_config", None))
            if warning := end_disagreement(self.train_data, self.processing_class, ends):
                _log.warning("%s", warning)

    def _add_baseline(self) -> None:
        size = self._language_model.get_output_embeddings().weight.shape[1]
        baseline = StateBaseline(size, self.args.baseline_hidden_size).to(self.args.device)
        broadcast(list(baseline.parameters()))
        self.forward.baseline = baseline
        self._baseline_optimizer = torch.optim.AdamW(
            baseline.parameters(), lr=self.args.baseline_learning_rate, weight_decay=0.0
        )
        self.add_callback(BaselineStep(self._baseline_optimizer))

    @property
    def reference(self) -> Reference | None:
        """π_ref; None for a loss without one."""
        return self.forward.reference

    @property
    def baseline(self) -> StateBaseline | None:
        """TBPO-Q's state baseline."""
        return self.forward.baseline

    @property
    def _language_model(self) -> PreTrainedModel:
        return language_model(self._bare_model)

    def example_losses(
        self, model: nn.Module, inputs: dict[str, Tensor], processes: int, weight: int | Tensor
    ) -> ExampleLosses:
        return self.forward(model, inputs, processes / weight)

    def grouped_lengths(self, dataset: Dataset) -> Any:
        """The length of what the model runs for each row: of pairs cut and prompts shared."""
        shared = getattr(self._train_collator, "share_prompt", "never") != "never"
        return row_lengths(dataset, pruned=self.args.compares_steps, shared=shared)

    def before_training(self, checkpoint: Path | None) -> None:
        """Reset the metrics, or restore them and TBPO-Q's baseline from the checkpoint."""
        super().before_training(checkpoint)
        self.forward.checks_start = self.args.check_reference and checkpoint is None
        self._save_base(replace=checkpoint is None)
        if checkpoint is not None and self.baseline is not None:
            load_baseline(self.baseline, checkpoint)
            load_optimizer(self._baseline_optimizer, checkpoint / OPTIMIZER_FILE)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.baseline is not None:
            load_baseline(self.baseline, Path(str(self.state.best_model_checkpoint)))

    def model_identity(self) -> dict[str, Any]:
        """Model, adapters and reference, with digests."""
        start, reference = self._setup.origin.as_dict(), self.reference
        if reference is None and self._setup.adapters is not None:
            start["sha256"] = model_digest(self._bare_model)  # the adapter's base
        return {
            "model": start["path"] or start["base"],
            "starts_from": start,
            "run_folder": os.path.abspath(self.args.output_dir),
            "adapters": _adapter_identity(self._bare_model),
            "reference": reference and reference.identity(self._bare_model),
        }

    # --- saving -----------------------------------------------------------------------------------

    def _save_base(self, *, replace: bool) -> None:
        """Save the adapter's base if it exists nowhere else; `replace` one saved before."""
        folder = self._setup.base_folder
        if folder is None or self._base_is_saved or not self.args.should_save:
            return
        if replace or not folder.is_dir():
            self._setup.save_base(self.processing_class)
        self._base_is_saved = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and TBPO-Q's baseline; in a checkpoint its optimizer too."""
        folder = Path(output_dir or self.args.output_dir)
        self._save_base(replace=True)
        if self.args.should_save and self.baseline is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_baseline(self.baseline, folder)
            if _internal_call:
                save_optimizer(self._baseline_optimizer, folder / OPTIMIZER_FILE)
        super().save_model(output_dir, _internal_call)


def _adapter_identity(model: Any) -> dict[str, dict[str, Any]] | None:
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
