"""Rows of other layouts through every command: what is read, what is printed, what is asked."""

import json

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from templates import family_tokenizer
from tiny import word_pairs
from tokenratio import TokenRatioConfig
from tokenratio.cli.main import main

NAMES = {"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "sys"}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A chat model, rows of a layout of their own, rows of a known one, and a recipe."""
    monkeypatch.chdir(tmp_path)
    tokenizer = family_tokenizer("chatml")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = word_pairs(8)
    own = [
        {"ask": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "sys": "be brief", "id": n}
        for n, r in enumerate(rows)
    ]
    orca = [
        {"system": "be brief", "question": r["prompt"], "chosen": r["chosen"], "rejected": "no"}
        for r in rows
    ]
    for name, content in (("own", own), ("orca", orca)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    recipe = {
        "model": "model",
        "train_dataset": "own.jsonl",
        "columns": NAMES,
        "output_dir": "run",
        "loss": "dpo",
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 64,
        "use_cpu": True,
        "data_cache_dir": None,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


LAYOUT = "layout: prompt from ask, with system; pair from good, bad"


def test_training_reads_mapped_columns_and_says_which_it_does_not(made, capsys):
    assert main(["train", "recipe.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"  {LAYOUT}\n  columns not read: id\n" in printed
    assert main(["train", "recipe.yaml"]) == 0
    assert f"  {LAYOUT}\n  columns not read: id\n" in capsys.readouterr().out
    record = json.loads((made / "run" / "run.json").read_text())
    assert record["config"]["columns"] == NAMES
    data = record["data"]["train"]
    assert (data["layouts"], data["columns_not_read"]) == (
        {LAYOUT.removeprefix("layout: "): 8},
        {"id": 8},
    )


def test_inspect_data_reads_as_training_does(made, capsys):
    columns = json.dumps(NAMES)
    assert main(["inspect-data", "own.jsonl", "--tokenizer", "model", "--columns", columns]) == 0
    printed = capsys.readouterr().out
    assert f"{LAYOUT}\n" in printed
    assert "<|im_start|>system\\nbe brief<|im_end|>" in printed


def test_generation_asks_what_training_read(made, capsys):
    flags = ["--max_new_tokens", "2", "--num_prompts", "3"]
    own = ["--prompts", "own.jsonl", "--output", "own.out.jsonl", "--columns", json.dumps(NAMES)]
    orca = ["--prompts", "orca.jsonl", "--output", "orca.out.jsonl"]
    for each in (own, orca):
        assert main(["generate", "model", *each, *flags]) == 0, capsys.readouterr().err
    asked = [
        [json.loads(line)["prompt"] for line in (made / name).read_text().splitlines()]
        for name in ("own.out.jsonl", "orca.out.jsonl")
    ]
    assert asked[0] == asked[1]
    assert [turn["role"] for turn in asked[0][0]] == ["system", "user"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("{prompt: asks}", "own.jsonl has no column 'asks' (for prompt); it has ask, good, bad"),
        ("{question: ask}", "columns: 'question' cannot be mapped"),
        ("ask", "columns must "),
    ],
)
def test_columns_that_are_not_there_stop_every_command(made, columns, message, capsys):
    for argv in (
        ["train", "recipe.yaml", "--dry-run"],
        ["inspect-data", "own.jsonl"],
        ["generate", "model", "--prompts", "own.jsonl"],
        ["score-tokens", "own.jsonl", "--positive_model", "model", "--negative_model", "run"],
    ):
        if argv[0] == "score-tokens" and "must" not in message:
            continue  # it loads its models first
        assert main([*argv, "--columns", columns]) == 2
        assert message in capsys.readouterr().err


def test_columns_from_python_may_be_json_text():
    args = TokenRatioConfig(output_dir="run", use_cpu=True, columns=json.dumps(NAMES))
    assert args.data_arguments("train")["columns"] == NAMES
