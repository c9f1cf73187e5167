"""Settings shared by every trainer, and the interface of an objective."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from tokenratio.data import PreparedData, Selection, prepare_pairs
from tokenratio.errors import TokenRatioError
from tokenratio.masking import mask_secrets
from tokenratio.models.template_options import TemplateOptions, as_mapping
from tokenratio.names import require_at_least
from tokenratio.settings import option
from tokenratio.training.arguments import resolve_arguments

Role: TypeAlias = Literal["train", "eval", "held_out"]


@dataclass
class DataSettings(TemplateOptions):
    """Which rows a run trains on and evaluates, and how long they may be."""

    max_length: int | None = option(
        2048, "Maximum tokens of prompt and response; responses are cut on the right."
    )
    max_prompt_length: int | None = option(
        None, "Maximum tokens of the prompt, which is cut on the left."
    )
    on_bad_row: str = option(
        "skip",
        "What to do with unusable rows: skip (and count them) or error.",
        choices=("skip", "error"),
    )

    train_split: str | None = option(
        None, "Split of training sources that do not name one. Default: train."
    )
    eval_split: str | None = option(
        None, "Split of evaluation sources that do not name one. Default: test, or validation."
    )
    max_samples: int | None = option(
        None, "Train on at most this many rows, drawn with selection_seed."
    )
    max_eval_samples: int | None = option(
        None, "Evaluate on at most this many rows, drawn with selection_seed."
    )
    held_out_share: float | None = option(
        None,
        "Share of the training data's prompts (0 to 1) to evaluate on, instead of an eval_dataset. "
        "No stage trains on a held-out prompt.",
    )
    columns: dict[str, Any] | str | None = option(
        None,
        "Columns of the data by tokenratio's names, for data in another layout: {prompt: ask, "
        "chosen: good, rejected: bad}; null ignores a column (docs/data.md).",
    )
    selection_seed: int = option(
        0,
        "Seed of max_samples, held_out_share and the weights of sources; separate from "
        "seed, so that runs with different seeds use the same rows.",
    )

    data_cache_dir: str | None = option(
        "~/.cache/tokenratio/prepared",
        "Cache of prepared data, keyed by the content of data, tokenizer and settings; null "
        "disables it.",
    )
    dataset_num_proc: int = option(
        1,
        "Processes that render and tokenise the data. A fast tokenizer already uses all cores.",
    )

    def check_data_settings(self) -> None:
        """Raise `TokenRatioError` for a value outside its domain."""
        require_at_least(1, dataset_num_proc=self.dataset_num_proc)
        limit, prompt_limit = self.max_length, self.max_prompt_length
        if limit is not None and prompt_limit is not None and prompt_limit >= limit:
            raise TokenRatioError(
                f"max_prompt_length must be less than max_length ({limit}), to leave room for a "
                f"response, not {prompt_limit}"
            )
        self.columns = as_mapping("columns", self.columns, "{prompt: ask, chosen: good}")
        for role in ("train", "eval", "held_out"):
            self.selection(role)
        self.check_template_settings()

    def selection(self, role: Role) -> Selection:
        """Which rows a role uses."""
        return Selection(
            max_samples=self.max_samples if role == "train" else self.max_eval_samples,
            held_out_share=None if role == "eval" else self.held_out_share,
            part="held_out" if role == "held_out" else "train",
            seed=self.selection_seed,
        )

    def split(self, role: Role) -> str:
        """The split that a source of this role is read from if it names none."""
        return (self.eval_split or "test") if role == "eval" else (self.train_split or "train")

    def evaluated(self, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Role]:
        """The source to evaluate on, and its role; `held_out_share` allows no other source."""
        if self.held_out_share is None:
            return eval_dataset, "eval"
        if eval_dataset is not None:
            raise TokenRatioError(
                "held_out_share takes the evaluation rows from train_dataset: leave out "
                "eval_dataset, or held_out_share"
            )
        if isinstance(train_dataset, PreparedData):
            raise TokenRatioError(
                "held_out_share splits sources, not prepared rows: give train_dataset as a source"
            )
        return train_dataset, "held_out"

    def data_arguments(self, role: Role) -> dict[str, Any]:
        """The arguments of `prepare_pairs` and `prepare_completions`.

        Args:
            role: `train`; `eval`, a separate source; or `held_out`, the part of the training source
                that is held out.
        """
        names = ("max_length", "max_prompt_length", "on_bad_row")
        return {
            **{name: getattr(self, name) for name in names},
            "split": self.split(role),
            "selection": self.selection(role),
            "columns": self.columns,
            "template": self.template,
            "cache_dir": self.data_cache_dir,
            "num_proc": self.dataset_num_proc,
        }


class Objective:
    """The objective of a kind of training: of preference pairs, unless a subclass differs.

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
        """The weight of a batch in the mean over its step: its number of pairs."""
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

    resume_from_checkpoint: str | None = option(
        None,
        "Resume a run: a checkpoint's folder, or true for the newest complete checkpoint in "
        "output_dir, and for a new run where there is none.",
    )
    resume_with_changes: bool = option(
        False,
        "Resume with another learning rate, batch size, number of processes etc. The result then "
        "differs from that of an uninterrupted run; run.json records what changed.",
    )
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

    # transformers declares it without ClassVar, although it is not a field.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        *("model_init_kwargs", "chat_template_kwargs", "columns"),
    ]

    def __post_init__(self) -> None:
        self.check_data_settings()
        resolve_arguments(self, super().__post_init__)

    def to_dict(self) -> dict[str, Any]:
        """The settings as `run.json`, trackers and logs get them: secrets masked."""
        masked: dict[str, Any] = mask_secrets(super().to_dict())
        return masked

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({settings})"

    __repr__ = __str__

    # Pickles, such as the training_args.bin that transformers uploads, hold no secrets. Copies do.

    def __getstate__(self) -> dict[str, Any]:
        masked: dict[str, Any] = mask_secrets(vars(self))
        return masked

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    @property
    def init_kwargs(self) -> dict[str, Any] | None:
        """`model_init_kwargs`, with dtypes by name."""
        assert not isinstance(self.model_init_kwargs, str)
        return self.model_init_kwargs

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What mixed precision multiplies in; None without it."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def objective(self) -> Objective:
        """The run's objective."""
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


def encode_source(
    source: Any, tokenizer: PreTrainedTokenizerBase, args: PairConfig, *, role: Role
) -> PreparedData:
    """The rows of a source that a run with these settings uses; see `prepare_pairs`.

    One process of each machine prepares them; the others read them from the cache.
    """
    is_cached = args.data_cache_dir is not None
    first = args.main_process_first(desc="preparing the data") if is_cached else nullcontext()
    with first:
        return args.objective.encode(source, tokenizer, **args.data_arguments(role))


def is_several(source: Any) -> bool:
    """Whether an `eval_dataset` holds several sources by name."""
    return isinstance(source, dict) and not isinstance(source, DatasetDict) and "path" not in source
