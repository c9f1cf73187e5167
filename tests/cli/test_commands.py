"""The commands as a user runs them: what they write, and how they fail."""

import json

import pytest
import yaml

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.main import main

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 64}
QUICK = {"use_cpu": True, "save_strategy": "no", "max_length": 48, "baseline_hidden_size": 8}


@pytest.fixture
def recipe(tmp_path):
    """A recipe with an SFT stage on a file of pairs, one row of them bad."""
    rows = [*word_pairs(12), {"prompt": "ash", "chosen": "", "rejected": "bay"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "model_config": {"model_type": "llama", **TINY},
        "tokenizer": {"byte_level_bpe": 300},
        "train_dataset": str(data),
        "eval_dataset": str(data),
        "sft": {"num_train_epochs": 1, "output_dir": str(tmp_path / "sft"), "save_strategy": "no"},
        "learning_rate": "1e-3",
        "output_dir": str(tmp_path / "run"),
        **QUICK,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_train_runs_both_stages_and_reuses_the_first(recipe, tmp_path, capsys):
    assert main(["train", str(recipe)]) == 0
    printed = capsys.readouterr()
    assert "blank response: 1" in printed.out
    assert "pairs.jsonl:13" in printed.out
    assert "frozen copy of the starting policy" in printed.out
    assert "reward accuracy" in printed.out
    assert printed.err == ""
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["loss"] == "tbpo_a"
    assert "eval_rewards/accuracies" in json.loads((tmp_path / "run" / "eval.json").read_text())

    assert main(["train", str(recipe)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", str(recipe), "--loss", "tbpo_q", "--overwrite"]) == 0
    assert "same settings and data; using it" in capsys.readouterr().out
    assert (tmp_path / "run" / "state_baseline.safetensors").is_file()


def test_changed_data_trains_the_first_stage_again(recipe, tmp_path, capsys):
    assert main(["train", str(recipe)]) == 0
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "kin", "chosen": "jam", "rejected": "log"}) + "\n")
    capsys.readouterr()
    assert main(["train", str(recipe), "--overwrite"]) == 0
    assert "using it" not in capsys.readouterr().out


def test_sft_alone_from_a_config(recipe, tmp_path, capsys):
    document = yaml.safe_load(recipe.read_text())
    del document["sft"]
    recipe.write_text(yaml.safe_dump(document))
    assert main(["train", str(recipe), "--loss", "sft"]) == 0
    assert "held out: loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_lora_from_a_recipe(recipe, tmp_path):
    assert main(["train", str(recipe), "--peft", "{r: 4, target_modules: all-linear}"]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_dry_run_resolves_everything_and_writes_nothing(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--dry-run", "--beta", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert "beta: 0.25" in printed
    assert "optim: rmsprop" in printed
    assert "estimated memory" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl", "recipe.yaml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "x"], "unknown command 'trian'; did you mean 'train'"),
        (["train"], "train needs one recipe"),
        (["train", "none.yaml"], "cannot read none.yaml"),
        (["train", "RECIPE", "--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["train", "RECIPE", "--beta", "-1"], "beta must be positive"),
        (["train", "RECIPE", "--learning_rate", "fast"], "learning_rate must be float"),
        (["train", "RECIPE", "--train_dataset", "none.jsonl"], "none.jsonl"),
        (["train", "RECIPE", "--model", "x"], "either model or model_config"),
        (["train", "RECIPE", "--tokenizer", "{bpe: 3}"], "unknown key in tokenizer 'bpe'"),
        (["train", "RECIPE", "--tokenizer", "{byte_level_bpe: 3}"], "must be at least 259"),
        (["train", "RECIPE", "--peft", "{rank: 3}"], "peft:"),
        (["train", "RECIPE", "--on_bad_row", "error"], "pairs.jsonl:13"),
        (["train", "RECIPE", "--max_length", "1"], "max_length"),
        (["generate", "none", "--prompts", "none.jsonl"], "none.jsonl"),
        (["generate", "none"], "needs --prompts"),
        (["inspect-data"], "needs one source"),
        (["inspect-data", "none.jsonl"], "none.jsonl"),
        (["inspect-data", "world:reviws?pairs=3"], "reviews"),
        (["quickstart", "now"], "takes no argument"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(argv, message, recipe, capsys):
    argv = [str(recipe) if word == "RECIPE" else word for word in argv]
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["train", "generate", "inspect-data", "quickstart"])
def test_help_of_every_command(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: tokenratio {command}" in capsys.readouterr().out


def test_generate_writes_samples_and_repeats_itself(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("ash bay", "cow")))
    for name in ("a", "b"):
        argv = ["generate", str(tmp_path / "model"), "--prompts", str(prompts)]
        argv += ["--num_samples", "2", "--max_new_tokens", "5"]
        argv += ["--output", str(tmp_path / f"{name}.jsonl")]
        assert main(argv) == 0
    assert "4 responses to 2 prompts" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["prompts.jsonl:1", "prompts.jsonl:2"]
    assert all(len(line["samples"]) == 2 for line in lines)
    assert all(s["finish_reason"] in ("eos", "length") for x in lines for s in x["samples"])
    other = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [x["samples"] for x in lines] == [x["samples"] for x in other]


def test_inspect_data_of_a_world_and_a_file(recipe, tmp_path, capsys):
    assert main(["inspect-data", "world:reviews?pairs=5&seed=1"]) == 0
    assert "5 rows read" in capsys.readouterr().out
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    argv = [
        "inspect-data",
        str(tmp_path / "pairs.jsonl"),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "EOS" in printed
    assert "blank response: 1" in printed


@pytest.mark.slow
def test_quickstart_small(tmp_path, capsys):
    argv = ["quickstart", "--num_sft", "500", "--num_pairs", "64", "--num_prompts", "16"]
    assert main([*argv, "--output_dir", str(tmp_path / "q")]) == 0
    printed = capsys.readouterr().out
    assert "gold reward" in printed
    for name in ("pairs.jsonl", "before.jsonl", "after.jsonl", "table.md", "tbpo_a/metrics.jsonl"):
        assert (tmp_path / "q" / name).is_file(), name
    (tmp_path / "q" / "mine.txt").write_text("keep")
    assert main([*argv, "--output_dir", str(tmp_path / "q")]) == 2
    assert (tmp_path / "q" / "mine.txt").is_file()
