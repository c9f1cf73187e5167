"""The commands as a user runs them: what they write, and how they fail."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

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


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_default_sft_folder_is_named_by_what_it_depends_on(
    recipe, tmp_path, monkeypatch, capsys
):
    """Another seed or other data has another folder, so an adapter's base is never replaced."""
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load(recipe.read_text())
    del document["sft"]["output_dir"]
    document["sft"]["train_dataset"] = str(tmp_path / "sft.jsonl")
    (tmp_path / "sft.jsonl").write_text(json.dumps(word_pairs(1)[0]) + "\n")
    recipe.write_text(yaml.safe_dump(document))
    base = tmp_path / "runs" / "recipe"
    for number, change in enumerate(
        ([], ["--seed", "7"], ["--tokenizer", "{byte_level_bpe: 262}"])
    ):
        assert main(["train", str(recipe), "--overwrite", *change]) == 0
        assert len(list(base.glob("sft-*"))) == number + 1
    # The tokenizer is trained from the main data: new data is a new tokenizer, a new first stage.
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "zq zq zq", "chosen": "zq zq", "rejected": "bay"}) + "\n")
    assert main(["train", str(recipe), "--overwrite"]) == 0
    assert len(list(base.glob("sft-*"))) == 4
    capsys.readouterr()
    assert main(["train", str(recipe), "--overwrite"]) == 0
    assert "using it" in capsys.readouterr().out


def test_overwrite_leaves_nothing_of_the_old_run_and_everything_else(recipe, tmp_path):
    lora = ["--peft", "{r: 4, target_modules: all-linear}", "--loss", "tbpo_q"]
    assert main(["train", str(recipe), *lora]) == 0
    run = tmp_path / "run"
    assert (run / "adapter_model.safetensors").is_file()
    (run / "checkpoint-mine").mkdir()
    (run / "checkpoint-mine" / "notes.txt").write_text("keep")
    (run / "checkpoint-notes.txt").write_text("keep")
    assert main(["train", str(recipe), "--overwrite"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "state_baseline.safetensors"):
        assert not (run / name).exists(), name
    assert (run / "checkpoint-mine" / "notes.txt").is_file()
    assert (run / "checkpoint-notes.txt").is_file()


def test_a_dry_run_reads_the_configuration_where_the_model_is(recipe, tmp_path, capsys):
    """Its `model_init_kwargs` name a subfolder; a revision takes the same way."""
    tiny_model().save_pretrained(tmp_path / "models" / "sft")
    tiny_tokenizer().save_pretrained(tmp_path / "models" / "sft")
    where = ["--model", str(tmp_path / "models"), "--model_init_kwargs", "{subfolder: sft}"]
    document = {"train_dataset": str(tmp_path / "pairs.jsonl"), **QUICK}
    recipe.write_text(yaml.safe_dump(document))
    assert main(["train", str(recipe), *where, "--dry-run"]) == 0
    size = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert f"{size:,} parameters" in capsys.readouterr().out


def test_models_that_are_not_ours_are_never_written_over(recipe, tmp_path, capsys):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    document = {"model": str(model), "train_dataset": str(tmp_path / "pairs.jsonl"), **QUICK}
    recipe.write_text(yaml.safe_dump(document))
    before = tree(model)
    assert main(["train", str(recipe), "--output_dir", str(model), "--overwrite"]) == 2
    assert "model that the run starts from" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"theirs")
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / "other"), "--overwrite"]) == 2
    assert "was not written by tokenratio" in capsys.readouterr().err
    assert tree(model) == before
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == b"theirs"


