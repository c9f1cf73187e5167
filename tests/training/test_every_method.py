"""Every method end to end on the review world: ten steps, whole models and adapters."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.data import padding_id, prepare_pairs
from tokenratio.data.worlds import WORLDS, world_rows
from tokenratio.losses import METHODS
from tokenratio.training.reference_cache import CacheSettings
from tokenratio.training.token_contrast import ContrastSide, compute_contrast

WORLD = WORLDS["reviews"]
LENGTH = 64


def policy(seed=0):
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        WORLD.policy_config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
    )


@pytest.fixture(scope="module")
def tokenizer():
    return WORLD.build_tokenizer()


@pytest.fixture(scope="module")
def pairs():
    return {name: world_rows(f"world:reviews?pairs={n}&split={name}") for name, n in SIZES.items()}


SIZES = {"train": 40, "test": 12}


@pytest.fixture(scope="module")
def scores(pairs, tokenizer, tmp_path_factory):
    """Contrasts of two models for all rows, in a folder."""
    folder = tmp_path_factory.mktemp("scores")
    joined = None
    for rows in pairs.values():
        data = prepare_pairs(rows, tokenizer, max_length=LENGTH, max_prompt_length=None)
        new = compute_contrast(
            data,
            ContrastSide(policy(1), data, "{prompt}"),
            ContrastSide(policy(2), data, "{prompt}"),
            CacheSettings(
                root=folder / "cache",
                batch_size=8,
                device=torch.device("cpu"),
                padding_id=padding_id(tokenizer),
                progress=False,
            ),
        )
        joined = new if joined is None else joined.joined(new)
    joined.save(folder / "scores")
    return folder / "scores"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss", METHODS)
def test_ten_steps(loss, adapter, pairs, tokenizer, scores, tmp_path):
    args = TokenRatioConfig(
        output_dir=str(tmp_path),
        loss=loss,
        token_scores=str(scores),
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        max_length=LENGTH,
        max_steps=10,
        learning_rate=1e-3,
        warmup_steps=0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        baseline_hidden_size=8,
    )
    model = policy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = TokenRatioTrainer(
        model,
        args=args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
    )
    assert (trainer.reference is not None) == METHODS[loss].has_reference
    trainer.train()
    trainer.save_model()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 10
    for line in steps:
        assert all(torch.tensor(float(line[name])).isfinite() for name in ("loss", "grad_norm"))
        assert line["grad_norm"] > 0
        if loss != "sft":
            margin = line["rewards/chosen"] - line["rewards/rejected"]
            assert line["rewards/margins"] == pytest.approx(margin, abs=1e-4)
        assert ("kl_ref_policy" in line) == ("kl_ref_policy" in METHODS[loss].needs)
        assert ("log_ratio/mean" in line) == METHODS[loss].has_reference
    metrics = trainer.evaluate()
    assert ("eval_kl_ref_policy" in metrics) == METHODS[loss].has_reference
    if adapter:
        assert any("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    else:
        after = load_file(tmp_path / "model.safetensors")
        assert any((before[name] != value).any() for name, value in after.items())


@pytest.mark.slow
def test_the_space_of_ratio_matching_trains_at_every_point(pairs, tokenizer, tmp_path):
    for weight in ("none", "kl", "baseline"):
        for aggregation in ("mean", "sum", "sequence"):
            for generator in ("logistic", "sba"):
                args = TokenRatioConfig(
                    output_dir=str(tmp_path / f"{weight}-{aggregation}-{generator}"),
                    loss="tbpo",
                    state_weight=weight,
                    aggregation=aggregation,
                    generator=generator,
                    label_smoothing=0.1,
                    sft_weight=0.1 if aggregation == "sum" else 0.0,
                    use_cpu=True,
                    disable_tqdm=True,
                    save_strategy="no",
                    max_length=LENGTH,
                    max_steps=2,
                    learning_rate=1e-3,
                    per_device_train_batch_size=4,
                    baseline_hidden_size=8,
                )
                trainer = TokenRatioTrainer(
                    policy(), args=args, train_dataset=pairs["train"], processing_class=tokenizer
                )
                assert (trainer.baseline is not None) == (weight == "baseline")
                trainer.train()
                losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
                assert len(losses) == 2
                assert torch.tensor(losses).isfinite().all()
