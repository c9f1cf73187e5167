"""`tokenratio plan` as a user runs it."""

import pytest
import yaml

from tokenratio.cli import plan
from tokenratio.cli.main import main


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose model is a folder with a configuration and nothing else."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100, '
        '"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}'
    )
    document = {"model": str(model), "train_dataset": "pairs.jsonl", "max_length": 2048}
    document |= {"bf16": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    # The smallest of the shapes is enough here.
    monkeypatch.setattr(plan, "_LLAMAS", {"Llama 1B": plan._LLAMAS["Llama 1B"]})
    return path


def test_a_table_and_the_parts_of_the_recipes_own_run(recipe, capsys):
    assert main(["plan", str(recipe), "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("32 pairs per update on 8 × 80 GiB, rows of 2,048 tokens.")
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0]] == [
        *("model", "training", "DDP", "ZeRO-2", "FSDP2", "ZeRO-3"),
    ]
    assert [row[1].strip() for row in table[2:]] == ["full", "LoRA", "QLoRA"] * 2
    assert all("4×1" in cell for cell in table[2][2:])
    assert text.count("estimated memory") == 1
    assert f"{recipe.parent / 'model'}, full, DDP: per_device_train_batch_size 4" in text
    assert "policy weights" in text


def test_verbose_shows_the_parts_of_every_estimate(recipe, capsys):
    assert main(["plan", str(recipe), "--gpus", "1", "--verbose"]) == 0
    text = capsys.readouterr().out
    assert text.count("estimated memory") == 6
    assert "one GPU" in text
    assert "buckets" not in text


def test_pairs_that_cannot_be_shared_evenly(recipe, capsys):
    assert main(["plan", str(recipe), "--gpus", "6"]) == 2
    assert "has 32 pairs per update" in capsys.readouterr().err
