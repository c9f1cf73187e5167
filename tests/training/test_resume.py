"""A run cut off after any step and resumed ends as if nothing had happened, bit for bit."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import write_run_file
from tokenratio.training.checkpoints import MANIFEST_FILE, last_checkpoint, resolve_checkpoint
from tokenratio.training.run_record import MAY_DIFFER, check_same_run
from training.short_runs import STEPS, Cut, assert_identical, state_of, trainer_in


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q"])
def test_resumed_run_is_bit_identical(loss, tmp_path):
    trainer_in(tmp_path / "whole", loss).train()
    whole = state_of(tmp_path / "whole")
    assert len(whole["metrics"]) == STEPS + 2
    if loss == "tbpo_q":
        assert {"state_baseline.safetensors", "state_baseline_optimizer.safetensors"} <= set(whole)
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path / "cut", loss, cut=STEPS - 1).train()
    for step in range(1, STEPS):
        # As a run leaves it that is cut off at any time before its next checkpoint.
        folder = shutil.copytree(tmp_path / "cut", tmp_path / f"cut-{step}")
        for later in range(step + 1, STEPS):
            shutil.rmtree(folder / f"checkpoint-{later}")
        assert last_checkpoint(folder).name == f"checkpoint-{step}"
        trainer_in(folder, loss).train(resume_from_checkpoint=True)
        assert_identical(whole, state_of(folder))


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_nothing_to_resume_is_said(tmp_path, caplog):
    """A new run starts, unless the folder holds what such a run would write over."""
    trainer_in(tmp_path, "tbpo_a", max_steps=1).train(resume_from_checkpoint=True)
    assert f"no complete checkpoint in {tmp_path}: starting from the beginning" in caplog.text
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    trained = trainer_in(tmp_path / "done", "tbpo_a", max_steps=1, save_strategy="no")
    trained.train()
    trained.save_model()
    with pytest.raises(TokenRatioError, match="holds a trained model and no checkpoint"):
        trained.train(resume_from_checkpoint=True)
    with pytest.raises(TokenRatioError, match=r"checkpoint folder .* does not exist"):
        trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=tmp_path / "nowhere")


def test_checkpoint_of_another_method_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, "tbpo_a", cut=2).train()
    with pytest.raises(TokenRatioError, match="began with loss tbpo_a, not tbpo_q"):
        trainer_in(tmp_path, "tbpo_q").train(resume_from_checkpoint=True)
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        (folder / "run.json").unlink()
        (folder / MANIFEST_FILE).unlink(missing_ok=True)  # as transformers writes checkpoints
    with pytest.raises(TokenRatioError, match=r"holds a run\.json"):
        trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=True)


def begun(folder, **settings):
    """A run cut off after two of its steps."""
    with pytest.raises(KeyboardInterrupt):
        trainer_in(folder, "tbpo_a", cut=2, **settings).train()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Read only: copy before training on."""
    folder = tmp_path_factory.mktemp("interrupted")
    begun(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("per_device_train_batch_size", 4, "per_device_train_batch_size 2, not 4"),
        ("gradient_accumulation_steps", 1, "gradient_accumulation_steps 2, not 1"),
        ("seed", 7, "seed 42, not 7"),
        ("data_seed", 7, "data_seed unset, not 7"),
        ("dataloader_drop_last", True, "dataloader_drop_last false, not true"),
        ("train_sampling_strategy", "random", "train_sampling_strategy auto, not random"),
        ("optim", "adamw_torch", "optim rmsprop, not adamw_torch"),
        ("learning_rate", 1e-4, "learning_rate 0.001, not 0.0001"),
        ("lr_scheduler_type", "linear", "lr_scheduler_type cosine, not linear"),
        ("warmup_steps", 3, "warmup_steps 0.05, not 3"),
        ("max_grad_norm", 1.0, "max_grad_norm 10.0, not 1.0"),
        ("weight_decay", 0.1, "weight_decay 0.0, not 0.1"),
        ("adam_beta2", 0.95, "adam_beta2 0.999, not 0.95"),
        ("bf16", True, "bf16 false, not true"),
        ("max_steps", 4, "max_steps 6, not 4"),
        ("max_steps", -1, "max_steps 6, not -1"),
        ("beta", 0.2, "beta"),
        ("accelerator_config", {"split_batches": True}, "accelerator_config"),
        ("model_init_kwargs", {"dtype": "bfloat16"}, "model_init_kwargs"),
    ],
)
def test_a_setting_that_changes_the_run_is_refused_by_name(interrupted, name, value, said):
    trainer = trainer_in(interrupted, "tbpo_a", **{name: value})
    with pytest.raises(TokenRatioError, match=f"began with {said}") as refusal:
        trainer.train(resume_from_checkpoint=True)
    assert "set it back" in str(refusal.value)


LENGTH = ("num_train_epochs", "max_steps")
OF_THE_BEST = ("metric_for_best_model", "greater_is_better")


