"""The model card: what it says of a run, that nothing in it is markup, and what is pushed."""

import json
import logging
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers.trainer_utils import HubStrategy

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.models.reward_model import build_reward_model
from tokenratio.training.model_card import model_card, own_settings
from tokenratio.training.reward_trainer import RewardConfig, RewardTrainer

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("start")
    tiny_tokenizer().save_pretrained("start")


def settings(**changes):
    return {
        "output_dir": "run",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_length": 32,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        **changes,
    }


def trainer_of(*, model=None, peft=None, **changes):
    return TokenRatioTrainer(
        model or str(Path("start").resolve()),
        args=TokenRatioConfig(**settings(**changes)),
        train_dataset=word_pairs(8),
        peft_config=None if peft is None else LoraConfig(**peft),
        processing_class=tiny_tokenizer(),
    )


def trained(**changes):
    trainer = trainer_of(**changes)
    trainer.train()
    trainer.save_model()
    return trainer


def card(folder="run"):
    return ModelCard.load(Path(folder) / "README.md")


@pytest.mark.parametrize(
    ("loss", "peft", "source", "eprint"),
    [
        ("tbpo_a", None, "Token-level Bregman Preference Optimization", "2605.12288"),
        ("tbpo_q", LORA, "Token-level Bregman Preference Optimization", "2605.12288"),
        ("dpo", LORA, "DPO, arXiv 2305.18290, eq. 7", "2305.18290"),
        ("simpo", None, "SimPO, arXiv 2405.14734", "2405.14734"),
    ],
)
def test_a_card_says_what_the_run_was(loss, peft, source, eprint):
    trained(loss=loss, peft=peft, learning_rate=3e-4, beta=0.7)
    found, run = card(), json.loads(Path("run/run.json").read_text())
    assert found.data.library_name == ("transformers" if peft is None else "peft")
    assert found.data.pipeline_tag == "text-generation"
    assert found.data.tags == ["tokenratio", loss, *([] if peft is None else ["lora"])]
    assert found.data.base_model is None  # a folder is nothing that a hub knows
    assert source in found.text
    assert f"eprint = {{{eprint}}}" in found.text
    assert run["data"]["train"]["digest"] in found.text
    assert "| train | 8 | 8 | 0 |" in found.text
    assert ("- Reference: " in found.text) == (loss != "simpo")
    if loss != "simpo":
        assert run["reference"]["sha256"] in found.text
    prefix = "AutoModelFor" if peft is None else "AutoPeftModelFor"
    assert f'{prefix}CausalLM.from_pretrained("run")' in found.text
    given = found.text.partition("## Settings")[2].partition("##")[0]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", given, re.M))
    assert rows.pop("setting") == "value"
    assert rows == {
        "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "1",
        "learning_rate": "0.0003",
        "max_steps": "2",
        "max_length": "32",
        "beta": "0.7",
    }
    assert "## Evaluation" not in found.text
    assert str(Path.cwd()) not in found.content
    assert "Model Card for Model ID" not in found.content


def test_a_hub_name_is_the_base_model():
    run = json.loads((trained() and Path("run/run.json")).read_text())
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B"):
        run["model"] = name
        found = model_card(Path("run"), run, {})
        assert found.data.base_model == name
        assert f"Starting point: {name}\n" in found.text
    for name in ("/home/someone/private/model-7b", "../private/model-7b", "private/x/model-7b"):
        run["model"] = name
        run["reference"] |= {"name": name, "base": name}
        found = model_card(Path("run"), run, {"model_init_kwargs": {"cache_dir": name}})
        assert found.data.base_model is None
        assert "private" not in found.content
        assert "Starting point: model-7b" in found.text
        assert "frozen copy of the starting policy (model-7b)" in found.text
        assert "cache_dir model-7b" in found.text


def test_the_adapters_a_policy_starts_from_are_named():
    run = json.loads((trained(peft=LORA) and Path("run/run.json")).read_text())
    run["model"] = "/home/me/sft-adapter"
    run["starts_from"] = {"path": run["model"], "base": "org/base", "adapters": [run["model"]]}
    text = model_card(Path("run"), run, {}).text
    assert (
        "- Starting point: sft-adapter\n- Its base: org/base\n- Its adapters: sft-adapter" in text
    )


def test_evaluation_is_that_of_the_run():
    trainer = trained()
    figures = {"accuracy": 0.625, "interval": [0.3, 0.86], "num_pairs": 8, "num_ties": 2}
    document = {"eval_loss": 0.5, "eval_runtime": 3.0, "epoch": 1.0, "held_out": figures}
    Path("run/eval.json").write_text(json.dumps(document))
    trainer.create_model_card()
    text = card().text
    assert "0.625 (95 % 0.300–0.860; 8 pairs, 2 ties)" in text
    assert "| eval_loss | 0.5 |" in text
    assert "runtime" not in text
    os.utime("run/eval.json", (1, 1))  # an earlier run's
    trainer.create_model_card()
    assert "## Evaluation" not in card().text


