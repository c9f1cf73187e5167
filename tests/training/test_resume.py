"""A run cut off after any step and resumed ends as if nothing had happened, bit for bit."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.training.run_folder import last_checkpoint, resolve_checkpoint

STEPS = 6  # of 14 pairs in steps of 2 × 2: the second epoch begins in between, its end is ragged
TIMING = {"tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


class Cut(TrainerCallback):
    """Ends the process, as far as the trainer can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_in(folder, loss, *, cut=None, logging_steps=1):
    args = TokenRatioConfig(
        output_dir=str(folder),
        loss=loss,
        use_cpu=True,
        disable_tqdm=True,
        max_steps=STEPS,
        save_steps=1,
        logging_steps=logging_steps,
        eval_strategy="steps",
        eval_steps=3,
        max_length=32,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        baseline_hidden_size=16,
    )
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


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q"])
def test_resumed_run_is_bit_identical(loss, tmp_path):
    trainer_in(tmp_path / "whole", loss).train()
    whole = state_of(tmp_path / "whole")
    assert len(whole["metrics"]) == STEPS + 2
    if loss == "tbpo_q":
        assert {"state_baseline.safetensors", "state_baseline_optimizer.safetensors"} <= set(whole)
    for step in range(1, STEPS):
        folder = tmp_path / f"cut-{step}"
        with pytest.raises(KeyboardInterrupt):
            trainer_in(folder, loss, cut=step).train()
        assert last_checkpoint(folder).name == f"checkpoint-{step}"
        trainer_in(folder, loss).train(resume_from_checkpoint=True)
        assert_identical(whole, state_of(folder))


def test_metrics_of_an_unfinished_interval_are_not_lost(tmp_path):
    """Logged every 4 steps, cut after 3: the line of step 4 covers steps 1 to 4."""
    trainer_in(tmp_path / "whole", "tbpo_q", logging_steps=4).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path / "cut", "tbpo_q", logging_steps=4, cut=3).train()
    trainer_in(tmp_path / "cut", "tbpo_q", logging_steps=4).train(resume_from_checkpoint=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


def test_lines_past_the_checkpoint_are_redone_not_doubled(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, "tbpo_a", cut=4).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the line the interruption cut off
    trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=True)
    steps = [line["step"] for line in state_of(tmp_path)["metrics"] if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


def test_half_written_checkpoint_is_passed_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, "tbpo_a", cut=3).train()
    cut_off = tmp_path / "checkpoint-4"
    cut_off.mkdir()
    (cut_off / "trainer_state.json").write_text('{"global_step": 4, "log_hi')
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    with pytest.raises(TokenRatioError, match="not a complete checkpoint"):
        resolve_checkpoint(cut_off, tmp_path)
    trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=True)


def test_resumed_adapter_is_bit_identical(tmp_path):
    """Also when the process drew other random numbers before: the seed alone fixes the adapter."""

    def adapted(folder, *, cut=None, noise=0):
        args, model = trainer_in(folder, "tbpo_a").args, tiny_model()
        torch.manual_seed(noise)
        return TokenRatioTrainer(
            model,
            args=args,
            train_dataset=word_pairs(14),
            eval_dataset=word_pairs(4, seed=1),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            callbacks=[] if cut is None else [Cut(cut)],
        )

    adapted(tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        adapted(tmp_path / "cut", cut=3, noise=5).train()
    adapted(tmp_path / "cut", noise=9).train(resume_from_checkpoint=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


def test_resuming_from_another_start_is_refused(tmp_path):
    """The policy of the checkpoint as `model` would make it its own reference."""
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, "tbpo_a", cut=3).train()
    other = TokenRatioTrainer(
        str(tmp_path / "checkpoint-3"),
        args=trainer_in(tmp_path, "tbpo_a").args,
        train_dataset=word_pairs(14),
        eval_dataset=word_pairs(4, seed=1),
    )
    with pytest.raises(TokenRatioError, match="reference is not the one"):
        other.train(resume_from_checkpoint=True)
    other = TokenRatioTrainer(
        tiny_model(),
        args=trainer_in(tmp_path, "tbpo_a").args,
        train_dataset=word_pairs(13),
        eval_dataset=word_pairs(4, seed=1),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(TokenRatioError, match="training data"):
        other.train(resume_from_checkpoint=True)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(TokenRatioError, match="no complete checkpoint"):
        trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=True)
    with pytest.raises(TokenRatioError, match="no checkpoint folder"):
        trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=tmp_path / "nowhere")


def test_checkpoint_of_another_method_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, "tbpo_a", cut=2).train()
    with pytest.raises(TokenRatioError, match="began with loss tbpo_a, not tbpo_q"):
        trainer_in(tmp_path, "tbpo_q").train(resume_from_checkpoint=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(TokenRatioError, match=r"holds no state_baseline\.safetensors"):
        trainer_in(tmp_path, "tbpo_q").train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(TokenRatioError, match="without its optimizer"):
        trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=tmp_path / "checkpoint-2")
