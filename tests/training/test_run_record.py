"""What may differ when a run is resumed, what must not, and what `run.json` then says."""

import json
import shutil

import pytest
from peft import LoraConfig

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import versions, write_run_file
from tokenratio.training.run_record import resumed_record
from training.short_runs import Cut, assert_identical, state_of, trainer_in


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run cut off after two of its steps. Read only: copy before training on."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        trainer_in(folder, "tbpo_a", cut=2).train()
    return folder


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_change_of_settings_is_accepted_when_asked_for_and_recorded(
    interrupted, tmp_path, caplog
):
    """The learning rate of the settings holds, not that of the checkpoint's optimizer."""
    folder = shutil.copytree(interrupted, tmp_path / "run")
    started = json.loads((folder / "run.json").read_text())
    plain = shutil.copytree(interrupted, tmp_path / "plain")
    trainer_in(plain, "tbpo_a").train(resume_from_checkpoint=True)
    changed = {"learning_rate": 1e-4, "weight_decay": 0.1, "adam_beta1": 0.8, "logging_steps": 1}
    trainer = trainer_in(
        folder, "tbpo_a", **changed, resume_with_changes=True, eval_steps=4, save_steps=2
    )
    trainer.train(resume_from_checkpoint=True)
    changes = "learning_rate 0.001 -> 0.0001, weight_decay 0.0 -> 0.1, adam_beta1 0.9 -> 0.8"
    assert f"from here on the run differs from the original: {changes}" in caplog.text
    assert "they do not affect the result: eval_steps 3 -> 4, " in caplog.text
    rates = [
        [line["learning_rate"] for line in lines_of(of) if "loss" in line][2:]
        for of in (plain, folder)
    ]
    assert rates[1] == pytest.approx([rate / 10 for rate in rates[0]])
    group = trainer.optimizer.param_groups[0]
    assert (group["weight_decay"], group["alpha"]) == (0.1, 0.99)

    record = json.loads((folder / "run.json").read_text())
    (entry,) = record.pop("resumptions")
    assert record == started | {"run_folder": str(folder), "config": record["config"]}
    assert record["config"] == started["config"] | {"output_dir": str(folder)}
    assert (entry["checkpoint"], entry["step"], "processes" in entry) == ("checkpoint-2", 2, False)
    assert entry["config"] == {
        "adam_beta1": 0.8,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "eval_steps": 4,
        "save_steps": 2,
    }
    # What holds from then on is the changed run.
    trainer_in(folder, "tbpo_a", **changed, save_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(TokenRatioError, match=r"began with learning_rate 0\.0001, not 0\.001"):
        trainer_in(folder, "tbpo_a").train(resume_from_checkpoint=True)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "checkpoint-4")
    trainer_in(folder, "tbpo_a", save_steps=2).train(resume_from_checkpoint=True)
    steps = [of["step"] for of in json.loads((folder / "run.json").read_text())["resumptions"]]
    assert steps == [2, 6, 2]


@pytest.mark.slow
def test_a_resumed_run_without_changes_records_only_that(interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    trainer_in(folder, "tbpo_a", resume_with_changes=True).train(resume_from_checkpoint=True)
    record = json.loads((folder / "run.json").read_text())
    assert [entry.keys() for entry in record["resumptions"]] == [{"time", "checkpoint", "step"}]
    assert json.loads((folder / "checkpoint-6" / "run.json").read_text()) == record
    trainer_in(tmp_path / "whole", "tbpo_a").train()
    assert_identical(*map(state_of, (folder, tmp_path / "whole")))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim": "adamw_torch"}, "optim rmsprop, not adamw_torch; set it back"),
        ({"loss": "dpo"}, "loss tbpo_a, not dpo; set it back, or start a new run in"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type cosine, not reduce_lr"),
        ({"max_length": 6}, "training data differ"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_all_the_same(settings, said, interrupted):
    trainer = trainer_in(interrupted, **{"loss": "tbpo_a", "resume_with_changes": True, **settings})
    with pytest.raises(TokenRatioError, match=said) as refusal:
        trainer.train(resume_from_checkpoint=True)
    assert "resume_with_changes" not in str(refusal.value)


def test_another_reference_is_refused_all_the_same(interrupted):
    other = TokenRatioTrainer(
        tiny_model(seed=3),
        args=trainer_in(interrupted, "tbpo_a", resume_with_changes=True).args,
        train_dataset=word_pairs(14),
        eval_dataset=word_pairs(4, seed=1),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(TokenRatioError, match="the reference is not the one"):
        other.train(resume_from_checkpoint=True)


def test_another_tokenizer_is_named(interrupted):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    other = TokenRatioTrainer(
        tiny_model(),
        args=trainer_in(interrupted, "tbpo_a").args,
        train_dataset=word_pairs(13),
        eval_dataset=word_pairs(4, seed=1),
        processing_class=tokenizer,
    )
    with pytest.raises(TokenRatioError, match="the tokenizer or its chat template differs"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_another_base_below_an_adapter_is_refused_also_without_a_reference(tmp_path):
    def adapted(seed, cut=None):
        return TokenRatioTrainer(
            tiny_model(seed=seed),
            args=trainer_in(tmp_path, "simpo").args,
            train_dataset=word_pairs(14),
            eval_dataset=word_pairs(4, seed=1),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4),
            callbacks=[] if cut is None else [Cut(cut)],
        )

    with pytest.raises(KeyboardInterrupt):
        adapted(0, cut=2).train()
    with pytest.raises(TokenRatioError, match="the model below the adapter is not the one"):
        adapted(1).train(resume_from_checkpoint=True)
    adapted(0).train(resume_from_checkpoint=True)


def test_a_batch_size_at_which_the_run_is_over_is_not_taken_for_its_end(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, "tbpo_a", cut=3, max_steps=-1, num_train_epochs=1).train()
    larger = {"per_device_train_batch_size": 7, "resume_with_changes": True}
    trainer = trainer_in(tmp_path, "tbpo_a", max_steps=-1, num_train_epochs=1, **larger)
    with pytest.raises(TokenRatioError, match=r"has only 1 step, and .* step 3"):
        trainer.train(resume_from_checkpoint=True)


def test_the_record_keeps_the_beginning_and_lists_what_differs(interrupted, tmp_path):
    began = json.loads((interrupted / "run.json").read_text())
    began["versions"]["torch"] = "1.0"
    evaluated = {**began["data"]["eval"], "digest": "another"}
    now = {**began, "processes": 2, "data": {**began["data"], "eval": evaluated}}
    del now["versions"]
    checkpoint = tmp_path / "checkpoint-2"
    write_run_file(checkpoint, **began)
    record = resumed_record(checkpoint, 2, now, tmp_path)
    (entry,) = record.pop("resumptions")
    assert record == began
    del entry["time"]
    assert entry == {
        "checkpoint": "checkpoint-2",
        "step": 2,
        "processes": 2,
        "data": {"eval": evaluated},
        "versions": {"torch": versions()["torch"]},
    }
