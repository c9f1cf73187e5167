"""A recipe's choice of rows: every stage, the dry run and the command line read the same."""

import json
from pathlib import Path

import pytest
import yaml

from tiny import word_pairs
from tokenratio.cli.main import main

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 64}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"train_prefs": 16, "train_sft": 12, "test_prefs": 6, "test_sft": 5}
    rows = word_pairs(60)
    for name, size in sizes.items():
        write(tmp_path / "uf" / "data" / f"{name}-00000-of-00001.jsonl", rows[:size])
    write(tmp_path / "more.jsonl", rows[40:])

    def make(**settings):
        document = {
            "model_config": {"model_type": "llama", **TINY},
            "tokenizer": {"byte_level_bpe": 300},
            "output_dir": "run",
            "use_cpu": True,
            "save_strategy": "no",
            "max_length": 48,
            **settings,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
        return "recipe.yaml"

    return make


def rows_read(text):
    return [int(line.split()[0]) for line in text.splitlines() if "rows read" in line]


def rows_used(folder="run"):
    data = json.loads(Path(folder, "run.json").read_text())["data"]
    return {name: part["rows_kept"] for name, part in data.items()}


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({"train_dataset": "uf", "eval_dataset": "uf"}, {"train": 16, "eval": 6}),
        (
            {"train_dataset": "uf@train_sft", "eval_dataset": "uf", "eval_split": "test_sft"},
            {"train": 12, "eval": 5},
        ),
        (
            {"train_dataset": ["uf", {"path": "more.jsonl", "weight": 0.5}], "max_samples": 20},
            {"train": 20},
        ),
        ({"train_dataset": "uf", "train_split": "test_prefs"}, {"train": 6}),
        (
            {"train_dataset": "uf", "eval_dataset": "uf", "max_eval_samples": 4},
            {"train": 16, "eval": 4},
        ),
    ],
)
def test_the_dry_run_reads_what_the_run_reads(make_recipe, settings, used, capsys):
    recipe = make_recipe(**settings)
    assert main(["train", recipe, "--dry-run"]) == 0
    assert rows_read(capsys.readouterr().out) == list(used.values())
    assert main(["train", recipe]) == 0
    printed = capsys.readouterr().out
    assert rows_used() == used
    assert rows_read(printed) == list(used.values())


def test_the_first_stage_never_sees_held_out_prompts(make_recipe, capsys):
    recipe = make_recipe(
        train_dataset="uf",
        held_out_share=0.3,
        sft={"output_dir": "sft", "save_strategy": "no", "train_dataset": "uf@train_sft"},
        data_cache_dir="cache",
    )
    assert main(["train", recipe]) == 0
    assert len(list(Path("cache").iterdir())) == 4  # both sides of both stages
    assert "held out by prompt" in capsys.readouterr().out
    used, first = rows_used(), rows_used("sft")
    assert used["train"] + used["eval"] == 16
    assert first["train"] + first["eval"] == 12
    assert used["eval"] >= first["eval"] > 0  # the same prompts: one file begins as the other does
    assert "eval_rewards/accuracies" in Path("run/eval.json").read_text()
    assert main(["train", recipe, "--dry-run"]) == 0
    assert rows_read(capsys.readouterr().out) == [*first.values(), *used.values()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_dataset": "uf", "held_out_share": 0.1}, "leave out eval_dataset"),
        ({"held_out_share": 0.3, "sft": {"held_out_share": 0.1}}, "for the whole recipe"),
        ({"eval_split": "test_prefs"}, "add eval_dataset"),
        ({"train_split": "train_gen"}, "no split 'train_gen'; it has: test_prefs"),
        ({"train_dataset": {"path": "uf", "spilt": "x"}}, "did you mean 'split'"),
        ({"train_dataset": [3]}, "train_dataset must be a name"),
        ({"train_dataset": [{"split": "train"}]}, "needs path"),
        ({"max_samples": -1}, "max_samples must be at least 1"),
    ],
)
def test_choices_that_do_not_fit(make_recipe, settings, message, capsys):
    recipe = make_recipe(**{"train_dataset": "uf", **settings})
    for more in ([], ["--dry-run"]):
        assert main(["train", recipe, *more]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


def test_splits_in_the_other_commands(make_recipe, capsys):
    recipe = make_recipe(train_dataset="uf@train_prefs")
    assert main(["inspect-data", "uf"]) == 0
    assert "split train_prefs; not read: test_prefs" in capsys.readouterr().out
    assert main(["inspect-data", "uf@test_sft"]) == 0
    assert rows_read(capsys.readouterr().out) == [5]
    assert main(["train", recipe]) == 0
    capsys.readouterr()
    generate = ["generate", "run", "--max_new_tokens", "2", "--num_prompts", "2", "--prompts"]
    assert main([*generate, "uf"]) == 2
    assert "several splits: test_prefs" in capsys.readouterr().err
    assert main([*generate, "uf@test_prefs"]) == 0
    assert "2 prompts" in capsys.readouterr().out
    scores = ["score-tokens", "uf@test_prefs", "--positive_model", "run", "--positive_prompt"]
    assert main([*scores, "better: {prompt}", "--cache_dir", "cache"]) == 0
    assert rows_read(capsys.readouterr().out) == [6]
    reward = make_recipe(train_dataset="uf", held_out_share=0.3)
    assert main(["train-reward", reward, "--output_dir", "reward"]) == 0
    used = rows_used("reward")
    assert used["train"] + used["eval"] == 16
    assert min(used.values()) > 0


def test_a_second_run_reads_what_the_first_prepared(make_recipe, tmp_path, capsys):
    recipe = make_recipe(
        train_dataset="uf", eval_dataset="uf", data_cache_dir="cache", dataset_num_proc=2
    )
    assert main(["train", recipe, "--dry-run"]) == 0
    first = capsys.readouterr().out
    assert "read from the cache" not in first
    assert main(["train", recipe]) == 0
    printed = capsys.readouterr().out
    assert printed.count("read from the cache: cache/") == 2
    assert len(list(Path("cache").iterdir())) == 2
    record = json.loads(Path("run/run.json").read_text())["data"]
    assert main(["train", recipe, "--overwrite", "--data_cache_dir", "null"]) == 0
    assert "read from the cache" not in capsys.readouterr().out
    assert json.loads(Path("run/run.json").read_text())["data"] == record
