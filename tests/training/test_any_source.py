"""`evaluate` and `predict` take what the constructor takes, and every row of it."""

import json

import pytest
from datasets import Dataset, DatasetDict

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.data.worlds import world_rows
from tokenratio.errors import TokenRatioError
from tokenratio.models.reward_model import load_reward_model
from tokenratio.training.reward_trainer import RewardConfig, RewardTrainer

PAIRS = word_pairs(5, seed=1)


def trainer_of(folder, *, loss="dpo", trained=None, evaluated=PAIRS, **settings):
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, **settings}
    quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_length": 32}
    args = {"output_dir": str(folder), "learning_rate": 1e-2, **quiet, **settings}
    if loss == "reward":
        tiny_model().save_pretrained(folder / "model")
        trainer = RewardTrainer(
            load_reward_model(folder / "model", seed=0),
            RewardConfig(**args),
            trained or word_pairs(8),
            evaluated,
            processing_class=tiny_tokenizer(),
        )
    else:
        trainer = TokenRatioTrainer(
            tiny_model(),
            args=TokenRatioConfig(loss=loss, **args),
            train_dataset=trained or word_pairs(8),
            eval_dataset=evaluated,
            processing_class=tiny_tokenizer(),
        )
    trainer.train()
    return trainer


def sources(folder):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    dataset = Dataset.from_list(PAIRS)
    return [PAIRS, str(path), path, dataset, DatasetDict(train=dataset, test=dataset)]


@pytest.mark.parametrize("loss", ["dpo", "tbpo_a", "simpo", "sft", "reward"])
def test_every_source_gives_the_same_figures(loss, tmp_path):
    trainer = trainer_of(tmp_path, loss=loss)
    expected = trainer.evaluate()["eval_loss"]
    for source in [*sources(tmp_path), trainer.eval_dataset]:
        assert trainer.evaluate(source)["eval_loss"] == pytest.approx(expected)
        output = trainer.predict(source)
        assert output.metrics["test_loss"] == pytest.approx(expected)
        assert list(output.label_ids) == list(range(5))
        assert output.predictions.shape == (5, 1 if loss == "sft" else 2)


@pytest.mark.parametrize("loss", ["dpo", "reward"])
def test_predictions_are_the_rewards_in_the_order_of_the_rows(loss, tmp_path):
    trainer = trainer_of(tmp_path, loss=loss, per_device_eval_batch_size=2)
    whole = trainer.predict(PAIRS)
    chosen, rejected = whole.predictions.mean(0)
    assert chosen == pytest.approx(whole.metrics["test_rewards/chosen"], rel=1e-4)
    assert rejected == pytest.approx(whole.metrics["test_rewards/rejected"], rel=1e-4)
    for row, pair in enumerate(PAIRS):
        alone = trainer.predict([pair]).predictions[0]
        assert alone == pytest.approx(whole.predictions[row], rel=1e-3, abs=1e-6)


def test_a_set_is_evaluated_by_its_name(tmp_path):
    trainer = trainer_of(tmp_path, evaluated={"near": PAIRS, "far": word_pairs(3, seed=2)})
    by_name = trainer.evaluate("far", metric_key_prefix="eval_far")
    assert by_name["eval_far_loss"] == pytest.approx(trainer.evaluate()["eval_far_loss"])
    with pytest.raises(TokenRatioError, match="nowhere"):
        trainer.evaluate("./nowhere.jsonl")


@pytest.mark.parametrize("loss", ["dpo", "reward"])
def test_dropping_the_last_batch_is_for_training(loss, tmp_path):
    trainer = trainer_of(tmp_path, loss=loss, dataloader_drop_last=True)
    assert "eval_loss" in trainer.evaluate()  # 5 rows, in batches of 8
    assert len(trainer.predict(PAIRS).predictions) == 5
    assert trainer.args.dataloader_drop_last
    with pytest.raises(TokenRatioError, match="8 rows fill no batch of 16"):
        trainer_of(tmp_path, loss=loss, dataloader_drop_last=True, per_device_train_batch_size=16)


def test_a_run_of_no_epochs_is_refused(tmp_path):
    for epochs in (0, -1):
        with pytest.raises(TokenRatioError, match="num_train_epochs must be positive"):
            trainer_of(tmp_path, max_steps=-1, num_train_epochs=epochs)


@pytest.mark.parametrize("loss", ["dpo", "reward"])
def test_a_world_is_trained_on_and_evaluated_by_its_name(loss, tmp_path):
    world = "world:reviews?pairs=5&split=test"
    trainer = trainer_of(tmp_path, loss=loss, trained=world, evaluated=world)
    by_rows = trainer_of(
        tmp_path, loss=loss, trained=world_rows(world), evaluated=world_rows(world)
    )
    assert trainer.eval_data.digest == by_rows.eval_data.digest
    assert trainer.evaluate()["eval_loss"] == by_rows.evaluate(world)["eval_loss"]
