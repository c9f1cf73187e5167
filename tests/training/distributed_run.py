"""Trains the tiny model, once per run asked for; test_distributed.py imports it and launches it.

Arguments: a folder and names of `RUNS`. Each run goes into the subfolder of its name, except that
the two that go on from a checkpoint of "whole" are given a copy of that run.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.models.device import default_device
from tokenratio.training.callbacks import EpochSetter
from tokenratio.training.forward import Forward

PAIRS_PER_STEP = 4  # over all processes
# What differs between the runs. "resume" and "epoch" go on from within the second epoch.
RUNS = {
    "whole": {"loss": "tbpo_a", "save_strategy": "steps"},
    "baseline": {"loss": "tbpo_q"},
    "resume": {"loss": "tbpo_a"},
    "epoch": {"loss": "tbpo_a"},  # without telling the sampler its epoch
    # On a machine without a GPU nothing else need be set.
    "bf16": {"loss": "tbpo_a", "bf16": True, "use_cpu": default_device().type != "cpu"},
    "sync": {"loss": "tbpo_a"},  # without the wrapper that averages gradients
}


class PastTheWrapper(Forward):
    """What a trainer does that calls the backbone past the wrapper: no hook, no reduction."""

    def __call__(self, model, *rest):
        return super().__call__(getattr(model, "module", model), *rest)


def run(name: str, root: Path, processes: int = 1) -> None:
    folder = root / name
    args = TokenRatioConfig(
        output_dir=str(folder),
        disable_tqdm=True,
        max_steps=10,
        save_steps=7,
        max_length=32,
        optim="sgd",
        learning_rate=0.1,
        warmup_steps=0,
        per_device_train_batch_size=PAIRS_PER_STEP // processes,
        gradient_accumulation_steps=2,
        baseline_hidden_size=16,
        **{"save_strategy": "no", "use_cpu": True, **RUNS[name]},
    )
    trainer = TokenRatioTrainer(
        tiny_model(),
        args=args,
        train_dataset=word_pairs(40),
        eval_dataset=word_pairs(7, seed=1),
        processing_class=tiny_tokenizer(),
    )
    first = trainer.is_world_process_zero()
    resumed = name in ("resume", "epoch")
    if resumed and first:
        shutil.copytree(root / "whole", folder, dirs_exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    with pytest.MonkeyPatch.context() as patch:
        if name == "sync":
            patch.setattr(trainer.forward, "__class__", PastTheWrapper)
        if name == "epoch":
            patch.setattr(EpochSetter, "on_epoch_begin", lambda *_, **__: None)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-7" if resumed else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    if first:
        (folder / "eval.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    for name in names:
        run(name, Path(folder), int(os.environ["WORLD_SIZE"]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads that gloo leaves behind can abort an interpreter that shuts down
