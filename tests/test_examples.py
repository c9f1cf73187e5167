"""The programs in examples/, run on a little of the data they are for."""

import importlib.util
from pathlib import Path

import pytest

from tokenratio.training.models import load_model

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_lora_chat(data_folder, tmp_path):
    source = data_folder / "llamafactory_dpo_en_demo" / "all.jsonl"
    lines = source.read_text(encoding="utf-8").split("\n")[:40]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("lora_chat", EXAMPLES / "lora_chat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    metrics = module.main(str(pairs), str(tmp_path / "run"))
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1
    reloaded = load_model(tmp_path / "run" / "tbpo_a")
    assert any("lora_" in name for name, _ in reloaded.named_parameters())
