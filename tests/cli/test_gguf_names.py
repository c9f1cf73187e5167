"""A GGUF file as a model's name in every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gguf_files import byte_model, byte_tokenizer, write_gguf
from tiny import word_pairs
from tokenratio.cli.main import main
from tokenratio.models.loading import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), byte_tokenizer()
    write_gguf(folder / "tiny.gguf", byte_model(tokenizer), tokenizer, "Q4_1")
    write_gguf(folder / "other.gguf", byte_model(tokenizer, seed=1), tokenizer, "Q8_0")
    rows = "".join(json.dumps(row) + "\n" for row in word_pairs(8))
    (folder / "pairs.jsonl").write_text(rows)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny.gguf", "other.gguf", "pairs.jsonl"):
        (tmp_path / name).symlink_to(folder / name)


def run(*words):
    assert main([str(word) for word in words]) == 0


def recipe(**more):
    with open("recipe.yaml", "w") as file:
        yaml.safe_dump(
            {
                "model": "tiny.gguf",
                "train_dataset": "pairs.jsonl",
                "max_length": 64,
                "max_steps": 1,
                "use_cpu": True,
                "save_strategy": "no",
                "output_dir": "run",
                **more,
            },
            file,
        )
    return "recipe.yaml"


def test_the_commands_that_only_read_a_model(capfd):
    run("inspect-data", "pairs.jsonl", "--tokenizer", "tiny.gguf")
    sampling = ("--num_samples", 2, "--max_new_tokens", 4)
    run("generate", "tiny.gguf", "--prompts", "pairs.jsonl", *sampling)
    run("score-tokens", "pairs.jsonl", "--positive_model", "tiny.gguf",
        "--negative_model", "other.gguf", "--max_length", 64)  # fmt: skip
    run("merge", "tiny.gguf", "--output", "plain")
    out, errors = capfd.readouterr()
    assert "<|bos|>" in out
    assert "16 responses to 8 prompts" in out
    assert "8 rows in token_scores" in out
    assert "tiny.gguf (Q4_1): dequantised in float32, saved in plain" in out
    assert errors == ""  # no bar of a library
    ids = torch.tensor([[5, 6, 7]])
    plain, read = AutoModelForCausalLM.from_pretrained("plain"), load_model("tiny.gguf")
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, read(ids).logits)


@pytest.mark.slow
def test_a_run_and_its_evaluation(capfd):
    written = recipe(ref_model="other.gguf", tokenizer="tiny.gguf", check_reference=False)
    run("train", written, "--dry-run")
    run("train", written)
    record = json.loads(Path("run/run.json").read_text())
    assert record["model"].endswith("tiny.gguf")
    assert record["reference"]["base"].endswith("other.gguf (Q8_0)")
    run("evaluate", "run", "tiny.gguf", "--pairs", "pairs.jsonl", "--prompts", "pairs.jsonl",
        "--num_samples", 2, "--max_new_tokens", 4, "--output_dir", "eval",
        "--judges", "{implicit: {policy: other.gguf, reference: tiny.gguf}}")  # fmt: skip
    out = capfd.readouterr().out
    assert "other.gguf" in out
    assert "tiny.gguf" in out


@pytest.mark.slow
def test_a_file_in_the_run_to_be_replaced_is_not_removed(folder, capsys):
    run("train", recipe(save_strategy="steps", save_steps=1))
    start = Path("run/checkpoint-1/start.gguf")
    shutil.copy(folder / "tiny.gguf", start)
    assert main(["train", "recipe.yaml", "--model", str(start), "--overwrite"]) == 2
    assert "part of the run in run that --overwrite would remove" in capsys.readouterr().err
    assert start.is_file()


@pytest.mark.slow
def test_a_reward_model_starts_from_a_file(capfd):
    run("train-reward", recipe(output_dir="reward"))
    run("evaluate", "tiny.gguf", "--prompts", "pairs.jsonl", "--against", "column:chosen",
        "--num_samples", 1, "--max_new_tokens", 4, "--output_dir", "eval",
        "--judges", "{reward-model: {model: reward}}")  # fmt: skip
    assert "win_rate/reward-model" in capfd.readouterr().out


def test_a_file_without_a_reward_head_is_no_judge(capsys):
    words = ["evaluate", "tiny.gguf", "--prompts", "pairs.jsonl", "--against", "column:chosen"]
    assert main([*words, "--judges", "{reward-model: {model: other.gguf}}"]) == 2
    assert "holds a language model without a reward head" in capsys.readouterr().err
