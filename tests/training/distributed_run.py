"""Trains the tiny model, once per run asked for; test_distributed.py imports it and launches it.

Arguments: a folder and names of `RUNS`. Each run goes into the subfolder of its name, except that
those that go on from a checkpoint are given a copy of the run it is of.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.models.device import default_device
from tokenratio.training.callbacks import EpochSetter
from tokenratio.training.forward import Forward

PAIRS_PER_STEP = 4  # over all processes
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
HEAD = {**LORA, "modules_to_save": ["lm_head"]}
# Not settings of a run, but how it is set up.
_ASIDE = ("wrapper", "peft", "model", "goes_on", "rows", "keeps_start", "is_broken", "asks")
# What differs between the runs. "resume" and "epoch" go on from within the second epoch.
RUNS = {
    "whole": {"loss": "tbpo_a", "save_strategy": "steps"},
    "baseline": {"loss": "tbpo_q"},
    "resume": {"loss": "tbpo_a", "goes_on": "whole"},
    "epoch": {"loss": "tbpo_a", "goes_on": "whole"},  # without telling the sampler its epoch
    # On a machine without a GPU nothing else need be set.
    "bf16": {"loss": "tbpo_a", "bf16": True, "use_cpu": default_device().type != "cpu"},
    "sync": {"loss": "tbpo_a"},  # without the wrapper that averages gradients
}
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01}  # which has a state to save
SHARDED = {"wrapper": "fsdp2", "save_strategy": "steps"}
RUNS |= {
    "fsdp2": {**RUNS["whole"], **SHARDED},
    "fsdp2_adam": {"loss": "tbpo_a", **SHARDED, **ADAM},
    "fsdp2_resume": {"loss": "tbpo_a", **SHARDED, **ADAM, "goes_on": "fsdp2_adam"},
    "fsdp2_baseline": {"loss": "tbpo_q", **SHARDED, "state_dict_type": "SHARDED_STATE_DICT"},
    "fsdp2_bf16": {"loss": "tbpo_a", "wrapper": "fsdp2", "bf16": True},
    "fsdp2_broken": {"loss": "tbpo_a", "wrapper": "fsdp2", "is_broken": True},
}


class PastTheWrapper(Forward):
    """What a trainer does that calls the backbone past the wrapper: no hook, no reduction."""

    def __call__(self, model, *rest):
        return super().__call__(getattr(model, "module", model), *rest)


def break_gradients(trainer, patch):
    """Have the losses finite and the gradients not, on the second process only."""
    compute = trainer.compute_loss

    def broken(*args, **kwargs):
        loss = compute(*args, **kwargs)
        if trainer.args.process_index == 1:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    patch.setattr(trainer, "compute_loss", broken)


def wrapping(wrapper, patch, state_dict_type):
    """The settings for a wrapper; accelerate is made to use on a CPU what it keeps for GPUs."""
    if wrapper == "ddp":
        return {"use_cpu": True}
    patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    kind = ("gloo", DistributedType.MULTI_GPU)
    patch.setattr(PartialState, "_prepare_backend", lambda *_, **__: kind)
    patch.setattr("tokenratio.training.arguments.default_device", lambda: torch.device("meta"))
    patch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    if wrapper == "fsdp2":
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": state_dict_type}
        return {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2, **wrap}}
    zero = {"stage": int(wrapper[-1]), "stage3_gather_16bit_weights_on_model_save": True}
    zero |= {"stage3_param_persistence_threshold": 0}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config |= {"zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": "auto"}}
    return {"use_cpu": False, "deepspeed": {**config, **dict.fromkeys(auto, "auto")}}


def run(name: str, root: Path, processes: int = 1, **changes: object) -> None:
    """Train, evaluate and save.

    Args:
        changes: settings other than those of `RUNS`.
    """
    with pytest.MonkeyPatch.context() as patch:
        _run(name, root, processes, {**RUNS.get(name, {}), **changes}, patch)


def _run(name, root, processes, settings, patch):
    folder, aside = root / name, {key: settings.pop(key, None) for key in _ASIDE}
    kind = settings.pop("state_dict_type", "FULL_STATE_DICT")
    args = TokenRatioConfig(
        output_dir=str(folder),
        disable_tqdm=True,
        save_steps=7,
        max_length=32,
        warmup_steps=0,
        gradient_accumulation_steps=2,
        baseline_hidden_size=16,
        **{
            "save_strategy": "no",
            "max_steps": 10,
            "optim": "sgd",
            "learning_rate": 0.1,
            "per_device_train_batch_size": PAIRS_PER_STEP // processes,
            **wrapping(aside["wrapper"] or "ddp", patch, kind),
            **settings,
        },
    )
    trainer = TokenRatioTrainer(
        tiny_model(aside["model"] or "llama"),
        args=args,
        train_dataset=word_pairs(aside["rows"] or 40),
        eval_dataset=word_pairs(7, seed=1),
        processing_class=tiny_tokenizer(),
        peft_config=aside["peft"],
    )
    first = trainer.is_world_process_zero()
    if aside["goes_on"] and first:
        shutil.copytree(root / aside["goes_on"], folder, dirs_exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    if name == "sync":
        patch.setattr(trainer.forward, "__class__", PastTheWrapper)
    if name == "epoch":
        patch.setattr(EpochSetter, "on_epoch_begin", lambda *_, **__: None)
    if aside["is_broken"]:
        break_gradients(trainer, patch)
    if aside["asks"]:
        trainer.evaluate()
    if aside["keeps_start"]:
        trainer.save_model(str(folder / "start"))
    try:
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-7" if aside["goes_on"] else None)
    except TokenRatioError as error:
        (folder / f"error_{trainer.args.process_index}.txt").write_text(str(error))
        if not aside["is_broken"]:
            raise
        return
    metrics = trainer.evaluate()
    trainer.save_model()
    if first:
        (folder / "eval.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()


def main(folder: str, *names: str) -> None:
    """Run each of `RUNS` named, or with a JSON object of settings after its name, `name={…}`."""
    torch.set_num_threads(1)
    for each in names:
        name, _, changes = each.partition("=")
        run(name, Path(folder), int(os.environ["WORLD_SIZE"]), **json.loads(changes or "{}"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads that gloo leaves behind can abort an interpreter that shuts down
