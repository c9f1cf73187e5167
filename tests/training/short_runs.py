"""Runs of a few steps on a tiny model, and everything that they end with."""

import json

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer

STEPS = 6  # of 14 pairs in steps of 2 × 2: the second epoch begins in between, its end is ragged
TIMING = {"tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


class Cut(TrainerCallback):
    """Ends the process, as far as the trainer can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_in(folder, loss, *, cut=None, **settings):
    defaults = {
        "output_dir": str(folder),
        "loss": loss,
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": STEPS,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "max_length": 32,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "baseline_hidden_size": 16,
    }
    args = TokenRatioConfig(**{**defaults, **settings})
    return TokenRatioTrainer(
        tiny_model(),
        args=args,
        train_dataset=word_pairs(14),
        eval_dataset=word_pairs(4, seed=1),
        processing_class=tiny_tokenizer(),
        callbacks=[] if cut is None else [Cut(cut)],
    )


def state_of(folder):
    """Everything a run ends with: weights, head, both optimizers, schedule, metrics."""
    last = folder / f"checkpoint-{STEPS}"
    state = {name: load_file(last / name) for name in sorted(p.name for p in last.glob("*.saf*"))}
    for name in ("optimizer.pt", "scheduler.pt"):
        state[name] = torch.load(last / name, weights_only=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    state["metrics"] = [
        {k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines
    ]
    return state


def assert_identical(one, other, path="state"):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_identical(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{path}[{index}]")
    else:
        assert one == other, path
