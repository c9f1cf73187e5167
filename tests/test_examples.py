"""The programs in examples/ and in the README, run on a little of the data they are for."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from templates import chat_pair
from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.data.worlds import WORLDS
from tokenratio.evaluation import PolicyMeasures
from tokenratio.models.loading import load_model
from tokenratio.run_folder import write_run_file

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_the_python_of_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    """On any machine: it asks for bfloat16."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("path/to/sft-checkpoint")
    tiny_tokenizer().save_pretrained("path/to/sft-checkpoint")
    for seed, name in enumerate(("pairs", "held_out")):
        rows = word_pairs(20, seed=seed)
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, evaluation = (compile(block, "README.md", "exec") for block in blocks)
    exec(training, {})
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert Path("runs/mine/checkpoint-2/adapter_model.safetensors").is_file()
    exec(evaluation, {})
    printed = capsys.readouterr().out
    assert "pairs/accuracy" in printed
    assert "kl_policy_ref" in printed
    assert "after Holm over" in printed


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_policy_is_evaluated_from_python(tmp_path, monkeypatch, capsys):
    """By default on the quickstart's run, whose reference is found in its record."""
    world = WORLDS["reviews"]
    monkeypatch.chdir(tmp_path)
    run, start = Path("runs/quickstart/tbpo_a"), Path("runs/quickstart/sft")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    for seed, folder in enumerate((run, start)):
        torch.manual_seed(seed)
        config = world.policy_config(**sizes, num_attention_heads=2)
        LlamaForCausalLM(config).save_pretrained(folder)
        world.build_tokenizer().save_pretrained(folder)
    write_run_file(run, config={}, model=str(start))
    capsys.readouterr()
    win_rate = example("evaluate_policy").main(num=3)
    printed = capsys.readouterr()
    assert 0 <= win_rate <= 1
    assert "kl_policy_ref: " in printed.out
    assert "win_rate/gold: " in printed.out
    assert PolicyMeasures.load("evaluation/quickstart-tbpo_a").named("gold_reward").num == 6


def test_texts_become_conversations(tmp_path, capsys):
    asked = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: sky?\n\nAssistant:"
    rows = [
        {"prompt": asked, "chosen": " Blue.", "rejected": " Green."},
        {"prompt": "Human: what is it?", "chosen": "a word", "rejected": "a name"},
        {"prompt": "sky?", "chosen": "Blue."},
        chat_pair("sky?", "blue", "green"),
    ]
    source, output = tmp_path / "pairs.jsonl", tmp_path / "new" / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert = example("chat_pairs").main
    assert convert(str(source), str(output)) == 3
    assert "3 of 4 rows; 1 of them cannot be used" in capsys.readouterr().out
    found = [json.loads(line) for line in output.read_text().splitlines()]
    turns = [("user", "hi"), ("assistant", "Hello."), ("user", "sky?")]
    assert found[0]["prompt"] == [{"role": role, "content": text} for role, text in turns]
    assert found[0]["chosen"] == [{"role": "assistant", "content": "Blue."}]
    assert found[1]["prompt"] == [{"role": "user", "content": "Human: what is it?"}]
    assert found[2] == rows[3]
    assert convert(str(source), str(output), 2) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl", "out.jsonl"], "chat_pairs: none.jsonl: no such file or folder."),
        (["none.jsonl", "out.jsonl", "-5"], "ROWS takes that many"),
    ],
)
def test_mistakes_in_making_conversations_are_named(words, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["chat_pairs.py", *words])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(EXAMPLES / "chat_pairs.py"), run_name="__main__")


@pytest.mark.slow
def test_lora_chat(data_folder, tmp_path):
    source = data_folder / "llamafactory_dpo_en_demo" / "all.jsonl"
    lines = source.read_text(encoding="utf-8").split("\n")[:20]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    metrics = example("lora_chat").main(str(pairs), str(tmp_path / "run"))
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1
    reloaded = load_model(tmp_path / "run" / "tbpo_a")
    assert any("lora_" in name for name, _ in reloaded.named_parameters())
