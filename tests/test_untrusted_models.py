"""A model, adapter, checkpoint or folder of scores is data: nothing in it is run, whatever it is.

Each payload would create a file.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import RewardConfig, TokenRatioConfig
from tokenratio.cli.main import main
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.reward_model import RewardModelJudge
from tokenratio.evaluation.suite import run_suite
from tokenratio.models.loading import load_config, load_model, load_tokenizer
from tokenratio.models.reward_model import load_reward_model
from tokenratio.training.checkpoints import MANIFEST_FILE

MARK = "PWNED"
RECIPE = {
    "model": "model",
    "train_dataset": "pairs.jsonl",
    "output_dir": "run",
    "loss": "dpo",
    "use_cpu": True,
    "max_length": 32,
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}


class Payload:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return open, (os.path.abspath(MARK), "w")


def write_zip(path):
    torch.save({"state": Payload()}, path)


def write_legacy(path):
    torch.save({"state": Payload()}, path, _use_new_zipfile_serialization=False)


def write_plain(path):
    Path(path).write_bytes(pickle.dumps(Payload()))


POISONS = [write_zip, write_legacy, write_plain]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A model, an adapter of it and pairs; afterwards no payload has run."""
    monkeypatch.chdir(tmp_path)

    def ask(*_):
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", ask)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in word_pairs(6)))
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    yield
    assert not Path(MARK).exists()


def save_adapter():
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "model"
    adapted.save_pretrained("adapter")
    tiny_tokenizer().save_pretrained("adapter")


def run(capsys, *argv, code):
    found = main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert found == code, printed.err or printed.out
    if code:
        assert printed.err.count("\n") == 1, printed.err
    return printed.err


# Every command that loads a model, given one.
ASK = ["--prompts", "pairs.jsonl", "--max_new_tokens", "3"]
COMMANDS = {
    "train": lambda name: ["train", "recipe.yaml", "--model", name],
    "reference": lambda name: ["train", "recipe.yaml", "--ref_model", name],
    "dry run": lambda name: ["train", "recipe.yaml", "--model", name, "--dry-run"],
    "reward": lambda name: ["train-reward", "reward.yaml", "--model", name],
    "generate": lambda name: ["generate", name, *ASK, "--output", "answers.jsonl"],
    "evaluate": lambda name: ["evaluate", name, *ASK, "--output_dir", "evaluation"],
    "judge": lambda name: [
        *("judge", "given.jsonl", "--against", "given.jsonl", "--output", "verdicts.jsonl"),
        *("--judge", "reward-model", "--model", name),
    ],
    "score-tokens": lambda name: [
        *("score-tokens", "pairs.jsonl", "--output", "scores", "--positive_model", name),
        *("--negative_prompt", "ash {prompt}"),
    ],
    "merge": lambda name: ["merge", name, "--output", "merged"],
    "inspect": lambda name: ["inspect-data", "pairs.jsonl", "--tokenizer", name],
}


def write_inputs():
    reward = {name: value for name, value in RECIPE.items() if name != "loss"}
    Path("reward.yaml").write_text(yaml.safe_dump(reward))
    sample = {"text": "ash", "token_ids": None, "finish_reason": "eos"}
    rows = [
        {"id": str(n), "prompt": row["prompt"], "samples": [sample], "settings": "0" * 16}
        for n, row in enumerate(word_pairs(2))
    ]
    Path("given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("write", POISONS)
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"dry run", "merge", "inspect"}))
def test_the_weights_of_a_model(command, write, capsys):
    write_inputs()
    shutil.copytree("model", "bad")
    Path("bad/model.safetensors").unlink()
    write("bad/pytorch_model.bin")
    run(capsys, *COMMANDS[command]("bad"), code=2)


@pytest.mark.parametrize("write", POISONS)
@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "score-tokens", "merge"])
def test_the_weights_of_an_adapter(command, write, capsys):
    write_inputs()
    save_adapter()
    Path("adapter/adapter_model.safetensors").unlink()
    write("adapter/adapter_model.bin")
    assert "adapter" in run(capsys, *COMMANDS[command]("adapter"), code=2)


OTHERS = [
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl"),
    *("scheduler.pt", "rng_state.pth", "scaler.pt", "model.pth", "model.pt", "data.npy"),
]


@pytest.mark.slow
def test_other_files_of_a_folder_are_not_read(capsys):
    write_inputs()
    for name in OTHERS:
        write_zip(f"model/{name}")
    for command in ("train", "generate", "score-tokens", "inspect"):
        run(capsys, *COMMANDS[command]("model"), code=0)
    for name in OTHERS:
        write_plain(f"run/{name}")
        write_plain(f"scores/{name}")
    run(capsys, *COMMANDS["generate"]("run"), "--overwrite", code=0)
    sepo = ["--loss", "sepo", "--token_scores", "scores", "--output_dir", "sepo"]
    run(capsys, "train", "recipe.yaml", *sepo, code=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two checkpoints, whose paths are relative to the folder that it is copied into."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_model().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in word_pairs(6)))
        Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "loss": "tbpo_q"}))
        assert main(["train", "recipe.yaml", "--baseline_hidden_size", "8"]) == 0
    return folder


