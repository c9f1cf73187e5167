"""A reward model of the Bradley–Terry kind, trained on the pairs that a policy trains on.

P(chosen ≻ rejected) = σ(r(chosen) − r(rejected)), fitted by maximum likelihood (Bradley & Terry
1952; for language models Stiennon et al. 2020, arXiv 2009.01325). r is a sequence classifier with
one output, read at a row's last token: at EOS, or where the row was cut.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from tokenratio.data import (
    LengthGroupedSampler,
    PairCollator,
    PreparedData,
    prepare_pairs,
    row_lengths,
)
from tokenratio.data.template import with_chat_template
from tokenratio.errors import TokenRatioError
from tokenratio.models.loading import check_fits, load_merged
from tokenratio.models.pretrained_arguments import loading_arguments
from tokenratio.models.token_requests import disable_dropout
from tokenratio.settings import option
from tokenratio.training.any_source import EvaluatesAnySource
from tokenratio.training.arguments import resolve_arguments
from tokenratio.training.callbacks import MetricsWriter, TellEpoch
from tokenratio.training.constructors import explain_arguments, explain_settings
from tokenratio.training.data_pipeline import name_rows
from tokenratio.training.data_settings import DataSettings, Role, first_process_prepares
from tokenratio.training.metrics import ExampleMetrics, MetricSums
from tokenratio.training.resume import ResumableTrainer
from tokenratio.training.run_checks import check_run, check_trained
from tokenratio.training.template_settings import fix_day

_PAD = "<|pad|>"


@explain_settings
@dataclass
class RewardConfig(DataSettings, TrainingArguments):
    """Settings of `RewardTrainer`: those of `transformers.TrainingArguments`, and a pair's lengths.

    Raises:
        TokenRatioError: a value outside its domain.
    """

    num_train_epochs: float = option(
        1.0, "Passes over the pairs; reward models overfit from the second on."
    )
    logging_steps: float = option(1, "Steps between two logged lines.")
    logging_nan_inf_filter: bool = option(False, "Hide non-finite losses; off, they stop the run.")
    remove_unused_columns: bool = option(
        False, "Must stay off: pairs are not arguments of forward."
    )
    train_sampling_strategy: str = option(
        "group_by_length",
        "Order of the rows: group_by_length, random or sequential.",
        choices=("group_by_length", "random", "sequential"),
    )
    max_length: int | None = option(
        2048, "Tokens of prompt and response; responses are cut on the right."
    )
    max_prompt_length: int | None = option(None, "Tokens of the prompt; it is cut on the left.")
    on_bad_row: str = option(
        "skip", "Rows that cannot be used: skip (counted) or error.", choices=("skip", "error")
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments of from_pretrained when the model is given by name."
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        *("model_init_kwargs", "chat_template_kwargs", "columns"),
    ]

    def __post_init__(self) -> None:
        self.check_data_settings()
        resolve_arguments(self, super().__post_init__)


def load_reward_model(
    name: str | Path, *, seed: int, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The body of a language model with a new head, or a reward model with its own.

    In float32 unless `init_kwargs` says otherwise.

    Args:
        name: a hub name or folder: of a causal language model such as a policy, whose output head
            is left aside, an adapter's too; or of a reward model.
        seed: of the new head.
    Raises:
        TokenRatioError: it cannot be loaded, or lacks weights beside the head's.
    """
    arguments = {**loading_arguments(init_kwargs), "output_loading_info": True}
    policy = load_merged(name, init_kwargs)
    if policy is not None:
        model = build_reward_model(policy.config, seed=seed).to(policy.dtype)
        missing = model.load_state_dict(policy.state_dict(), strict=False).missing_keys
        return _with_whole_body(model, missing, name)
    set_seed(seed)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(name), num_labels=1, **arguments
        )
    except Exception as error:  # whatever is wrong with the files or the arguments
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenRatioError(
            f"cannot load {str(name)!r} as the start of a reward model: {said}"
        ) from None
    return _with_whole_body(model, info["missing_keys"], name)


def _with_whole_body(
    model: PreTrainedModel, missing: Iterable[str], name: str | Path
) -> PreTrainedModel:
    """The model, if all that it lacks is its head: random weights in the body are a wrong model."""
    body = f"{model.base_model_prefix}."
    lacks = sorted(key for key in missing if key.startswith(body))
    if lacks:
        raise TokenRatioError(f"{name} has no weights for {', '.join(lacks[:3])}")
    return model