def test_every_setting_is_held_unless_it_is_listed(interrupted):
    """Also those that transformers adds."""
    identity = json.loads((interrupted / "run.json").read_text())
    assert set(identity["config"]) | {"logging_dir"} > MAY_DIFFER
    checkpoint = interrupted / "checkpoint-2"
    check_same_run(checkpoint, identity)
    for name in identity["config"]:
        changed = copy.deepcopy(identity)
        changed["config"][name] = {"other": 1} if name == "model_init_kwargs" else 12345
        if name in MAY_DIFFER or name in (*LENGTH, *OF_THE_BEST):
            check_same_run(checkpoint, changed)
        else:
            with pytest.raises(TokenRatioError, match=f"began with {name} "):
                check_same_run(checkpoint, changed)
    with pytest.raises(TokenRatioError, match="began with processes 1, not 2"):
        check_same_run(checkpoint, {**identity, "processes": 2})
    with pytest.raises(TokenRatioError, match="trained a policy, not a reward model"):
        check_same_run(checkpoint, {**identity, "kind": "reward model"})


def test_when_it_evaluates_is_held_where_the_learning_rate_follows_it(interrupted):
    identity = json.loads((interrupted / "run.json").read_text())
    other = copy.deepcopy(identity)
    other["config"]["eval_steps"] = 2
    check_same_run(interrupted / "checkpoint-2", other)
    for document in (identity, other):
        document["config"]["lr_scheduler_type"] = "reduce_lr_on_plateau"
    with pytest.raises(TokenRatioError, match="lr_scheduler_type cosine"):
        check_same_run(interrupted / "checkpoint-2", other)
    folder = interrupted.parent / "plateau"
    write_run_file(folder, **identity)
    with pytest.raises(TokenRatioError, match="eval_steps 3, not 2"):
        check_same_run(folder / "checkpoint-2", other)


def test_the_token_of_a_private_model_may_change(interrupted, tmp_path):
    identity = json.loads((interrupted / "run.json").read_text())
    identity["config"]["model_init_kwargs"] = {"token": "a", "dtype": "float32"}
    write_run_file(tmp_path, **identity)
    identity["config"]["model_init_kwargs"] = {"cache_dir": "b", "dtype": "float32"}
    check_same_run(tmp_path / "checkpoint-2", identity)


def test_what_is_logged_evaluated_and_saved_may_change(interrupted, tmp_path):
    """And counts: transformers would keep the intervals of the checkpoint."""
    trainer_in(tmp_path / "whole", "tbpo_a").train()
    shutil.copytree(interrupted, tmp_path / "run")
    settings = {"save_steps": 3, "eval_steps": 6, "logging_steps": 4}
    trainer_in(tmp_path / "run", "tbpo_a", **settings).train(resume_from_checkpoint=True)
    saved = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6"]
    weights = [
        load_file(tmp_path / name / f"checkpoint-{STEPS}/model.safetensors")
        for name in ("whole", "run")
    ]
    assert_identical(*weights)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4, 6]


def test_a_resumed_run_may_begin_to_keep_the_best(interrupted, tmp_path):
    trainer_in(tmp_path / "whole", "tbpo_a").train()
    shutil.copytree(interrupted, tmp_path / "run")
    settings = {"load_best_model_at_end": True, "save_steps": 3}
    trainer_in(tmp_path / "run", "tbpo_a", **settings).train(resume_from_checkpoint=True)
    weights = [
        load_file(tmp_path / name / f"checkpoint-{STEPS}/model.safetensors")
        for name in ("whole", "run")
    ]
    assert_identical(*weights)


@pytest.mark.parametrize(
    ("schedule", "was", "now"),
    [
        ("cosine", "loss", "rewards/accuracies"),
        ("cosine", "rewards/margins", None),
        ("reduce_lr_on_plateau", None, "rewards/accuracies"),
    ],
)
def test_what_is_best_is_held_once_it_is_looked_for(schedule, was, now, interrupted):
    """The best value so far would be compared with values of another metric."""
    identity = json.loads((interrupted / "run.json").read_text())
    identity["config"]["lr_scheduler_type"] = schedule
    began = copy.deepcopy(identity)
    began["config"]["metric_for_best_model"] = was
    identity["config"]["metric_for_best_model"] = now
    checkpoint = interrupted / "checkpoint-2"
    before = (checkpoint / "run.json").read_text()
    try:
        (checkpoint / "run.json").write_text(json.dumps(began))
        with pytest.raises(TokenRatioError, match="began with metric_for_best_model"):
            check_same_run(checkpoint, identity)
    finally:
        (checkpoint / "run.json").write_text(before)


@pytest.mark.parametrize("given", [{"dtype": "float32"}, {"torch_dtype": "float32"}, None])
def test_a_default_that_is_written_out_is_the_same(given, interrupted):
    identity = json.loads((interrupted / "run.json").read_text())
    identity["config"]["model_init_kwargs"] = given
    check_same_run(interrupted / "checkpoint-2", identity)


