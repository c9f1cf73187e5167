"""Settings shared by every trainer, and what a kind of training makes of its rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from tokenratio.data import PreparedData, prepare_pairs
from tokenratio.settings import option
from tokenratio.training.arguments import resolve_arguments
from tokenratio.training.data_settings import DataSettings


class Objective:
    """What a kind of training makes of its rows: preference pairs, unless a subclass differs.

    Attributes:
        rows_per_example: rows of text the model runs for each example.
        groups_by_length: whether `train_sampling_strategy: auto` groups rows by length.
        predicted: the metrics whose values `predict` returns for each row.
    """

    rows_per_example: ClassVar[int] = 2
    groups_by_length: ClassVar[bool] = True
    predicted: ClassVar[tuple[str, ...]] = ("rewards/chosen", "rewards/rejected")

    def encode(
        self, source: Any, tokenizer: PreTrainedTokenizerBase, **settings: Any
    ) -> PreparedData:
        """The rows of a source as token ids; see `prepare_pairs`."""
        return prepare_pairs(source, tokenizer, **settings)

    def weight(self, inputs: dict[str, Tensor]) -> int:
        """What a batch counts in the mean over its step: its pairs."""
        return len(inputs["row"])

    def metric_names(self) -> list[str]:
        """The metrics an evaluation reports, without `eval_`."""
        raise NotImplementedError


@dataclass
class PairConfig(DataSettings, TrainingArguments):
    """Settings of policies and of reward models: transformers' own, and those of the data.

    Raises:
        TokenRatioError: a value outside its domain, or one that these trainers do not support.
    """

    num_train_epochs: float = option(1.0, "Passes over the training data.")
    logging_steps: float = option(1, "Steps between two logged lines.")
    logging_nan_inf_filter: bool = option(
        False, "Hide non-finite losses in the log; when off, they stop the run."
    )
    remove_unused_columns: bool = option(
        False, "Must stay off: pairs are not arguments of forward."
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments of from_pretrained when the model is given by name."
    )

    if TYPE_CHECKING:  # narrower than transformers' own declarations: what __post_init__ leaves
        output_dir: str = ""
        eval_strategy: IntervalStrategy = IntervalStrategy.NO
        save_strategy: SaveStrategy = SaveStrategy.NO
        report_to: list[str] = []
        lr_scheduler_kwargs: dict[str, Any] | None = None

    # transformers declares it without ClassVar, although it is no field.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        *("model_init_kwargs", "chat_template_kwargs", "columns"),
    ]

    def __post_init__(self) -> None:
        self.check_data_settings()
        resolve_arguments(self, super().__post_init__)

    @property
    def init_kwargs(self) -> dict[str, Any] | None:
        """`model_init_kwargs` as they were read: dtypes by name, no text."""
        assert not isinstance(self.model_init_kwargs, str)
        return self.model_init_kwargs

    @property
    def objective(self) -> Objective:
        """What the run makes of its rows."""
        raise NotImplementedError

    @property
    def groups_by_length(self) -> bool:
        """Whether rows of similar length share a batch."""
        if self.train_sampling_strategy == "auto":
            return self.objective.groups_by_length
        return bool(self.train_sampling_strategy == "group_by_length")

    def evaluated_metrics(self) -> list[str]:
        """The metrics an evaluation of this run reports, without `eval_`."""
        return ["loss"] if self.prediction_loss_only else self.objective.metric_names()
