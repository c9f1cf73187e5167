"""What can be set for a run: transformers' `TrainingArguments` and the method's own fields."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments

from tokenratio.errors import TokenRatioError
from tokenratio.settings import option
from tokenratio.training.arguments import resolve_arguments
from tokenratio.training.constructors import explain_settings
from tokenratio.training.data_settings import DataSettings
from tokenratio.training.method_settings import MethodSettings, require


@explain_settings
@dataclass
class TokenRatioConfig(MethodSettings, DataSettings, TrainingArguments):
    """Settings of `TokenRatioTrainer`; the defaults are the published ones (docs/method.md §7).

    Every field of `transformers.TrainingArguments` is here too. Where its default differs, the
    paper's takes its place: one epoch, RMSprop, learning rate 5e-7, cosine schedule, warm-up 0.05,
    gradient norm clipped at 10, 2 accumulation steps of 8 pairs. Metrics are logged at every step.

    Raises:
        TokenRatioError: a value outside its domain, or a combination that is not supported.
    """

    num_train_epochs: float = option(1.0, "Passes over the training pairs.")
    learning_rate: float = option(5e-7, "Learning rate of the policy.")
    optim: str = option("rmsprop", "Optimizer of the policy.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    warmup_steps: float = option(0.05, "Warm-up: steps, or a share of all steps if below 1.")
    max_grad_norm: float = option(10.0, "Gradient norm at which it is clipped.")
    gradient_accumulation_steps: int = option(2, "Batches per optimizer step.")
    logging_steps: float = option(1, "Steps between two logged lines.")
    logging_nan_inf_filter: bool = option(False, "Hide non-finite losses; off, they stop the run.")
    remove_unused_columns: bool = option(
        False, "Must stay off: pairs are not arguments of forward."
    )
    train_sampling_strategy: str = option(
        "auto",
        "Order of the rows: group_by_length (a batch's are alike), random, sequential; "
        "auto is the first for pairs and the second for sft, whose mean over a batch's tokens "
        "would weigh the tokens of short rows more.",
        choices=("auto", "group_by_length", "random", "sequential"),
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "DDP: search for parameters that got no gradient."
    )

    baseline_hidden_size: int = option(
        1024, "Width of tbpo_q's state baseline (docs/method.md §4)."
    )
    baseline_learning_rate: float = option(1e-3, "Learning rate of the state baseline's own AdamW.")
    center_baseline: bool = option(
        False, "Centre log w per pair, as the released code does; biased (docs/method.md §10)."
    )
    baseline_clamp: float = option(10.0, "Bound on |log w| of tbpo_q, after centring.")
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
    share_prompt: str = option(
        "auto",
        "Compute a pair's prompt once for both responses, in losses local to their "
        "step: auto (where it pays and the model can), always, never.",
        choices=("auto", "always", "never"),
    )
    cache_reference: bool = option(
        False,
        "Run the reference once and keep on disk what the loss needs of it: its "
        "log-probabilities, or for tbpo_a its hidden states (large; the size is printed first).",
    )
    reference_cache_dir: str = option(
        "~/.cache/tokenratio/reference", "Where they are kept, by the content of model and data."
    )
    check_reference: bool = option(
        True,
        "Stop if policy and reference differ before the first update. Turn off only "
        "when the reference is meant to be another model.",
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        *("model_init_kwargs", "chat_template_kwargs", "columns"),
    ]

    def __post_init__(self) -> None:
        self.resolve_method()
        self.check_data_settings()
        for name in ("baseline_learning_rate", "baseline_clamp"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "positive and finite")
        require(
            self.baseline_hidden_size >= 1,
            "baseline_hidden_size",
            self.baseline_hidden_size,
            "at least 1",
        )
        require(
            self.max_length is None
            or self.max_prompt_length is None
            or self.max_prompt_length < self.max_length,
            "max_prompt_length",
            self.max_prompt_length,
            f"less than max_length ({self.max_length}), to leave room for a response",
        )
        require(
            self.share_prompt != "always" or self.compares_steps,
            "share_prompt",
            self.share_prompt,
            f"auto or never: {self.loss}{' with sft_weight' * bool(self.sft_weight)} needs whole "
            "responses",
        )
        require(
            not self.cache_reference or self.method.has_reference,
            "cache_reference",
            True,
            f"false: {self.loss} has no reference",
        )
        require(
            not self.cache_reference or self.keeps_log_probs or self.compares_steps,
            "cache_reference",
            True,
            f"false: {self.loss} needs the reference's whole distribution at every token, which is "
            "kept for losses local to their step only",
        )
        resolve_arguments(
            self,
            super().__post_init__,
            only={"use_liger_kernel": ((False,), "it replaces the model's forward pass")},
        )
        require(
            not self.center_baseline or self.aggregation != "sequence",
            "center_baseline",
            True,
            "false with aggregation sequence: centred weights add up to nothing",
        )
        if self.fp16 and "baseline" in self.method.needs:
            raise TokenRatioError(
                f"fp16 is not supported with {self.loss}: its state baseline has an optimizer of "
                "its own, outside the gradient scaler; use bf16"
            )

    @property
    def compares_steps(self) -> bool:
        """Whether batches hold no more than the steps both responses have (docs/method.md §5)."""
        return self.method.is_local and not self.sft_weight

    @property
    def groups_by_length(self) -> bool:
        """Whether rows of like length share a batch."""
        if self.train_sampling_strategy == "auto":
            return self.loss != "sft"
        return self.train_sampling_strategy == "group_by_length"

    @property
    def keeps_log_probs(self) -> bool:
        """Whether log-probabilities are all the run keeps of its reference."""
        return self.cache_reference and "kl_ref_policy" not in self.method.needs