def test_a_checkpoint_outside_its_run_is_still_checked(interrupted, tmp_path):
    moved = shutil.copytree(interrupted / "checkpoint-2", tmp_path / "kept")
    with pytest.raises(TokenRatioError, match="began with seed 42, not 7"):
        trainer_in(tmp_path / "new", "tbpo_a", seed=7).train(resume_from_checkpoint=moved)
    assert not (tmp_path / "new" / "run.json").exists()
    trainer_in(tmp_path / "new", "tbpo_a").train(resume_from_checkpoint=moved)
    assert last_checkpoint(tmp_path / "new").name == f"checkpoint-{STEPS}"


def test_checkpoints_without_optimizer_are_passed_over_and_said(interrupted, tmp_path, caplog):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    newest = folder / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (newest / name).read_bytes()
        (newest / name).unlink()
        caplog.clear()
        assert resolve_checkpoint(True, folder).name == "checkpoint-1"
        assert "checkpoint-2 is skipped" in caplog.text
        with pytest.raises(TokenRatioError, match="cannot be resumed exactly"):
            resolve_checkpoint(newest, folder)
        (newest / name).write_bytes(content)
    assert resolve_checkpoint(True, folder) == newest


def test_a_run_of_weights_only_cannot_be_resumed(tmp_path):
    begun(tmp_path, save_only_model=True)
    with pytest.raises(TokenRatioError, match="save_only_model"):
        trainer_in(tmp_path, "tbpo_a").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("first", "then", "steps"),
    [
        ({"max_steps": 3}, {"max_steps": 5}, 5),
        ({"max_steps": -1, "num_train_epochs": 1}, {"max_steps": -1, "num_train_epochs": 2}, 8),
    ],
)
def test_a_longer_run_says_what_becomes_of_the_learning_rate(first, then, steps, tmp_path, caplog):
    trainer_in(tmp_path, "tbpo_a", **first).train()
    trainer = trainer_in(tmp_path, "tbpo_a", **then)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == steps
    assert f"now has {steps} steps instead of" in caplog.text
    assert "cosine schedule is stretched" in caplog.text


def test_a_longer_run_at_a_constant_rate_has_nothing_to_say(tmp_path, caplog):
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer_in(tmp_path, "tbpo_a", max_steps=2, **constant).train()
    trainer_in(tmp_path, "tbpo_a", max_steps=3, **constant).train(resume_from_checkpoint=True)
    assert "stretched" not in caplog.text


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_finished_run_is_restored_and_said(length, tmp_path, caplog):
    """Cut in the middle of an epoch, transformers would train one step more."""
    first = trainer_in(tmp_path, "tbpo_a", **length)
    first.train()
    before = (tmp_path / "metrics.jsonl").read_text()
    trainer = trainer_in(tmp_path, "tbpo_a", **length)
    result = trainer.train(resume_from_checkpoint=True)
    assert result.global_step == first.state.global_step
    assert "nothing is left to train" in caplog.text
    assert_identical(dict(first.model.state_dict()), dict(trainer.model.state_dict()))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def stopping_early(folder, *, patience=2, cut=None, **settings):
    """A run of eight steps, evaluated at every second one; its measure never improves."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 3, **settings}
    trainer = trainer_in(
        folder,
        "tbpo_a",
        cut=cut,
        max_steps=8,
        metric_for_best_model="loss",  # which rises
        **settings,
    )
    trainer.add_callback(EarlyStoppingCallback(patience))
    return trainer


def test_a_run_that_was_stopped_early_is_finished(tmp_path, caplog):
    """At step 6: the first evaluation is the best. Interrupted at step 5, it ends as early."""
    whole = stopping_early(tmp_path / "whole")
    assert whole.train().global_step == 6
    before = (tmp_path / "whole" / "metrics.jsonl").read_text()
    again = stopping_early(tmp_path / "whole")
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert "the run was stopped early at step 6, nothing is left to train" in caplog.text
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == before
    assert_identical(dict(whole.model.state_dict()), dict(again.model.state_dict()))
    with pytest.raises(KeyboardInterrupt):
        stopping_early(tmp_path / "cut", cut=5, save_steps=1).train()
    resumed = stopping_early(tmp_path / "cut", save_steps=1)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    assert_identical(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    longer = stopping_early(tmp_path / "whole", patience=9)
    assert longer.train(resume_from_checkpoint=True).global_step == 8


def test_the_evaluation_after_a_finished_run_is_not_doubled(tmp_path):
    for resume in (False, True):
        trainer = trainer_in(tmp_path, "tbpo_a", max_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        trainer.evaluate()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "value"), [("lora_alpha", 16), ("target_modules", ["q_proj"]), ("lora_dropout", 0.1)]
)
def test_another_adapter_is_refused(name, value, tmp_path):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}

    def adapted(**changed):
        return TokenRatioTrainer(
            tiny_model(),
            args=trainer_in(tmp_path, "tbpo_a", max_steps=3).args,
            train_dataset=word_pairs(14),
            eval_dataset=word_pairs(4, seed=1),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(**{**settings, **changed}),
            callbacks=[Cut(2)],
        )

    with pytest.raises(KeyboardInterrupt):
        adapted().train()
    with pytest.raises(TokenRatioError, match=f"began with the adapter's {name}"):
        adapted(**{name: value}).train(resume_from_checkpoint=True)
