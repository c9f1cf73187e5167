"""Worlds of conversations from the command line: a tiny chat model that speaks bytes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from templates import family_tokenizer
from tiny import tiny_model
from tokenratio.cli.main import main
from tokenratio.data.worlds import WORLDS, world_rows
from tokenratio.evaluation.response_files import read_responses
from tokenratio.evaluation.results import PolicyMeasures
from tokenratio.run_folder import write_run_file

pytest.importorskip("vaderSentiment", reason="needs the extra worlds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chat model that speaks in bytes, and a run that trained on pairs drawn from it."""
    folder = tmp_path_factory.mktemp("chat_worlds")
    tokenizer = family_tokenizer("chatml")
    model = tiny_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    recipe = {
        "model": "base",
        "train_dataset": "world:sentiment?pairs=6&seed=1",
        "eval_dataset": ["world:sentiment?pairs=2&split=test"],
        "loss": "dpo",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.0e-3,
        "max_length": 256,
        "save_strategy": "no",
        "use_cpu": True,
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_a_dry_run_draws_nothing(capsys):
    assert main(["train", "recipe.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("its pairs are drawn from the policy when the run begins") == 2


@pytest.mark.slow
def test_train_and_evaluate_on_the_sentiment_world(capsys):
    assert main(["train", "recipe.yaml"]) == 0, capsys.readouterr().err
    assert "6 rows read, 6 kept" in capsys.readouterr().out
    prompts = "world:sentiment?prompts=3&split=test"
    argv = [
        "evaluate",
        "run",
        "--prompts",
        prompts,
        "--pairs",
        "world:sentiment?pairs=4&split=test",
    ]
    argv += ["--max_new_tokens", "24", "--num_samples", "2", "--judges", "{gold: {}, other: "]
    argv[-1] += "{judge: gold, world: harmlessness}}"
    assert main(argv) == 0, capsys.readouterr().err
    assert "responses drawn from the reference" in capsys.readouterr().out
    reference, policy = (PolicyMeasures.load(Path("evaluation") / n) for n in ("reference", "run"))
    for name in ("gold_reward", "perplexity_ref", "diversity/distinct_2"):
        assert policy.named(name) is not None
        assert reference.named(name) is not None
    for name in (
        "win_rate/gold",
        "win_rate/other",
        "pairs/accuracy",
        "word_credit/log_ratio/kendall",
    ):
        assert policy.named(name) is not None, name
    assert policy.named("credit/log_ratio/kendall") is None
    assert len([id for id in policy.contents if id.startswith("pair ")]) == 4
    answers = read_responses("evaluation/run/generations.jsonl")
    assert [each.prompt.messages for each in answers] == [
        row["prompt"] for row in world_rows(prompts)
    ]
    rewards = [WORLDS["sentiment"].gold_reward(s.text) for each in answers for s in each.samples]
    assert [value for *_, value in policy.named("gold_reward").values] == rewards


@pytest.mark.slow
def test_the_stages_before_a_run_draw_their_own_pairs(capsys):
    """SFT and the models that score tokens train on pairs that only a policy can answer, too."""
    flags = ["--loss", "tis_dpo", "--sft", "{save_strategy: 'no'}", "--score_tokens", "{}"]
    flags += ["--output_dir", "staged", "--eval_dataset", "null", "--max_steps", "2"]
    assert main(["train", "recipe.yaml", *flags]) == 0, capsys.readouterr().err
    assert main(["train", "recipe.yaml", *flags, "--overwrite"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert len(re.findall("has the same settings and data; using it", said)) == 2


def test_pairs_are_the_references_own(capsys):
    """The same pairs in every call, whatever the policies."""
    from tokenratio import EvaluateOptions, evaluate

    found = []
    for name in ("a", "b"):
        options = EvaluateOptions(
            output_dir=name,
            reference="base",
            pairs="world:sentiment?pairs=3&split=test",
            max_new_tokens=16,
        )
        found.append(evaluate([f"{name}=base"], options, report=lambda line: None)[-1].contents)
    assert found[0] == found[1]


def test_pairs_of_a_recorded_reference_that_is_gone(capsys):
    shutil.copytree("base", "moved")
    write_run_file("moved", reference={"name": "./gone"})
    assert main(["evaluate", "moved", "--pairs", "world:sentiment?pairs=3&split=test"]) == 2
    assert "the runs recorded it as their reference; give --reference" in capsys.readouterr().err


def test_training_on_a_world_without_a_policy_says_what_to_do(capsys):
    assert main(["inspect-data", "world:sentiment?pairs=2"]) == 2
    assert "its pairs come from a policy" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_small(tmp_path, capsys):
    """A chat model that speaks bytes, from its own pairs to its answers before and after."""
    folder = tmp_path / "d"
    argv = ["demo", "--model", "base", "--output_dir", str(folder)]
    argv += ["--num_pairs", "6", "--num_prompts", "3", "--num_epochs", "1", "--loss", "dpo"]
    assert main(argv) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    shown = {line.split("|")[1].split()[0] for line in printed.splitlines() if line[:1] == "|"}
    assert {"gold_reward", "perplexity_ref", "win_rate/gold", "diversity/distinct_2"} <= shown
    answers = (folder / "before_after.md").read_text()
    assert answers in printed
    assert len(re.findall(r"^- \*\*.+\*\*$", answers, re.MULTILINE)) == 10
    assert len(re.findall(r"^  - (before|dpo): ", answers, re.MULTILINE)) == 20
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert (folder / "dpo" / "adapter_model.safetensors").is_file()
    for name in ("table.md", "evaluation/table.md", "demo.json"):
        assert (folder / name).is_file(), name
    (folder / "mine.txt").write_text("keep")
    assert main(argv) == 2
    assert "mine.txt, which demo did not write" in capsys.readouterr().err
