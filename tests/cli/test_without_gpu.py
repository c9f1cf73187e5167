"""The commands under a build of torch for CUDA on a machine without a GPU, as pip installs it."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.main import main
from tokenratio.models.device import can_pin_memory, default_device

SOURCE = Path(__file__).parents[2] / "src" / "tokenratio"


@pytest.fixture
def cuda_build_without_gpu(monkeypatch):
    """What torch says there: its accelerator is CUDA, which cannot be used."""
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A policy, a reward model and pairs."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("policy", "reference")):
        tiny_model(seed=seed).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    config = tiny_model().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained("reward")
    tiny_tokenizer().save_pretrained("reward")
    rows = [
        {**row, "prompt": f"{row['prompt']} {'ash ' * i}"} for i, row in enumerate(word_pairs(4))
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.yaml").write_text(
        "{model: policy, train_dataset: pairs.jsonl, max_length: 48, max_steps: 1, beta: 0.1}"
    )
    assert main(["generate", "policy", "--prompts", "pairs.jsonl", "--max_new_tokens", "4"]) == 0


AGAINST = ["judge", "generations.jsonl", "--against", "pairs.jsonl", "--judge"]
COMMANDS = [
    ["generate", "reference", "--prompts", "pairs.jsonl", "--output", "other.jsonl"],
    [*AGAINST, "reward-model", "--model", "reward"],
    [*AGAINST, "implicit", "--policy", "policy", "--reference", "reference"],
    ["score-tokens", "pairs.jsonl", "--positive_model", "policy", "--negative_model", "reference"],
    ["evaluate", "policy", "--reference", "reference", "--pairs", "pairs.jsonl", "--split", "null"],
    ["train", "recipe.yaml", "--output_dir", "run"],
    ["train", "recipe.yaml", "--dry-run"],
    ["train-reward", "reward.yaml", "--output_dir", "run"],
]


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv[:5]))
def test_every_command_runs_on_the_cpu(argv, files, cuda_build_without_gpu, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    if argv[0] == "score-tokens":
        argv = [*argv, "--cache_dir", "cache"]
    Path("reward.yaml").write_text("{model: policy, train_dataset: pairs.jsonl, max_steps: 1}")
    code = main(argv)
    assert code == 0, capsys.readouterr().err


STAGES = """
model: policy
train_dataset: pairs.jsonl
eval_dataset: pairs.jsonl
loss: tis_dpo
max_length: 48
max_steps: 2
learning_rate: 1.0e-2
bf16: true
sft: {train_dataset: pairs.jsonl}
score_tokens: {tis_dpo: {}}
"""


@pytest.mark.slow
def test_bfloat16_needs_no_other_setting(files, cuda_build_without_gpu, monkeypatch, capsys):
    """By recipe, by flag, in every stage, resumed, of reward models: each computes in bfloat16."""
    computed = []
    linear = torch.nn.functional.linear

    def spy(input, weight, bias=None):
        found = linear(input, weight, bias)
        computed.append(found.dtype)
        return found

    def run(*argv):
        computed.clear()
        assert main(list(argv)) == 0, capsys.readouterr().err
        assert torch.bfloat16 in computed
        return capsys.readouterr().out

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    Path("stages.yaml").write_text(STAGES)
    line = "device: cpu (no GPU found); weights in float32, products in bfloat16 (bf16: true;"
    assert run("train", "stages.yaml", "--output_dir", "stages").count(line) == 4
    flags = ("train", "recipe.yaml", "--output_dir", "run", "--bf16", "--max_steps", "2")
    assert line in run(*flags, "--save_steps", "1")
    again = run(*flags, "--save_steps", "1", "--resume_from_checkpoint", "run/checkpoint-1")
    assert line in again
    assert "resumed from step 1" in again
    Path("reward.yaml").write_text("{model: policy, train_dataset: pairs.jsonl, max_steps: 1}")
    assert line in run(
        "train-reward", "reward.yaml", "--bf16", "true", "--output_dir", "reward-run"
    )
    for name in ("stages", "run", "reward-run"):
        config = json.loads(Path(name, "run.json").read_text())["config"]
        assert (config["bf16"], config["use_cpu"]) == (True, True)


@pytest.mark.parametrize(
    ("device", "is_available", "expected", "pins"),
    [
        ("cuda", False, "cpu", False),
        ("cuda", True, "cuda", True),
        ("xpu", True, "xpu", True),
        ("mps", True, "mps", False),
        (None, False, "cpu", False),
    ],
)
def test_the_accelerator_is_used_where_it_can_be(device, is_available, expected, pins, monkeypatch):
    found = None if device is None else torch.device(device)
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: found)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: is_available)
    assert default_device() == torch.device(expected)
    assert can_pin_memory() is pins


def test_nothing_else_asks_torch_for_a_device():
    """A second way to choose the device would be wrong again on some machine."""
    asks = re.compile(
        r"current_accelerator|accelerator\.(is_available|device_count|current_device)"
        r"|(cuda|mps|xpu)\.(is_available|device_count|current_device)|device\(\"(cuda|mps|xpu)"
        r"|\.cuda\(|\.to\(\"(cuda|mps|xpu)"
    )
    for path in SOURCE.rglob("*.py"):
        if path != SOURCE / "models" / "device.py":
            assert not asks.search(path.read_text(encoding="utf-8")), path