STATES = [
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"),
    *("state_baseline.safetensors", "state_baseline_optimizer.safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_the_state_of_a_checkpoint(name, has_manifest, trained, capsys):
    """It may be refused, or the checkpoint before be taken; it is not unpickled.

    A manifest finds the change; a checkpoint from elsewhere may have none.
    """
    for write in POISONS:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(trained / "run", "run")
        Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "loss": "tbpo_q"}))
        assert Path("run/checkpoint-1", name).is_file()
        for checkpoint in ("run/checkpoint-1", "run/checkpoint-2"):
            write(f"{checkpoint}/{name}")
            if not has_manifest:
                Path(checkpoint, MANIFEST_FILE).unlink()
        settings = ["--baseline_hidden_size", "8", "--max_steps", "3"]
        main(["train", "recipe.yaml", *settings, "--resume_from_checkpoint", "run/checkpoint-1"])
        main(["train", "recipe.yaml", *settings, "--resume_from_checkpoint", "true"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert not Path(MARK).exists()


# Code that comes with a model.

CODE = f"""open({MARK!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
class EvilConfig(LlamaConfig):
    model_type = "evil"
class Evil(LlamaForCausalLM):
    config_class = EvilConfig
class EvilReward(LlamaForSequenceClassification):
    config_class = EvilConfig
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoModelForSequenceClassification": "evil.EvilReward",
}


def save_with_code(folder, **changes):
    shutil.copytree("model", folder)
    Path(folder, "evil.py").write_text(CODE)
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP, **changes}))


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"inspect", "merge"}))
def test_a_model_that_needs_code_is_refused_in_one_line(command, capsys):
    write_inputs()
    save_with_code("code", model_type="evil")
    error = run(capsys, *COMMANDS[command]("code"), code=2)
    assert "a model must contain only data" in error
    assert "code" in error


@pytest.mark.slow
def test_code_that_is_not_needed_is_not_run(capsys):
    """transformers has the architecture itself."""
    write_inputs()
    save_with_code("code")
    for name in ("train", "generate", "score-tokens", "inspect"):
        run(capsys, *COMMANDS[name]("code"), code=0)
    assert load_config("code").model_type == "llama"


def test_a_tokenizer_that_needs_code_is_refused():
    shutil.copytree("model", "code")
    Path("code/evil.py").write_text(f"open({MARK!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    Path("code/tokenizer_config.json").write_text(json.dumps(config))
    Path("code/config.json").unlink()
    with pytest.raises(TokenRatioError, match="a model must contain only data"):
        load_tokenizer("code")


UNSAFE = [{"trust_remote_code": True}, {"weights_only": False}, {"allow_all_kernels": True}]


@pytest.mark.parametrize("given", UNSAFE, ids=str)
def test_nobody_can_ask_for_code(given, capsys):
    """In a recipe, its sections, flags, Python: refused, with the reason."""
    (name,) = given
    refused = f"{name} in .* must stay .*: a model must contain only data"
    for config in (TokenRatioConfig, RewardConfig):
        with pytest.raises(TokenRatioError, match=refused):
            config(output_dir="x", use_cpu=True, model_init_kwargs=given)
    for load in (
        lambda: load_model("model", given),
        lambda: load_reward_model("model", seed=0, init_kwargs=given),
        lambda: RewardModelJudge.load("model", given, tokenizer=tiny_tokenizer()),
        lambda: run_suite("model", "task.yaml", init_kwargs=given),
    ):
        with pytest.raises(TokenRatioError, match=refused):
            load()
    flags = ["--model_init_kwargs", json.dumps(given)]
    assert "only data" in run(capsys, "train", "recipe.yaml", *flags, code=2)
    recipe = {**RECIPE, "sft": {"model_init_kwargs": given}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "only data" in run(capsys, "train", "recipe.yaml", code=2)


def test_the_usual_place_for_trust_remote_code_says_why(capsys):
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "trust_remote_code": True}))
    assert "only data" in run(capsys, "train", "recipe.yaml", code=2)


def test_a_script_in_a_folder_of_data_is_not_run(capsys):
    Path("data").mkdir()
    shutil.copy("pairs.jsonl", "data/train.jsonl")
    for name in ("data.py", "dataset.py", "__init__.py"):
        Path("data", name).write_text(f"open({MARK!r}, 'w')\n")
    run(capsys, "inspect-data", "data", "--tokenizer", "model", code=0)
