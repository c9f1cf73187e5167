"""`methods`, `score-tokens`, and the reviews recipe with every method."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig
from tokenratio.cli.main import main
from tokenratio.cli.methods import markdown_table
from tokenratio.cli.recipe import resolve
from tokenratio.losses import METHODS
from tokenratio.training.method_settings import MethodSettings

ROOT = Path(__file__).resolve().parents[2]


def test_methods_lists_every_method(capsys):
    assert main(["methods"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line[:1].strip()]
    assert listed == list(METHODS)


def test_the_documented_table_is_the_codes():
    """`tokenratio methods --markdown true` prints what docs/methods.md has to hold."""
    assert markdown_table() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


SMALL = {
    "model_config": "{model_type: llama, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 128}",
    "train_dataset": "world:reviews?pairs=16&seed=0",
    "eval_dataset": "world:reviews?pairs=8&seed=0&split=test",
    "per_device_train_batch_size": "8",
    "baseline_hidden_size": "8",
    "use_cpu": "true",
    "sft": "{train_dataset: 'world:reviews?corpus=400&seed=0', learning_rate: 3.0e-3, "
    "per_device_train_batch_size: 16, save_strategy: 'no'}",
}


@pytest.mark.slow
def test_the_reviews_recipe_trains_every_method(tmp_path, monkeypatch, capsys):
    """One recipe; models that score tokens are trained for the losses that need them."""
    monkeypatch.chdir(tmp_path)
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    flags += ["--reference_cache_dir", str(tmp_path / "cache")]
    recipe = str(ROOT / "recipes" / "reviews.yaml")
    for loss in METHODS:
        assert main(["train", recipe, "--loss", loss, *flags]) == 0, loss
        run = tmp_path / "runs" / "reviews" / loss
        assert json.loads((run / "run.json").read_text())["config"]["loss"] == loss
        assert (run / "model.safetensors").is_file()
        assert json.loads((run / "eval.json").read_text())["eval_loss"] is not None
    folders = {path.name for path in (tmp_path / "runs" / "reviews").glob("score_tokens-*/*")}
    assert folders == {"dpo", "reversed_dpo", "scores.json", "scores.safetensors", "stage.json"}
    capsys.readouterr()
    assert main(["train", recipe, "--loss", "sepo", "--overwrite", *flags]) == 0
    assert "same settings and data; using it" in capsys.readouterr().out


@pytest.fixture
def models(tmp_path):
    """Two models and a file of pairs."""
    for name, seed in (("plus", 0), ("minus", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    for name, seed in (("train", 0), ("test", 1)):
        rows = word_pairs(6, seed=seed)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def score(folder, name, *flags):
    given = ["--positive_model", str(folder / "plus"), "--output", str(folder / "scores")]
    given += ["--cache_dir", str(folder / "cache"), "--max_length", "32"]
    return main(["score-tokens", str(folder / f"{name}.jsonl"), *given, *flags])


def test_score_tokens_then_train(models, capsys):
    minus = ["--negative_model", str(models / "minus")]
    assert score(models, "train", *minus) == 0
    assert score(models, "test", *minus) == 0
    assert "12 rows in" in capsys.readouterr().out
    recipe = {
        "model": str(models / "plus"),
        "train_dataset": str(models / "train.jsonl"),
        "eval_dataset": str(models / "test.jsonl"),
        "token_scores": str(models / "scores"),
        "loss": "sepo",
        "max_length": 32,
        "output_dir": str(models / "run"),
        "save_strategy": "no",
        "use_cpu": True,
    }
    path = models / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path)]) == 0
    assert (models / "run" / "model.safetensors").is_file()
    assert main(["train", str(path), "--overwrite", "--max_length", "5"]) == 2
    assert "have no token scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "p+ and p- are the same"),
        (["--negative_prompt", "worse"], "must contain {prompt} exactly once"),
        (["--negative_model", "."], "cannot load model"),
        (["--on_bad_row", "maybe"], "on_bad_row"),
    ],
)
def test_mistakes_are_one_line(models, capsys, flags, message):
    assert score(models, "train", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (models / "scores").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{dpo: {}}", "unknown loss in score_tokens"),
        ("{sepo: {positiv: dpo}}", "did you mean 'positive'"),
        ("{sepo: {positive_prompt: none}}", "must contain {prompt} exactly once"),
        ("{sepo: {dpo: {learning_rat: 1}}}", "learning_rate"),
        ("{sepo: {dpo: 3}}", "`key: value` lines"),
        ("{sepo: {dpo: {loss: ipo}}}", "cannot have loss"),
        ("{sepo: {positive: null}}", "must be text"),
        ("{sepo: {positive: reference}}", "positive and negative are the same model"),
        ("{1: 2}", "must be a mapping such as {key: value}"),
    ],
)
def test_a_recipes_section_is_checked(section, message, capsys):
    recipe = str(ROOT / "recipes" / "reviews.yaml")
    flags = ["--loss", "sepo", "--score_tokens", section]
    assert main(["train", recipe, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("loss", METHODS)
def test_every_method_has_a_recipe_with_its_own_defaults(loss, tmp_path):
    """What a recipe writes out is what the method has by itself."""
    path = ROOT / "recipes" / "methods" / f"{loss}.yaml"
    written = resolve(str(path), {"use_cpu": True, "bf16": False}, {})
    bare = TokenRatioConfig(output_dir=str(tmp_path), loss=loss, use_cpu=True)
    assert written.main.args.loss == loss
    for name in {field.name for field in fields(MethodSettings)} - {"token_scores"}:
        assert getattr(written.main.args, name) == getattr(bare, name), name
    assert (written.contrast is not None) == METHODS[loss].needs_contrast
    if written.contrast is not None:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        document["score_tokens"] = {}
        (tmp_path / "bare.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        published = resolve(str(tmp_path / "bare.yaml"), {"use_cpu": True, "bf16": False}, {})
        for name in ("positive", "negative", "positive_prompt", "negative_prompt"):
            assert getattr(written.contrast, name) == getattr(published.contrast, name)


def train_sepo(folder, *flags):
    path = folder / "recipe.yaml"
    recipe = {
        "model": str(folder / "plus"),
        "train_dataset": str(folder / "data"),
        "eval_dataset": str(folder / "data"),
        "loss": "sepo",
        "max_length": 32,
        "output_dir": str(folder / "run"),
        "reference_cache_dir": str(folder / "cache"),
        "use_cpu": True,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "score_tokens": {},
    }
    path.write_text(yaml.safe_dump(recipe))
    return main(["train", str(path), "--overwrite", *flags])


@pytest.fixture
def scored(models, monkeypatch):
    """The same as a folder with a train and a test split; runs go to the current folder."""
    monkeypatch.chdir(models)
    (models / "data").mkdir()
    for name in ("train", "test"):
        (models / f"{name}.jsonl").rename(models / "data" / f"{name}.jsonl")
    return models


def folders(root):
    return {path.name for path in (root / "runs" / "recipe").glob("score_tokens-*")}


@pytest.mark.slow
def test_scores_are_used_again_only_for_the_same_run(scored, capsys):
    """Adapter, held-out rows and a named model count, by content; damage is repaired."""
    assert train_sepo(scored) == 0
    assert train_sepo(scored, "--logging_steps", "2", "--eval_strategy", "epoch") == 0
    assert "using it" in capsys.readouterr().out
    assert len(folders(scored)) == 1
    assert train_sepo(scored, "--peft", "{r: 2, target_modules: all-linear}") == 0
    assert len(folders(scored)) == 2
    named = ["--score_tokens", f"{{sepo: {{positive: {scored / 'minus'}, negative: reference}}}}"]
    assert train_sepo(scored, *named) == 0
    tiny_model(seed=5).save_pretrained(scored / "minus")
    assert train_sepo(scored, *named) == 0
    assert len(folders(scored)) == 4
    with (scored / "data" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "kin", "chosen": "jam", "rejected": "log"}) + "\n")
    assert train_sepo(scored, *named) == 0
    assert len(folders(scored)) == 5
    for path in (scored / "runs" / "recipe").glob("score_tokens-*/scores.safetensors"):
        path.write_bytes(path.read_bytes()[:-4])
    capsys.readouterr()
    assert train_sepo(scored, *named) == 0
    assert "using it" not in capsys.readouterr().out


def test_a_resumed_run_keeps_its_scores(scored, capsys):
    steps = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps"]
    assert train_sepo(scored, *steps, "1") == 0
    before = folders(scored)
    resumed = ["--resume_from_checkpoint", "true", "--overwrite", "false"]
    assert train_sepo(scored, *steps, "2", *resumed) == 0, capsys.readouterr().err
    assert folders(scored) == before


def test_a_dry_run_shows_the_stage(scored, capsys):
    assert train_sepo(scored, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "positive: dpo" in printed
    assert "negative: reference" in printed
    assert folders(scored) == set()


@pytest.mark.slow
def test_a_pipe_that_closes_early_is_no_traceback(tmp_path):
    command = f"{sys.executable} -m tokenratio.cli.main methods | head -c 10; echo"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tbpo_a")
    assert done.stderr == ""
