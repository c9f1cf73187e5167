"""The trainers that `train.py` runs: ours and TRL's, on the same rows in the same order."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer

from peers import BETA, completions_only
from tokenratio import TokenRatioConfig, TokenRatioTrainer

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """What every case trains: rows of text in this order, a batch at a time.

    Attributes:
        model: its name or folder.
        weights: dtype in which the base is loaded; the adapter's weights are float32.
        pairs: in a batch.
        output: a folder for whatever a trainer writes.
        device: cpu or cuda.
    """

    model: str
    weights: str
    rows: Rows
    pairs: int
    output: str
    device: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings of transformers' `TrainingArguments`, the same in every case."""
        return {
            "output_dir": self.output,
            "bf16": True,
            "use_cpu": self.device == "cpu",
            "per_device_train_batch_size": self.pairs,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "train_sampling_strategy": "sequential",
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "model_init_kwargs": {"dtype": self.weights},
            "beta": BETA,
        }


def adapter() -> LoraConfig:
    return LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Case:
    """A trainer.

    Attributes:
        label: as tables name it.
        make: builds it as a user would, from the names of model and method.
        around: what surrounds its training.
        is_dpo: its loss is DPO's, so the first losses and log-probabilities must agree.
    """

    label: str
    make: Callable[[Task], Trainer]
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    is_dpo: bool = False


def ours(loss: str, **settings: Any) -> Callable[[Task], Trainer]:
    """`TokenRatioTrainer` with this loss; what is not in the task is the library's default."""

    def make(task: Task) -> Trainer:
        args = TokenRatioConfig(
            loss=loss,
            data_cache_dir=None,
            reference_cache_dir=f"{task.output}/reference",
            **task.arguments,
            **settings,
        )
        return TokenRatioTrainer(
            task.model, args=args, train_dataset=task.rows, peft_config=adapter()
        )

    return make


def trl(task: Task) -> Trainer:
    """TRL's `DPOTrainer`; what is not in the task is its default."""
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=task.model,
        args=DPOConfig(**task.arguments),
        train_dataset=Dataset.from_list(task.rows),
        peft_config=adapter(),
    )


CASES = {
    "tbpo_a": Case("TBPO-A", ours("tbpo_a")),
    "trl_dpo_completions": Case(
        "TRL DPO restricted to completion tokens", trl, completions_only, is_dpo=True
    ),
    "trl_dpo": Case("TRL DPO as installed", trl, is_dpo=True),
    "tbpo_q": Case("TBPO-Q", ours("tbpo_q")),
    "dpo": Case("our DPO", ours("dpo"), is_dpo=True),
    "tbpo_a_cached": Case(
        "TBPO-A, reference states from the cache", ours("tbpo_a", cache_reference=True)
    ),
}
