"""Adapters by the command line: an SFT stage with one, merging, and every command that loads."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.main import main
from tokenratio.models.adapter_checks import sample_log_probs
from tokenratio.models.loading import load_model

LORA = {"r": 4, "target_modules": "all-linear"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_adapter(base, folder, *, seed):
    torch.manual_seed(seed)
    config = LoraConfig(**LORA, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return sample_log_probs(model)


@pytest.fixture
def base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def recipe(base, tmp_path):
    document = {
        "model": str(base),
        "train_dataset": write_rows(tmp_path / "pairs.jsonl", word_pairs(8)),
        "loss": "dpo",
        "learning_rate": 1e-2,
        "max_length": 32,
        "max_steps": 2,
        "use_cpu": True,
        "save_strategy": "no",
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def reloaded(folder):
    where = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(where), folder)


@pytest.mark.slow
@pytest.mark.parametrize("main_peft", [None, LORA, {"peft_type": "IA3"}])
def test_an_sft_stage_with_an_adapter_is_where_the_run_starts(main_peft, recipe, tmp_path, capsys):
    sft = {"peft": LORA, "output_dir": str(tmp_path / "sft"), "learning_rate": 1e-2}
    sft["num_train_epochs"] = 4
    argv = ["train", str(recipe), "--sft", json.dumps(sft)]
    argv += [] if main_peft is None else ["--peft", json.dumps(main_peft)]
    assert main([*argv, "--dry-run"]) == 0
    assert not (tmp_path / "sft").exists()
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'sft'} on {tmp_path / 'base'}" in printed
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["starts_from"]["adapters"] == [str(tmp_path / "sft")]
    start = sample_log_probs(reloaded(tmp_path / "sft"))
    bare = sample_log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert (start - bare).abs().max() > 1e-2
    found = sample_log_probs(load_model(run["reference"]["name"]))
    torch.testing.assert_close(found, start)
    assert (sample_log_probs(reloaded(tmp_path / "run")) - start).abs().max() > 1e-3
    # The stage is used again while its adapter's settings are the same, and only then.
    assert main([*argv, "--overwrite"]) == 0
    assert "using it" in capsys.readouterr().out
    argv[argv.index("--sft") + 1] = json.dumps(sft | {"peft": LORA | {"r": 2}})
    assert main([*argv, "--overwrite"]) == 0
    assert "using it" not in capsys.readouterr().out


def test_an_adapter_for_an_sft_stage_on_a_new_model(recipe, tmp_path):
    """The model built from a configuration is on disk only next to its adapter."""
    document = yaml.safe_load(recipe.read_text())
    del document["model"]
    config = tiny_model().config
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    document["model_config"] = {name: getattr(config, name) for name in names} | {
        "num_attention_heads": 2
    }
    document["tokenizer"] = str(tmp_path / "base")
    document["sft"] = {"peft": LORA, "output_dir": str(tmp_path / "sft")}
    recipe.write_text(yaml.safe_dump(document))
    assert main(["train", str(recipe)]) == 0
    assert (tmp_path / "sft" / "base" / "model.safetensors").is_file()
    assert reloaded(tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peft", "{init_lora_weights: pissa}"], "changes the weights under the adapter"),
        (["--peft", "{peft_type: PREFIX_TUNING, num_virtual_tokens: 2}"], "prompt learning"),
        (["--sft", "{peft: {rank: 2}}"], "peft in sft of"),
        (["--sft", "{peft: 4}"], "peft in sft of"),
        (["--model", "./gone"], "there is no such folder"),
        (["--output_dir", "ADAPTER", "--model", "ADAPTER"], "is a model that the run starts from"),
        (["--output_dir", "base", "--model", "ADAPTER"], "base is a model that the run starts"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    argv, message, base, recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_adapter(base, tmp_path / "adapter", seed=1)
    before = sorted(tmp_path.rglob("*"))
    argv = ["adapter" if word == "ADAPTER" else word for word in argv]
    assert main(["train", str(recipe), *argv]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_not_replaced_under_what_starts_from_it(base, recipe, tmp_path, capsys):
    save_adapter(base, tmp_path / "sft", seed=1)
    first = ["train", str(recipe), "--model", str(tmp_path / "sft"), "--peft", json.dumps(LORA)]
    assert main(first) == 0
    argv = ["train", str(recipe), "--model", str(tmp_path / "run" / "base"), "--overwrite"]
    assert main(argv) == 2
    assert "would remove" in capsys.readouterr().err
    assert main([*first, "--overwrite"]) == 0
    assert (tmp_path / "run" / "base" / "model.safetensors").is_file()
    assert main(["train", str(recipe), "--overwrite"]) == 0
    assert not (tmp_path / "run" / "base").exists()


# --- merge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merge_joins_an_adapter_and_its_base(dtype, base, tmp_path, capsys):
    expected = save_adapter(base, tmp_path / "adapter", seed=1)
    output = tmp_path / "whole"
    argv = ["merge", str(tmp_path / "adapter"), "--output", str(output), "--dtype", dtype]
    assert main(argv) == 0
    assert f"{tmp_path / 'adapter'} on {base}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(output)
    assert str(model.dtype) == f"torch.{dtype}"
    assert not (output / "adapter_config.json").exists()
    torch.testing.assert_close(sample_log_probs(model).float(), expected)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tiny_tokenizer().get_vocab()
    assert main(argv) == 2
    assert "already exists" in capsys.readouterr().err


def test_merge_joins_a_chain_and_several(base, tmp_path, capsys):
    """Two adapters given, or the second alone, whose base is the first: one model."""
    save_adapter(base, tmp_path / "a", seed=1)
    assert main(["merge", str(tmp_path / "a"), "--output", str(tmp_path / "a_whole")]) == 0
    expected = save_adapter(tmp_path / "a_whole", tmp_path / "b", seed=2)
    capsys.readouterr()
    both = ["merge", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*both, "--output", str(tmp_path / "ab")]) == 0
    assert "names" in capsys.readouterr().out  # b was trained on the merged folder
    path = tmp_path / "b" / "adapter_config.json"
    named = {"base_model_name_or_path": str(tmp_path / "a")}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    assert main([*both, "--output", str(tmp_path / "ab_named")]) == 0
    assert "note" not in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "b"), "--output", str(tmp_path / "chain")]) == 0
    for name in ("ab", "ab_named", "chain"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(sample_log_probs(model), expected)


def test_merging_in_half_precision_says_what_it_loses(base, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.fill_(1e-2)
    adapted.save_pretrained(tmp_path / "small")
    argv = ["merge", str(tmp_path / "small"), "--output", str(tmp_path / "whole")]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert "rounding to bfloat16 loses" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["merge"], "needs one or more adapters"),
        (["merge", "--output", "x"], "needs one or more adapters"),
        (["merge", "BASE", "--output", "x"], "is not an adapter"),
        (["merge", "ADAPTER", "BASE", "--output", "x"], "is not an adapter"),
        (["merge", "./none", "--output", "x"], "there is no such folder"),
        (["merge", "ADAPTER", "--output", "BASE"], "already exists"),
        (["merge", "ADAPTER", "--output", "x", "--dtype", "int8"], "dtype"),
        (["merge", "ADAPTER"], "needs --output"),
    ],
)
def test_merge_says_what_is_wrong(argv, message, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_adapter(base, tmp_path / "adapter", seed=1)
    names = {"BASE": "base", "ADAPTER": "adapter"}
    assert main([names.get(word, word) for word in argv]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "x").exists()


# --- every command that loads a model -------------------------------------------------------------


def test_commands_that_load_a_model_take_an_adapter(base, tmp_path, capsys):
    """An adapter and the same merged answer alike, and not as the base does."""
    save_adapter(base, tmp_path / "adapter", seed=1)
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "whole")]) == 0
    prompts = write_rows(tmp_path / "prompts.jsonl", word_pairs(4))
    printed = {}
    for name in ("adapter", "whole", "base"):
        output = tmp_path / f"{name}.jsonl"
        argv = ["generate", str(tmp_path / name), "--prompts", prompts, "--output", str(output)]
        assert main([*argv, "--max_new_tokens", "8", "--temperature", "0"]) == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        printed[name] = [line["samples"] for line in lines if "samples" in line]
        scores = ["score-tokens", prompts, "--positive_model", str(tmp_path / name)]
        scores += ["--negative_model", str(base), "--output", str(tmp_path / f"scores_{name}")]
        scores += ["--cache_dir", str(tmp_path / "cache")]
        if name == "base":
            continue
        capsys.readouterr()
        assert main(scores) == 0
        printed[name].append(
            [line for line in capsys.readouterr().out.splitlines() if "contrast" in line]
        )
    assert printed["adapter"] == printed["whole"]
    assert printed["adapter"][:-1] != printed["base"]
