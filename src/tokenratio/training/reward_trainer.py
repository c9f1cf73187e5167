"""The trainer of reward models, of the Bradley–Terry kind, on the pairs that a policy trains on.

P(chosen ≻ rejected) = σ(r(chosen) − r(rejected)), fitted by maximum likelihood (Bradley & Terry
1952; for language models Stiennon et al. 2020, arXiv 2009.01325). r is a sequence classifier with
one output, read at a row's last token: at EOS, or where the row was cut.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.data import PairCollator
from tokenratio.data.template import with_chat_template
from tokenratio.errors import TokenRatioError
from tokenratio.models.loading import load_tokenizer
from tokenratio.models.reward_model import load_reward_model, with_padding
from tokenratio.models.token_requests import disable_dropout, language_model
from tokenratio.settings import option
from tokenratio.training.callbacks import MetricsWriter
from tokenratio.training.constructors import explain_arguments, explain_settings
from tokenratio.training.metrics import ExampleLosses, ExampleMetrics, reward_metrics
from tokenratio.training.pair_config import Objective, PairConfig
from tokenratio.training.pair_trainer import PairTrainer, fix_day
from tokenratio.training.run_checks import check_run, check_trained


class RewardObjective(Objective):
    """The mean over a step's pairs of `bradley_terry_loss`."""

    def metric_names(self) -> list[str]:
        return ["loss", *reward_metrics(torch.zeros(1), torch.zeros(1))]


@explain_settings
@dataclass
class RewardConfig(PairConfig):
    """Settings of `RewardTrainer`: those of `transformers.TrainingArguments`, and of the data.

    One epoch by default: reward models overfit from the second on.

    Raises:
        TokenRatioError: a value outside its domain.
    """

    train_sampling_strategy: str = option(
        "group_by_length",
        "Order of the rows: group_by_length, random or sequential.",
        choices=("group_by_length", "random", "sequential"),
    )

    __repr__ = PairConfig.__repr__

    @property
    def objective(self) -> Objective:
        """The reward model's objective."""
        return RewardObjective()


def bradley_terry_loss(
    chosen_rewards: Float[Tensor, "pairs"], rejected_rewards: Float[Tensor, "pairs"]
) -> Float[Tensor, "pairs"]:
    """−log σ(r_chosen − r_rejected) of each pair, in nats.

    >>> bradley_terry_loss(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


@explain_arguments(RewardConfig)
class RewardTrainer(PairTrainer):
    """Trains a reward model on preference pairs, with the loss averaged over a step's pairs.

    Args:
        model: a hub name or folder, of a reward model or of a policy, which gets a new reward head;
            or a sequence classifier with one output. Its dropout is switched off.
        args: the settings.
        train_dataset: preference pairs: any source that `prepare_pairs` takes.
        eval_dataset: as train_dataset, or a dict of several by name.
        processing_class: the tokenizer, its folder or hub name; by default the one saved with the
            model. See `with_padding` for what is saved.
    Raises:
        TokenRatioError: data, settings or a model that cannot be used.
    """

    args: RewardConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: RewardConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase | str | Path | None = None,
    ) -> None:
        if processing_class is None:
            processing_class = load_tokenizer(model, args.init_kwargs)
        elif isinstance(processing_class, str | Path):
            processing_class = load_tokenizer(processing_class)
        if isinstance(model, str | Path):
            model = load_reward_model(model, seed=args.seed, init_kwargs=args.init_kwargs)
        if model.config.num_labels != 1:
            raise TokenRatioError(
                f"the model has {model.config.num_labels} outputs; a reward model has one"
            )
        check_run(args, RewardConfig, eval_dataset)
        check_trained(model, args.learning_rate)
        disable_dropout(model)
        tokenizer = with_chat_template(processing_class, args.chat_template)
        fix_day(args, tokenizer)
        tokenizer = with_padding(model, tokenizer)
        super().__init__(model, args, train_dataset, eval_dataset, tokenizer, [MetricsWriter()])

    def collators(self) -> tuple[Any, Any]:
        """The collators for training and for evaluation."""
        collator = PairCollator(self.processing_class.pad_token_id)
        return collator, collator

    def model_identity(self) -> dict[str, Any]:
        """The model's name; a reward model has no reference."""
        name = language_model(self._bare_model).config.name_or_path
        return {"kind": "reward model", "model": name, "reference": None}

    def example_losses(
        self, model: nn.Module, inputs: dict[str, Tensor], processes: int, weight: int | Tensor
    ) -> ExampleLosses:
        """The Bradley–Terry loss of each pair of a batch."""
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        scores = model(**rows, use_cache=False).logits[:, 0]
        chosen, rejected = scores.float().chunk(2)
        losses = bradley_terry_loss(chosen, rejected)
        total = losses.sum() * processes / weight
        metrics = {"loss": (losses.detach(), torch.ones_like(losses))}
        metrics |= reward_metrics(chosen.detach(), rejected.detach())
        return ExampleLosses(total, losses.detach(), ExampleMetrics(metrics))
