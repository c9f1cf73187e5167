"""Settings of a policy's training."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenratio.errors import TokenRatioError
from tokenratio.settings import option
from tokenratio.training.cache_entry import ReferenceCache
from tokenratio.training.constructors import explain_settings
from tokenratio.training.method_settings import MethodSettings, require
from tokenratio.training.metrics import ExampleLosses
from tokenratio.training.pair_config import Objective, PairConfig

if TYPE_CHECKING:
    from tokenratio.training.forward import Forward


class PolicyObjective(Objective):
    """The objective of a policy's training."""

    def collators(
        self, pad_token_id: int, models: list[Any], cache: ReferenceCache | None = None
    ) -> tuple[Any, Any]:
        """The collators for training and for evaluation, which covers whole responses.

        Args:
            models: those that will run the batches.
            cache: the reference's hidden states of the training rows, if they are on disk.
        """
        raise NotImplementedError

    def losses(
        self, forward: "Forward", model: nn.Module, inputs: dict[str, Tensor], share: float | Tensor
    ) -> ExampleLosses:
        """The losses of a batch.

        Args:
            share: the weight of a pair (for SFT, of a token) in the step's loss.
        """
        raise NotImplementedError


@explain_settings
@dataclass
class TokenRatioConfig(MethodSettings, PairConfig):
    """Settings of `TokenRatioTrainer`; the defaults are the published ones (docs/method.md §7).

    Every field of `transformers.TrainingArguments` is a field here. These defaults are the
    paper's: one epoch, RMSprop, learning rate 5e-7, cosine schedule, warm-up 0.05,
    gradient norm clipped at 10, 2 accumulation steps of 8 pairs. Metrics are logged at every step.

    Raises:
        TokenRatioError: a value outside its domain, or a combination that is not supported.
    """

    learning_rate: float = option(5e-7, "Learning rate of the policy.")
    optim: str = option("rmsprop", "Optimizer of the policy.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    warmup_steps: float = option(0.05, "Warm-up steps, or their share of all steps if below 1.")
    max_grad_norm: float = option(10.0, "Gradient norm to clip at.")
    gradient_accumulation_steps: int = option(2, "Batches per optimizer step.")
    train_sampling_strategy: str = option(
        "auto",
        "Order of the rows: group_by_length (similar lengths share a batch), random, sequential; "
        "auto is group_by_length for pairs and random for sft, where batches of short rows would "
        "give their tokens more weight.",
        choices=("auto", "group_by_length", "random", "sequential"),
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "DDP: search for parameters without a gradient."
    )

    baseline_hidden_size: int = option(
        1024, "Width of tbpo_q's state baseline (docs/method.md §4)."
    )
    baseline_learning_rate: float = option(1e-3, "Learning rate of the state baseline's own AdamW.")
    center_baseline: bool = option(
        False,
        "Centre log w per pair, as the released code does; this biases the solution "
        "(docs/method.md §10).",
    )
    baseline_clamp: float = option(10.0, "Bound on |log w| of tbpo_q, after centring.")
    share_prompt: str = option(
        "auto",
        "Compute a pair's prompt once for both responses, in losses that look at one step at a "
        "time: auto (where it is faster and the model supports it), always, never.",
        choices=("auto", "always", "never"),
    )
    cache_reference: bool = option(
        False,
        "Run the reference once and cache on disk what the loss needs from it: its "
        "log-probabilities, or for tbpo_a its hidden states (large; the size is printed first).",
    )
    reference_cache_dir: str = option(
        "~/.cache/tokenratio/reference",
        "Folder of cache_reference; entries are keyed by the content of model and data.",
    )
    check_reference: bool = option(
        True,
        "Stop if policy and reference differ before the first update. Set it to false only if the "
        "reference is meant to be a different model.",
    )

    # Not the one of MethodSettings, which comes first.
    __repr__ = PairConfig.__repr__

    def __post_init__(self) -> None:
        self.resolve_method()
        for name in ("baseline_learning_rate", "baseline_clamp"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "positive and finite")
        width = self.baseline_hidden_size
        require(width >= 1, "baseline_hidden_size", width, "at least 1")
        self._check_combinations()
        super().__post_init__()
        if self.fp16 and self.method.needs_baseline:
            raise TokenRatioError(
                f"fp16 is not supported with {self.loss}: its state baseline has an optimizer of "
                "its own, outside the gradient scaler; use bf16"
            )

    def _check_combinations(self) -> None:
        """Refuse settings that the method or other settings exclude."""
        whole = f"{self.loss}{' with sft_weight' if self.sft_weight else ''} needs whole responses"
        not_cached = self._why_not_cached()
        centred = "with aggregation sequence, centred weights sum to zero"
        for name, is_refused, why in (
            ("share_prompt", self.share_prompt == "always" and not self.compares_steps, whole),
            ("cache_reference", self.cache_reference and not_cached is not None, not_cached),
            ("center_baseline", self.center_baseline and self.aggregation == "sequence", centred),
            ("use_liger_kernel", self.use_liger_kernel, "it replaces the model's forward pass"),
        ):
            allowed = "auto or never" if name == "share_prompt" else "false"
            require(not is_refused, name, getattr(self, name), f"{allowed}: {why}")

    def _why_not_cached(self) -> str | None:
        """Why what the loss needs of the reference cannot be kept on disk; None if it can."""
        if not self.method.has_reference:
            return f"{self.loss} has no reference"
        if self.keeps_log_probs or self.compares_steps:
            return None
        return (
            f"{self.loss} needs the reference's whole distribution at every token, which is "
            "kept for losses local to their step only"
        )

    @property
    def objective(self) -> PolicyObjective:
        """The objective: of preference pairs, or for `sft` of completions."""
        from tokenratio.training.preference import PreferenceObjective
        from tokenratio.training.sft import SftObjective

        return SftObjective() if self.loss == "sft" else PreferenceObjective(self)

    @property
    def compares_steps(self) -> bool:
        """Whether batches hold only the steps both responses have (docs/method.md §5)."""
        return self.method.is_local and not self.sft_weight

    @property
    def keeps_log_probs(self) -> bool:
        """Whether log-probabilities are all the run keeps of its reference."""
        return self.cache_reference and not self.method.needs_kl