def test_nothing_in_a_name_is_markup():
    run = json.loads((trained() and Path("run/run.json")).read_text())
    for odd in (
        "<script>alert(1)</script>",
        "![x](http://evil.example/p.png)\n# Heading",
        "a | b\n---\nlicense: mit\n`code` *bold* [link](x)",
        "```\nfence",
    ):
        run["model"] = run["reference"]["base"] = odd
        run["data"] = {odd: {"rows_read": 3, "rows_kept": 2, "digest": "d"}}
        found = model_card(Path("run"), run, {odd: odd}, model_name=odd, tags=[odd])
        prose = re.sub(r"```.*?```", "", found.text, flags=re.S)  # code is shown as it is
        assert "<script>" not in prose
        assert not re.search(r"(?<!\\)!?\[", prose)
        assert [line for line in found.text.splitlines() if line.startswith("# ")] == [
            next(line for line in found.text.splitlines() if line.startswith("# "))
        ]
        assert found.text.count("```") == 4
        header = yaml.safe_load(found.content.split("\n---\n")[0].removeprefix("---\n"))
        assert header["tags"][-1] == odd
        assert "license" not in header


@pytest.mark.parametrize("peft", [None, LORA])
def test_what_is_pushed_has_our_card(peft, monkeypatch):
    pushed = []

    class Api:
        def upload_folder(self, *, folder_path, **_):
            pushed.append((Path(folder_path) / "README.md").read_text())
            return type("Job", (), {"done": lambda self: True, "is_done": lambda self: True})()

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})()

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    trainer = trained(peft=peft, push_to_hub=True, hub_model_id="me/mine", hub_token="hf_made_up")
    trainer.push_to_hub(license="mit", tags="mine", finetuned_from="org/base")
    assert len(pushed) == 2  # saving pushes, too
    assert "hf_made_up" not in "".join(pushed)
    assert all(text.count("<!-- Written by tokenratio") == 1 for text in pushed)
    found = ModelCard(pushed[1])
    assert found.data.license == "mit"
    assert found.data.base_model == "org/base"
    assert found.data.tags[0] == "tokenratio"
    assert found.data.tags[-1] == "mine"
    assert found.text.lstrip().startswith("<!-- Written by tokenratio")
    assert "# mine\n" in found.text
    checkpoint = Path("run/checkpoint-2")
    checkpoint.mkdir()
    Path("run/README.md").unlink()
    trainer.args.hub_strategy = HubStrategy.EVERY_SAVE
    trainer._push_from_checkpoint(str(checkpoint))
    assert "<!-- Written by tokenratio" in pushed[2]


@pytest.mark.parametrize("peft", [None, LORA])
def test_a_card_of_the_users_own_stays(peft, caplog):
    Path("run").mkdir()
    Path("run/README.md").write_text("# My model\n\nDo not touch.\n")
    with caplog.at_level(logging.WARNING):
        trained(peft=peft)
    assert "Do not touch." in card().content
    assert "was not written by tokenratio" in caplog.text


def test_reward_models_and_checkpoints_have_cards():
    tokenizer = tiny_tokenizer()
    config = tiny_model().config
    trainer = RewardTrainer(
        build_reward_model(config, seed=0),
        RewardConfig(**settings(output_dir="rm")),
        word_pairs(8),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    found = card("rm")
    assert found.data.tags == ["tokenratio", "reward-model"]
    assert found.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in found.text
    trained(peft=LORA, save_strategy="steps", save_steps=2)
    assert "Written by tokenratio" in card("run/checkpoint-2").text


@pytest.mark.parametrize("loss", ["tbpo_a", "dpo", "simpo", "sepo", "sft"])
def test_defaults_are_no_settings_of_ones_own(loss):
    args = TokenRatioConfig(output_dir="x", use_cpu=True, loss=loss)
    # transformers derives disable_tqdm from its logging level, which other tests set.
    left = ("output_dir", "report_to", "use_cpu", "dataloader_pin_memory", "token_scores")
    left += ("disable_tqdm",)
    assert set(own_settings(TokenRatioConfig, args.to_dict(), leave_out=left)) <= {"loss"}
    args = TokenRatioConfig(output_dir="x", use_cpu=True, loss=loss, seed=7, hub_token="hf_secret")
    found = own_settings(TokenRatioConfig, args.to_dict(), leave_out=left)
    assert found["seed"] == 7
    assert "hf_secret" not in str(found)