def build_reward_model(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A reward model with random weights."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    set_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


def with_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Make sure that the model reads a row's last token, whatever fills the row behind it.

    transformers' classifiers do not look at the attention mask: they take the last token that is
    not `config.pad_token_id`. Padded with EOS, as is usual where a tokenizer has no pad token, a
    row would be read one token before its EOS. So the pad token is made one of its own where it is
    not.

    Returns:
        The tokenizer, or a copy with a pad token; the model then has a row of embeddings for it.
    Raises:
        TokenRatioError: a model that reads its score elsewhere, an encoder.
    """
    encoders = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    if encoders or model.config.is_encoder_decoder:
        raise TokenRatioError(
            "an encoder cannot be trained on the policy's rows, prompt and response as one text: "
            "start from a causal language model"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"pad_token": _PAD})
        if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def bradley_terry_loss(
    chosen_rewards: Float[Tensor, "pairs"], rejected_rewards: Float[Tensor, "pairs"]
) -> Float[Tensor, "pairs"]:
    """−log σ(r_chosen − r_rejected) of each pair, in nats.

    >>> bradley_terry_loss(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


@explain_arguments(RewardConfig)
class RewardTrainer(EvaluatesAnySource, ResumableTrainer):
    """Trains a reward model on preference pairs: the mean over a step's pairs of the loss.

    Args:
        model: a sequence classifier with one output; its dropout is switched off.
        args: the settings.
        train_dataset: preference pairs: any source that `prepare_pairs` takes.
        eval_dataset: likewise.
        processing_class: the tokenizer; see `with_padding` for what is saved with the model.
    Raises:
        TokenRatioError: data, settings or a model that do not fit.
    """

    args: RewardConfig
    # `compute_loss` divides by all the step's pairs, over accumulation and processes.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: RewardConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase,
    ) -> None:
        if model.config.num_labels != 1:
            raise TokenRatioError(
                f"the model has {model.config.num_labels} outputs; a reward model has one"
            )
        check_run(args, RewardConfig, evaluated_metrics, eval_dataset)
        check_trained(model, args.learning_rate)
        disable_dropout(model)
        tokenizer = with_chat_template(processing_class, args.chat_template)
        fix_day(args, tokenizer)
        tokenizer = with_padding(model, tokenizer)

        def encode(source: Any, role: Role) -> PreparedData | None:
            if source is None:
                return None
            with first_process_prepares(args):
                data = prepare_pairs(source, tokenizer, **args.data_arguments(role))
            check_fits(model, data)
            return data

        self._encode = encode
        self.train_data = encode(train_dataset, "train")
        self.eval_data = encode(*args.evaluated(train_dataset, eval_dataset))
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(tokenizer.pad_token_id),
            train_dataset=self.train_data and self.train_data.dataset,
            eval_dataset=self.eval_data and self.eval_data.dataset,
            processing_class=tokenizer,
            compute_metrics=_eval_metrics,
            callbacks=[MetricsWriter()],
        )
        self._sums = MetricSums()

    def encode_evaluated(self, source: Any) -> Dataset:
        return self._encode(source, "eval").dataset

    def run_identity(self) -> dict[str, Any]:
        """Model and data, with digests."""
        data = {"train": self.train_data, "eval": self.eval_data}
        return {
            "kind": "reward model",
            "model": self.model.config.name_or_path,
            "reference": None,
            "data": {name: part.identity() for name, part in data.items() if part is not None},
        }

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        sampler = LengthGroupedSampler(
            row_lengths(self.train_dataset if train_dataset is None else train_dataset),
            self.args.train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_processes=self.accelerator.num_processes,
        )
        self.add_callback(TellEpoch(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        return SequentialSampler(eval_dataset)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """One optimizer step's batches and how many pairs they hold, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["row"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(pairs).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Float[Tensor, "pairs sides"]]:
        """The batch's share of the step's mean loss; its own mean where no step is given.

        Returns:
            The loss; with `return_outputs` the rewards too, chosen then rejected.
        """
        scores = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
        ).logits[:, 0]
        chosen, rejected = scores.float().chunk(2)
        losses = bradley_terry_loss(chosen, rejected)
        finite = losses.isfinite()
        # Every process stops, or the others would wait for the one that did.
        if not bool(self.accelerator.reduce(finite.all().float(), "mean") == 1):
            training = num_items_in_batch is not None
            rows = inputs["row"][~finite].tolist()
            raise TokenRatioError(
                f"the loss is not finite at step {self.state.global_step + 1} "
                f"({name_rows(rows, self.train_data if training else None)}); earlier checkpoints "
                "are untouched. Lower the learning rate"
            )
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            self._sums.add(_metrics(chosen, rejected))
            # DDP and FSDP average gradients over processes.
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        return (loss, torch.stack([chosen, rejected], dim=1)) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, the two rewards of each pair, and the pairs' row numbers."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, rewards = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, rewards, inputs["row"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this interval's metrics to a training line."""
        if "loss" in logs and self._sums:
            logs |= self._sums.reduce(gather_object).means()
            self._sums = MetricSums()
        super().log(logs, start_time)


def _metrics(chosen: Float[Tensor, "pairs"], rejected: Float[Tensor, "pairs"]) -> ExampleMetrics:
    chosen, rejected = chosen.detach(), rejected.detach()
    one, margin = torch.ones_like(chosen), chosen - rejected
    return ExampleMetrics(
        {
            "rewards/chosen": (chosen, one),
            "rewards/rejected": (rejected, one),
            "rewards/margins": (margin, one),
            "rewards/accuracies": ((margin > 0).to(margin.dtype), one),
            "rewards/ties": ((margin == 0).to(margin.dtype), one),
        }
    )


def evaluated_metrics(args: RewardConfig) -> list[str]:
    """The metrics that an evaluation reports, without `eval_`."""
    reward = torch.zeros(1)
    return ["loss", *([] if args.prediction_loss_only else _metrics(reward, reward).names)]


def _eval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    sums = MetricSums()
    sums.add(_metrics(*torch.as_tensor(prediction.predictions).unbind(1)))
    return sums.means()
