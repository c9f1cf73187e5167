"""The trainer: transformers' `Trainer` with token statistics in place of logits."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from tokenratio.data import padding_id
from tokenratio.data.inspection import end_disagreement
from tokenratio.data.template import with_chat_template
from tokenratio.errors import TokenRatioError
from tokenratio.models.loading import generation_ends, load_tokenizer
from tokenratio.models.reference import Reference
from tokenratio.models.state_baseline import (
    OPTIMIZER_FILE,
    StateBaseline,
    load_baseline,
    load_optimizer,
    save_baseline,
    save_optimizer,
)
from tokenratio.models.token_requests import language_model
from tokenratio.run_folder import replace_text
from tokenratio.training.any_source import EvaluatesAnySource
from tokenratio.training.callbacks import BaselineStep, MetricsWriter, StepGuard, TellEpoch
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.constructors import explain_arguments
from tokenratio.training.data_pipeline import (
    ask_reference,
    asking_reference,
    count_tokens,
    datasets_of,
    make_collators,
    make_sampler,
    name_rows,
    prepare,
    prepare_parts,
    require_signals,
)
from tokenratio.training.displacement import DisplacementAlarm
from tokenratio.training.forward import Forward
from tokenratio.training.metrics import MetricSums
from tokenratio.training.objective import ExampleLosses, evaluated_metrics
from tokenratio.training.policy_setup import set_up_policy
from tokenratio.training.resume import ResumableTrainer
from tokenratio.training.run_checks import check_run
from tokenratio.training.same_run import adapter_settings
from tokenratio.training.template_settings import fix_day

_SUMS_FILE = "metric_sums.json"
_log = logging.getLogger(__name__)


@explain_arguments(TokenRatioConfig)
class TokenRatioTrainer(EvaluatesAnySource, ResumableTrainer):
    """Trains a causal language model on preference pairs with TBPO, or another of `METHODS`.

    Args:
        model: a hub name or folder, or a transformers causal language model, PEFT-wrapped or not.
            An adapter that it has is part of the starting policy: trained further, or with
            `peft_config` merged into the model.
        ref_model: the reference; None for a frozen copy of the starting policy, or, with a new
            adapter, for the same weights with the adapter off.
        args: the settings.
        train_dataset: preference pairs (for `loss="sft"`: completions, or pairs whose chosen side
            is taken): a `datasets.Dataset`, a list of dicts, a file or folder, a hub name, or what
            `prepare_pairs` / `prepare_completions` returned.
        eval_dataset: likewise, or a dict of several by name.
        processing_class: the tokenizer, its folder or hub name; by default the one saved with the
            model.
        peft_config: wrap the model in this new adapter: a configuration of PEFT's, or a dict of its
            settings (LoRA, if it has no `peft_type`).
        callbacks: as in transformers.
    Raises:
        TokenRatioError: anything a user can put right: data, settings, or a model that does not
            fit.
    """

    args: TokenRatioConfig

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
        check_run(args, TokenRatioConfig, evaluated_metrics, eval_dataset, callbacks)
        if processing_class is None:
            processing_class = load_tokenizer(model, args.model_init_kwargs)
        elif isinstance(processing_class, str | Path):
            processing_class = load_tokenizer(processing_class)
        processing_class = with_chat_template(processing_class, args.chat_template)
        fix_day(args, processing_class, token_scores=args.token_scores)
        self._is_sft = args.loss == "sft"
        if ref_model is not None and not args.method.has_reference:
            _log.warning("%s has no reference: ref_model is not used", args.loss)
        self._start = set_up_policy(model, ref_model, peft_config, args)
        model, reference = self._start.policy, self._start.reference
        self.forward = Forward(args, language_model(model), reference, self._start.adapters)

        # The policy outside every wrapper that training puts around it.
        self._policy = model
        self.args, self.processing_class = args, processing_class
        pad = padding_id(processing_class)
        encode = partial(prepare, tokenizer=processing_class, args=args, model=model)
        self._prepare = encode
        if args.keeps_log_probs:
            self._prepare = asking_reference(encode, reference, model, args, pad)
        self.train_data = self._prepare(train_dataset, role="train")
        evaluated, role = args.evaluated(train_dataset, eval_dataset)
        self.eval_data = prepare_parts(evaluated, self._prepare, role)
        self._warn_of_ends(model)
        cache, models = None, [model, *(reference.models if reference else [])]
        if args.cache_reference and not args.keeps_log_probs and self.train_data is not None:
            cache = ask_reference(self.train_data, "hidden", reference.model or model, args, pad)
        self._train_collator, collator = make_collators(args, pad, models, cache)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=self.train_data and self.train_data.dataset,
            eval_dataset=datasets_of(self.eval_data),
            processing_class=processing_class,
            compute_metrics=self._eval_metrics,
            callbacks=[DisplacementAlarm(args), MetricsWriter(), *(callbacks or [])],
        )
        self.add_callback(StepGuard(self.check_gradient))
        # `compute_loss` divides by all the step's pairs, over accumulation and processes.
        self.loss_is_scaled_for_ga = True
        self._base_is_saved = False
        self._sums = MetricSums()
        self._tokens = 0
        self._interval_start: float | None = None
        self._step_rows: list[int] = []
        self._metric_names: tuple[list[str], list[str]] = ([], [])
        if self.reference is not None:
            if not args.keeps_log_probs:
                self.reference.prepare(self.accelerator.prepare_model, self.args.device)
            if "baseline" in args.method.needs:
                self._add_baseline()

    # --- set-up -----------------------------------------------------------------------------------

    def encode_evaluated(self, source: Any) -> Dataset | dict[str, Dataset] | None:
        return datasets_of(prepare_parts(source, self._prepare))

    def check_encoded(self, rows: Dataset) -> None:
        require_signals(rows, self.args)

    def _warn_of_ends(self, model: nn.Module) -> None:
        """Say where others that generate with the model would pass the template's end of turn."""
        if self.train_data is not None:
            config = getattr(language_model(model), "generation_config", None)
            tokenizer = self.processing_class
            said = end_disagreement(self.train_data, tokenizer, generation_ends(config))
            if said is not None:
                _log.warning("%s", said)

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
        return language_model(self._policy)

    def before_training(self, checkpoint: Path | None) -> None:
        """Reset the metrics, or restore them and TBPO-Q's baseline from the checkpoint."""
        self.forward.checks_start = self.args.check_reference and checkpoint is None
        self._sums, self._tokens, self._interval_start = MetricSums(), 0, None
        self._save_base(replace=checkpoint is None)
        if checkpoint is None:
            return
        if self.baseline is not None:
            load_baseline(self.baseline, checkpoint)
            load_optimizer(self._baseline_optimizer, checkpoint / OPTIMIZER_FILE)
        if self.is_world_process_zero() and (checkpoint / _SUMS_FILE).is_file():
            state = json.loads((checkpoint / _SUMS_FILE).read_text(encoding="utf-8"))
            self._sums = MetricSums.from_dict(state)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train, or resume: see `ResumableTrainer.train`."""
        output = super().train(resume_from_checkpoint, **kwargs)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None and self.baseline is not None:
            load_baseline(self.baseline, Path(best))
        return output

    def run_identity(self) -> dict[str, Any]:
        """Model, adapters, reference and data, with digests."""
        evaluated = self.eval_data if isinstance(self.eval_data, dict) else {"": self.eval_data}
        data = {"train": self.train_data}
        data |= {f"eval {name}".strip(): part for name, part in evaluated.items()}
        return {
            "model": self._start.origin.name or self._start.origin.base,
            "starts_from": self._start.origin.as_dict(),
            "run_folder": os.path.abspath(self.args.output_dir),
            "adapters": adapter_settings(self._policy),
            "reference": self.reference and self.reference.identity(self._policy),
            "data": {name: part.identity() for name, part in data.items() if part is not None},
        }

    # --- the step ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of what the loss sees; evaluation looks at whole responses."""
        whole, self.data_collator = self.data_collator, self._train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if not self.args.groups_by_length:
            return super()._get_train_sampler(train_dataset)
        sampler = make_sampler(
            self.args,
            self.train_dataset if train_dataset is None else train_dataset,
            self._train_collator,
            self.accelerator.num_processes,
        )
        self.add_callback(TellEpoch(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        if not self.args.groups_by_length:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """One optimizer step's batches and its total weight: pairs, or for SFT response tokens."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = torch.as_tensor(sum(map(self._weight, batches)), dtype=torch.float32)
        self._step_rows = [int(row) for batch in batches for row in batch["row"]]
        return batches, self.accelerator.gather(weight.to(device)).sum()

    def _weight(self, inputs: dict[str, Tensor]) -> int:
        return int(inputs["completion_mask"].sum()) if self._is_sft else len(inputs["row"])

    def check_gradient(self) -> None:
        """Called before each update: a gradient that is not finite stops the run, weights intact.

        Raises:
            TokenRatioError: names the rows of the step.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            what = f"the gradient is not finite at step {self.state.global_step + 1}"
            self._stop(what, self._step_rows, training=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ExampleLosses]:
        """The batch's share of the step's loss; mean over the batch where no step is given."""
        if self._interval_start is None and model.training:
            self._interval_start = time.perf_counter()
        # DDP and FSDP average gradients over processes; the step's weight is that of all of them.
        share = (
            1 / self._weight(inputs)
            if num_items_in_batch is None
            else self.accelerator.num_processes / num_items_in_batch
        )
        examples = self.forward(model, inputs, share)
        self._require_finite(examples, inputs["row"])
        if num_items_in_batch is not None:
            self._sums.add(examples.metrics)
            self._tokens += count_tokens(inputs)
        return (examples.total, examples) if return_outputs else examples.total

    def _require_finite(self, examples: ExampleLosses, rows: Tensor) -> None:
        finite = examples.loss.isfinite()
        # Every process stops, or the others would wait for the one that did.
        if not bool(self.accelerator.reduce(finite.all().float(), "mean") == 1):
            what = f"the loss is not finite at step {self.state.global_step + 1}"
            self._stop(what, rows[~finite].tolist(), training=self.model.training)

    def _stop(self, what: str, rows: list[int], *, training: bool) -> NoReturn:
        names = name_rows(rows, self.train_data if training else None)
        raise TokenRatioError(
            f"{what} ({names}); stopped before the update, earlier checkpoints are untouched. "
            "Lower beta or the learning rate, or use a bounded generator (logistic)"
        )

    # --- metrics ----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this interval's metrics to a training line."""
        if "loss" in logs and self._interval_start is not None:
            sums = self._sums.reduce(gather_object)
            tokens = sum(gather_object([self._tokens]))
            seconds = time.perf_counter() - self._interval_start
            logs |= sums.means() | {"tokens_per_second": tokens / seconds}
            self._sums, self._tokens, self._interval_start = MetricSums(), 0, None
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss and, per example, the numerators and counts of the metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, examples = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        metrics = examples.metrics
        self._metric_names = (list(metrics.ratios), list(metrics.peaks))
        return loss.detach(), metrics.table(), inputs["row"]

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        names = ["logps/chosen"] if self._is_sft else ["rewards/chosen", "rewards/rejected"]
        return outputs[:, [2 * self._metric_names[0].index(name) for name in names]]

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        sums = MetricSums()
        sums.add_table(prediction.predictions.tolist(), *self._metric_names)
        return sums.means()

    # --- saving -----------------------------------------------------------------------------------

    def _save_base(self, *, replace: bool) -> None:
        """Save the adapter's base if it exists nowhere else.

        Args:
            replace: what stands there may be another run's.
        """
        folder = self._start.base_folder
        if folder is None or self._base_is_saved or not self.args.should_save:
            return
        if replace or not folder.is_dir():
            self._start.save_base(self.processing_class)
        self._base_is_saved = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizer and TBPO-Q's baseline; in a checkpoint its optimizer too."""
        folder = Path(output_dir or self.args.output_dir)
        sums = self._sums.reduce(gather_object) if _internal_call else None
        self._save_base(replace=True)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            if self.baseline is not None:
                save_baseline(self.baseline, folder)
                if _internal_call:
                    save_optimizer(self._baseline_optimizer, folder / OPTIMIZER_FILE)
            if sums:
                replace_text(folder / _SUMS_FILE, json.dumps(sums.to_dict()))
        super().save_model(output_dir, _internal_call)
