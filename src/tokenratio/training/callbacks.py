"""Callbacks: metrics file, gradient check, the baseline's optimizer, the sampler's epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerState, TrainingArguments

from tokenratio.data import LengthGroupedSampler
from tokenratio.records import as_shape, parse_json
from tokenratio.run_folder import METRICS_FILE, replace_bytes


class StepGuard(TrainerCallback):
    """Calls `check` on the gradients before each update."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_pre_optimizer_step(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if not args.fp16:  # the gradient scaler skips such a step
            self.check()


class BaselineStep(TrainerCallback):
    """Steps the state baseline's optimizer whenever the policy's has stepped.

    The head is outside the policy's wrapper, so its gradients are averaged over processes here,
    once a step, whatever the wrapper is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = reduce(parameter.grad, "mean")
        self.optimizer.step()
        self.optimizer.zero_grad()


class EpochSetter(TrainerCallback):
    """Sets the sampler's epoch, which decides the order of the rows.

    accelerate does so too, except when a resumed run skips batches on several processes.
    """

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class MetricsWriter(TrainerCallback):
    """Appends every logged line to `metrics.jsonl`; a resumed run first drops what it will redo.

    That is what came after the checkpoint: later steps, and the evaluation after the last one.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        num_logged = sum("train_runtime" not in logs for logs in state.log_history)
        replace_bytes(path, b"".join(line + b"\n" for line in kept[:num_logged]))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        # The closing summary is about this process, not about a step.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class _Line(TypedDict):
    step: float


def _step_of(line: bytes) -> float:
    try:
        return as_shape(_Line, parse_json(line), METRICS_FILE)["step"]
    except ValueError:
        return float("inf")  # a line cut off by the interruption