def test_named_sft_folder_of_another_run_is_not_replaced(recipe, tmp_path, capsys):
    assert main(["train", str(recipe)]) == 0
    before = tree(tmp_path / "run")
    document = yaml.safe_load(recipe.read_text())
    document["sft"]["output_dir"] = str(tmp_path / "run")
    document["output_dir"] = str(tmp_path / "second")
    recipe.write_text(yaml.safe_dump(document))
    assert main(["train", str(recipe)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert tree(tmp_path / "run") == before


def test_quickstart_replaces_only_a_quickstart(recipe, tmp_path, capsys):
    assert main(["train", str(recipe)]) == 0
    before = tree(tmp_path)
    assert main(["quickstart", "--output_dir", str(tmp_path)]) == 2
    assert "quickstart did not write" in capsys.readouterr().err
    assert main(["quickstart", "--output_dir", str(tmp_path), "--loss", "tpbo_a"]) == 2
    assert "did you mean 'tbpo_a'" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_recipe_of_two_stages_runs_on_two_processes(recipe, tmp_path):
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "tokenratio.cli.main", "train", str(recipe), "--loss", "tbpo_q"),
    ]
    result = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("reward accuracy") == 1
    assert (tmp_path / "run" / "state_baseline.safetensors").is_file()


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
        (["train"], "needs one recipe: usage: tokenratio train"),
        (["train", "none.yaml"], "cannot read none.yaml"),
        (["train", "RECIPE", "--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["train", "RECIPE", "--beta", "-1"], "beta must be positive"),
        (["train", "RECIPE", "--learning_rate", "fast"], "learning_rate must be a number"),
        (["train", "RECIPE", "--train_dataset", "none.jsonl"], "none.jsonl"),
        (["train", "RECIPE", "--model", "x"], "either model or model_config"),
        (["train", "RECIPE", "--tokenizer", "{bpe: 3}"], "unknown key in tokenizer 'bpe'"),
        (["train", "RECIPE", "--tokenizer", "{byte_level_bpe: 3}"], "must be at least 259"),
        (["train", "RECIPE", "--peft", "{rank: 3}"], "recipe.yaml 'rank': use r"),
        (["train", "RECIPE", "--on_bad_row", "error"], "pairs.jsonl:13"),
        (["train", "RECIPE", "--max_length", "1"], "max_length"),
        (["train", "RECIPE", "--model_config", "{model_type: t5}"], "cannot build the model"),
        (["train", "RECIPE", "--model_config", "{model_type: llama, hidden_size: 17}"], "model"),
        (["train", "RECIPE", "--tokenizer", "{}"], "byte_level_bpe"),
        (["train", "RECIPE", "--peft", "{r: eight}"], "must be a whole number, not 'eight'"),
        (["train", "RECIPE", "--gradient_accumulation_steps", "0"], "must be at least 1"),
        (["train", "RECIPE", "--per_device_train_batch_size", "0"], "must be at least 1"),
        (["train", "RECIPE", "--report_to", "wandb"], "wandb"),
        (["train", "RECIPE", "--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["train", "RECIPE", "--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
        (["train", "RECIPE", "--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["train", "RECIPE", "--sft", "{loss: dpo}"], "cannot have loss 'dpo'"),
        (["train", "RECIPE", "--seed", "1e20"], "eed"),
        (["train", "RECIPE", "--train_dataset", "none.jsonl", "--dry-run"], "none.jsonl"),
        (["generate", "none", "--prompts", "x.jsonl", "--num_prompts", "-3"], "num_prompts"),
        (
            ["generate", "none", "--prompts", "x.jsonl", "--output", "x.jsonl"],
            "file of the prompts",
        ),
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
    shown = {line.split("|")[1].split()[0] for line in printed.splitlines() if line[:1] == "|"}
    assert {"gold_reward", "win_rate/gold", "kl_policy_ref", "pairs/accuracy"} <= shown
    for name in ("pairs.jsonl", "table.md", "tbpo_a/metrics.jsonl", "evaluation/table.md"):
        assert (tmp_path / "q" / name).is_file(), name
    (tmp_path / "q" / "mine.txt").write_text("keep")
    assert main([*argv, "--output_dir", str(tmp_path / "q")]) == 2
    assert (tmp_path / "q" / "mine.txt").is_file()


@pytest.fixture
def named_recipe(recipe, tmp_path):
    """The recipe with a model by name, and another file of settings to try."""
    document = yaml.safe_load(recipe.read_text())
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("model_config", "tokenizer"):
        del document[name]
    document["model"] = str(tmp_path / "base")

    def write(**changes):
        recipe.write_text(yaml.safe_dump({**document, **changes}))
        return str(recipe)

    return write


@pytest.mark.parametrize("command", [["--dry_run"], []], ids=["dry", "wet"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, "weights in bfloat16 cannot take"),
        ({"model_init_kwargs": {"dtype": "float16"}, "bf16": True}, "weights in float16 cannot"),
        ({"metric_for_best_model": "eval_accuracy"}, "did you mean eval_rewards/accuracies?"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "foo"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha must be unset"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "set fsdp_version: 2"),
    ],
)
def test_what_would_fail_later_is_refused_before_any_stage(
    command, settings, message, named_recipe, tmp_path, capsys
):
    assert main(["train", named_recipe(**settings), *command]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_a_recipe_for_a_gpu_is_checked_without_one(precision, named_recipe, monkeypatch, capsys):
    cpu = lambda: torch.device("cpu")  # noqa: E731
    monkeypatch.setattr("tokenratio.training.arguments.default_device", cpu)
    recipe = named_recipe(**{precision: True, "use_cpu": False})
    assert main(["train", recipe, "--dry_run"]) == 0
    assert f"{precision}: true" in capsys.readouterr().out
    if precision != "bf16":
        assert main(["train", recipe]) == 2
        assert f"{precision} needs a GPU" in capsys.readouterr().err


def test_how_the_model_is_loaded_holds_for_every_stage(named_recipe, tmp_path, capsys):
    """SFT of all weights in float32, then an adapter on them in bfloat16."""
    recipe = named_recipe(
        model_init_kwargs={"torch_dtype": "bfloat16", "attn_implementation": "eager"},
        peft={"r": 4, "target_modules": ["q_proj"]},
    )
    assert main(["train", recipe]) == 0
    capsys.readouterr()
    stages = [tmp_path / "sft" / "run.json", tmp_path / "run" / "run.json"]
    asked = [json.loads(path.read_text())["config"]["model_init_kwargs"] for path in stages]
    eager = {"attn_implementation": "eager"}
    assert asked == [eager, {**eager, "dtype": "bfloat16"}]
    weights = load_file(tmp_path / "sft" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}


@pytest.mark.parametrize("command", ["judge", "compare", "merge"])
def test_a_command_of_one_process_is_not_run_by_several(command, monkeypatch, capsys):
    """Each would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([command, "anything"]) == 2
    assert f"{command} runs in one process" in capsys.readouterr().err
