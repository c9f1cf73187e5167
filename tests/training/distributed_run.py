"""Trains the tiny model; started by `accelerate launch` from test_distributed.py.

Arguments: output folder, loss, pairs per process and batch, and "" or a variation: "sync" breaks
the trainer, "save" keeps a checkpoint within the second epoch, "resume" goes on from it, "epoch"
does so without telling the sampler its epoch.
"""

import json
import os
import sys
from pathlib import Path

import torch

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.training.callbacks import TellEpoch
from tokenratio.training.forward import Forward


def main(folder: str, loss: str, batch: str, fault: str) -> None:
    torch.set_num_threads(1)
    args = TokenRatioConfig(
        output_dir=folder,
        loss=loss,
        use_cpu=True,
        disable_tqdm=True,
        max_steps=10,
        save_strategy="steps" if fault == "save" else "no",
        save_steps=7,
        max_length=32,
        optim="sgd",
        learning_rate=0.1,
        warmup_steps=0,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=2,
        baseline_hidden_size=16,
    )
    trainer = TokenRatioTrainer(
        tiny_model(),
        args=args,
        train_dataset=word_pairs(40),
        eval_dataset=word_pairs(7, seed=1),
        processing_class=tiny_tokenizer(),
    )
    if fault == "sync":
        # What a trainer does that calls the backbone past the wrapper: no hook, no reduction.
        class PastTheWrapper(Forward):
            def __call__(self, model, *rest):
                return super().__call__(getattr(model, "module", model), *rest)

        trainer.forward.__class__ = PastTheWrapper
    if fault == "epoch":
        TellEpoch.on_epoch_begin = lambda *_, **__: None
    resumed = fault in ("resume", "epoch")
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-7" if resumed else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(folder, "eval.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads that gloo leaves behind can abort an interpreter that shuts down
