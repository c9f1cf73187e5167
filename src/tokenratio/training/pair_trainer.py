"""What the trainers of policies and of reward models share: data, batches, guards, metrics."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PredictionOutput

from tokenratio.data import LengthGroupedSampler, PreparedData, row_lengths
from tokenratio.data.prepared_cache import tokenizer_digest
from tokenratio.data.template import depends_on_day
from tokenratio.errors import TokenRatioError
from tokenratio.models.adapters import check_adapter_file
from tokenratio.models.loading import check_fits
from tokenratio.models.token_requests import language_model
from tokenratio.models.weights import require_whole
from tokenratio.run_folder import read_run_file, replace_text
from tokenratio.training.callbacks import EpochSetter, StepGuard
from tokenratio.training.metrics import ExampleLosses, MetricSums
from tokenratio.training.pair_config import PairConfig, Role, encode_source, is_several
from tokenratio.training.resume import ResumableTrainer
from tokenratio.training.token_contrast import TokenContrast

Prepared: TypeAlias = PreparedData | dict[str, PreparedData | None] | None
_SUMS_FILE = "metric_sums.json"


class PairTrainer(ResumableTrainer):
    """The base of the trainers; a subclass defines the losses.

    Args:
        model: about to be trained, outside every wrapper of training.
        args: the settings; their `objective` determines what the rows are.
        train_dataset: any source of the data, or what `prepare_pairs` returned; None to evaluate
            only.
        eval_dataset: as train_dataset, or a dict of several by name.
        tokenizer: with the chat template the data is rendered with.
        callbacks: as in transformers.
    """

    args: PairConfig
    processing_class: PreTrainedTokenizerBase
    model: nn.Module
    # What to do about a loss that is not finite.
    advice: ClassVar[str] = "Lower the learning rate"

    def __init__(
        self,
        model: nn.Module,
        args: PairConfig,
        train_dataset: Any,
        eval_dataset: Any,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.args, self.processing_class, self._bare_model = args, tokenizer, model
        self.train_data = self.prepare(train_dataset, role="train")
        evaluated, role = args.evaluated(train_dataset, eval_dataset)
        self.eval_data = self._prepare_parts(evaluated, role)
        self._train_collator, collator = self.collators()
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=self.train_data and self.train_data.dataset,
            eval_dataset=_datasets_of(self.eval_data),
            processing_class=tokenizer,
            compute_metrics=self._eval_metrics,
            callbacks=callbacks,
        )
        self.add_callback(StepGuard(self.check_gradient))
        # `compute_loss` divides by the whole step's weight, over accumulation and processes.
        self.loss_is_scaled_for_ga = True
        self._sums, self._tokens = MetricSums(), 0
        # When the interval between two logged lines began, by the performance counter.
        self._interval_start: float | None = None
        self._step_rows: list[int] = []
        self._metric_names: tuple[list[str], list[str]] = ([], [])

    # --- defined by subclasses --------------------------------------------------------------------

    def example_losses(
        self, model: nn.Module, inputs: dict[str, Tensor], processes: int, weight: int | Tensor
    ) -> ExampleLosses:
        """The losses of a batch, `total` being Σ loss · processes / weight."""
        raise NotImplementedError

    def collators(self) -> tuple[Any, Any]:
        """The collators for training and for evaluation."""
        raise NotImplementedError

    def model_identity(self) -> dict[str, Any]:
        """What `run.json` records of the run besides its data."""
        raise NotImplementedError

    def grouped_lengths(self, dataset: Dataset) -> Any:
        """The length of each row by which rows are grouped."""
        return row_lengths(dataset)

    def check_encoded(self, rows: Dataset) -> None:
        """Refuse rows that were encoded elsewhere and lack something."""

    # --- data -------------------------------------------------------------------------------------

    def prepare(self, source: Any, *, role: Role = "eval") -> PreparedData | None:
        """Encode a source that is not encoded yet, and check that the model can take it."""
        if source is None:
            return None
        if isinstance(source, PreparedData):
            # Another run's reference may differ from this run's. A selection's rows are renumbered:
            # errors and caches find them by their number.
            dataset = source.dataset
            stale = [name for name in dataset.column_names if name.endswith("_ref_log_probs")]
            dataset = dataset.remove_columns([*stale, "row"]).add_column("row", range(len(dataset)))
            return replace(source, dataset=dataset)
        data = encode_source(source, self.processing_class, self.args, role=role)
        check_fits(self._bare_model, data)
        return data

    def _prepare_parts(self, source: Any, role: Role = "eval") -> Prepared:
        if is_several(source):
            return {name: self.prepare(part, role=role) for name, part in source.items()}
        return self.prepare(source, role=role)

    def run_identity(self) -> dict[str, Any]:
        """Models and data, with digests."""
        evaluated = self.eval_data if isinstance(self.eval_data, dict) else {"": self.eval_data}
        data = {"train": self.train_data}
        data |= {f"eval {name}".strip(): part for name, part in evaluated.items()}
        parts = {name: part.identity() for name, part in data.items() if part is not None}
        tokenizer = tokenizer_digest(self.processing_class)
        return {**self.model_identity(), "tokenizer": tokenizer, "data": parts}

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """Training: batches of what the loss needs. Evaluation: whole responses of all rows."""
        collator, drops_last = self.data_collator, self.args.dataloader_drop_last
        if kwargs.get("is_training"):
            self.data_collator = self._train_collator
        else:
            self.args.dataloader_drop_last = False
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drops_last

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if not self.args.groups_by_length:
            return super()._get_train_sampler(train_dataset)
        sampler = LengthGroupedSampler(
            self.grouped_lengths(self.train_dataset if train_dataset is None else train_dataset),
            self.args.train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_processes=self.accelerator.num_processes,
        )
        self.add_callback(EpochSetter(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        return SequentialSampler(eval_dataset)

    # --- the step ---------------------------------------------------------------------------------

    def before_training(self, checkpoint: Path | None) -> None:
        """Reset the metrics, or restore them from the checkpoint."""
        self._reset_metrics()
        if checkpoint is None or not self.is_world_process_zero():
            return
        if (checkpoint / _SUMS_FILE).is_file():
            self._sums = MetricSums.read(checkpoint / _SUMS_FILE)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """One optimizer step's batches, and their weight on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weights = sum(map(self.args.objective.weight, batches))
        weight = torch.as_tensor(weights, dtype=torch.float32)
        self._step_rows = [int(row) for batch in batches for row in batch["row"]]
        return batches, self.accelerator.gather(weight.to(device)).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ExampleLosses]:
        """The batch's share of the step's loss; the batch's own mean where no step is given."""
        if self._interval_start is None and model.training:
            self._interval_start = time.perf_counter()
        weight: Tensor | int
        if num_items_in_batch is None:
            processes, weight = 1, self.args.objective.weight(inputs)
        else:  # every wrapper averages gradients over processes; the weight is that of all of them
            processes, weight = self.accelerator.num_processes, num_items_in_batch
        examples = self.example_losses(model, inputs, processes, weight)
        self._require_finite(examples, inputs["row"])
        if num_items_in_batch is not None:
            self._sums.add(examples.metrics)
            # Tokens that the model runs over; a shared prompt counts once.
            self._tokens += int(inputs["attention_mask"].sum())
        return (examples.total, examples) if return_outputs else examples.total

    def stop_for_gradient(self) -> NoReturn:
        self._stop("gradient", self._step_rows, self.train_data)

    def _require_finite(self, examples: ExampleLosses, rows: Tensor) -> None:
        finite = examples.loss.isfinite()
        # Every process stops, or the others would wait for the one that did.
        if not bool(self.accelerator.reduce(finite.all().float(), "mean") == 1):
            data = self.train_data if self.model.training else None
            self._stop("loss", rows[~finite].tolist(), data)

    def _stop(self, what: str, rows: list[int], data: PreparedData | None) -> NoReturn:
        raise TokenRatioError(
            f"the {what} is not finite at step {self.state.global_step + 1} "
            f"({_name_rows(rows, data)}); stopped before the update, earlier checkpoints are "
            f"untouched. {self.advice}"
        )

    # --- metrics and evaluation -------------------------------------------------------------------

    def _reset_metrics(self) -> None:
        """Begin an interval between two logged lines."""
        self._sums, self._tokens, self._interval_start = MetricSums(), 0, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this interval's metrics to a training line."""
        if "loss" in logs and self._interval_start is not None:
            sums = self._sums.reduce(gather_object)
            tokens = sum(gather_object([self._tokens]))
            seconds = time.perf_counter() - self._interval_start
            logs |= sums.means() | {"tokens_per_second": tokens / seconds}
            self._reset_metrics()
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]  # any source
        self, eval_dataset: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate on any source the constructor takes, or on the one it was given.

        Of several held-out sets, one may be given by its name.
        """
        names = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else ()
        if not (isinstance(eval_dataset, str) and eval_dataset in names):
            eval_dataset = self._encoded(eval_dataset)
        return super().evaluate(eval_dataset, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Metrics, and each row's prediction, of any source the constructor takes.

        Returns:
            `predictions` in the order of the rows that were kept: the chosen and the rejected
            response's reward, `[pairs, 2]`; for `loss="sft"` the response's log-probability in
            nats, `[rows, 1]`. `label_ids` are the rows' numbers.
        """
        output = super().predict(self._encoded(test_dataset), *args, **kwargs)
        if output.predictions is None or output.label_ids is None:
            return output
        order = np.argsort(output.label_ids, kind="stable")
        columns = [2 * self._metric_names[0].index(name) for name in self.args.objective.predicted]
        predictions, rows = np.asarray(output.predictions), np.asarray(output.label_ids)
        return PredictionOutput(predictions[order][:, columns], rows[order], output.metrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss and, for each example, the numerators and counts of the metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, examples = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        metrics = examples.metrics
        self._metric_names = (list(metrics.ratios), list(metrics.peaks))
        return loss.detach(), metrics.table(), inputs["row"]

    def _eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        sums = MetricSums()
        sums.add_table(np.asarray(prediction.predictions).tolist(), *self._metric_names)
        return sums.means()

    def _encoded(self, source: Any) -> Any:
        if isinstance(source, Dataset) and "prompt_ids" in source.column_names:
            self.check_encoded(source)
            return source
        return None if source is None else _datasets_of(self._prepare_parts(source))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(self._bare_model, PeftModel) and not is_sharded:
            check_adapter_file(self._bare_model, Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what transformers only warns of."""
        problem = "the checkpoint does not fit the model"
        model = language_model(self._bare_model)
        require_whole(model, load_result.missing_keys, load_result.unexpected_keys, problem)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and tokenizer; in a checkpoint also the metrics not logged yet."""
        sums = self._sums.reduce(gather_object) if _internal_call else None
        if sums and self.args.should_save:
            path = Path(output_dir or self.args.output_dir) / _SUMS_FILE
            replace_text(path, json.dumps(sums.to_dict()))
        super().save_model(output_dir, _internal_call)


def _datasets_of(data: Prepared) -> Dataset | dict[str, Dataset] | None:
    """The rows that a data loader reads."""
    if isinstance(data, dict):
        return {name: part.dataset for name, part in data.items() if part is not None}
    return data and data.dataset


def _name_rows(rows: list[int], data: PreparedData | None) -> str:
    """The origins of rows in `data`, or without it their numbers."""
    names = [
        f"evaluation row {row}" if data is None else data.dataset[row]["origin"] for row in rows
    ]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "rows of another process"


def fix_day(
    args: PairConfig, tokenizer: PreTrainedTokenizerBase, *, token_scores: str | Path | None = None
) -> None:
    """Set `args.template_date` if the chat template shows the date, so that the run has only one.

    It is that of the run to be resumed, else of the token scores, else today, on all processes.
    """
    if args.template_date is not None or not depends_on_day(tokenizer, args.template):
        return
    day = _day_of_run(args)
    if not day and token_scores is not None:
        day = TokenContrast.open(token_scores).template.get("template_date")
    day = day or args.template.day.isoformat()
    args.template_date = broadcast_object_list([day])[0]


def _day_of_run(args: PairConfig) -> str | None:
    resume, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if isinstance(resume, str) and resume.lower() not in ("true", "false"):
        folders = [Path(resume), Path(resume).parent]
    elif any(folder.glob("checkpoint-*")):
        folders = [folder]
    else:
        return None
    began = read_run_file(*folders)
    return None if began is None else began["config"].get("template_date")
