"""The trainer end to end on tiny models: losses, accumulation, metrics, guards, what it writes."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file

from tiny import tiny_model, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.models.token_requests import TokenRequest
from tokenratio.statistics import head
from tokenratio.training.checkpoints import last_checkpoint
from tokenratio.training.forward import Forward
from tokenratio.types import PairBatch

LOSSES = ("tbpo_a", "tbpo_q", "tbpo", "dpo")


def settings(folder, **overrides):
    return TokenRatioConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_length": 32,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "baseline_hidden_size": 16,
            **overrides,
        }
    )


def make(
    folder,
    tokenizer,
    *,
    rows=None,
    eval_rows=None,
    model=None,
    peft_config=None,
    ref_model=None,
    **overrides,
):
    return TokenRatioTrainer(
        tiny_model() if model is None else model,
        ref_model=ref_model,
        args=settings(folder, **overrides),
        train_dataset=word_pairs(8) if rows is None else rows,
        eval_dataset=word_pairs(7, seed=1) if eval_rows is None else eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def response_log_probs(model, prompt, response):
    """Log-distribution at every state of the response, from whole logits of one row."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_methods_by_hand(loss, tmp_path, tokenizer):
    """Whole logits, one row at a time, in a loop, at β ≠ 1 and away from the reference."""
    trainer = make(tmp_path, tokenizer, loss=loss, beta=0.3, model=tiny_model().double())
    reference = trainer.reference.model
    policy = trainer.model
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if trainer.baseline is not None:
        trainer.baseline.double()
        for parameter in trainer.baseline.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    policy.eval()
    got = trainer.compute_loss(policy, batch)

    expected = []
    for row in rows:
        sides = {}
        for side in ("chosen", "rejected"):
            prompt, response = row["prompt_ids"], row[f"{side}_ids"]
            log_p = response_log_probs(policy, prompt, response)
            log_q = response_log_probs(reference, prompt, response)
            index = torch.tensor(response)[:, None]
            ratio = (log_p - log_q).gather(-1, index).squeeze(-1)
            state = torch.zeros_like(ratio)
            if loss == "tbpo_a":
                state = (log_q.exp() * (log_q - log_p)).sum(-1)
            if loss == "tbpo_q":
                ids = torch.tensor([prompt + response])
                hidden = policy.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
                state = trainer.baseline.layers(hidden).squeeze(-1)
            sides[side] = (ratio, state)
        (ratio_w, state_w), (ratio_l, state_l) = sides["chosen"], sides["rejected"]
        if loss == "dpo":
            expected.append(F.softplus(0.3 * (ratio_l.sum() - ratio_w.sum())))
            continue
        per_token = []
        for t in range(min(len(ratio_w), len(ratio_l))):
            log_r = 0.3 * (ratio_l[t] - ratio_w[t] + state_l[t] - state_w[t])
            per_token.append((log_r.exp() + log_r) / 4)
        expected.append(torch.stack(per_token).mean())
    torch.testing.assert_close(got, torch.stack(expected).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*LOSSES, "sft"])
def test_training_moves_weights_and_separates_pairs(loss, tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, loss=loss, num_train_epochs=20, learning_rate=2e-3)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any((before[k] != v).any() for k, v in trainer.model.state_dict().items())
    first, last = metrics_of(tmp_path)[0], metrics_of(tmp_path)[-1]
    assert last["loss"] < first["loss"]
    if loss != "sft":
        assert first["rewards/margins"] == 0
        assert last["rewards/margins"] > 0
        assert last["rewards/accuracies"] > 0.5
    if loss == "tbpo_a":
        assert last["kl_ref_policy"] > 0
    if loss == "tbpo_q":
        assert last["state_weight/std"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q", "sft"])
def test_accumulation_does_not_change_a_step(loss, tmp_path, tokenizer):
    """1 × N = N × 1, also when the last batch is smaller (8 pairs in batches of 3)."""

    def run(batch, steps):
        folder = tmp_path / f"{batch}x{steps}"
        trainer = make(
            folder,
            tokenizer,
            loss=loss,
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=3,
        )
        trainer.train()
        assert trainer.state.global_step == 3
        return trainer.model.state_dict(), metrics_of(folder)

    weights, metrics = run(8, 1)
    for sizes in ((4, 2), (3, 3), (1, 8)):
        other_weights, other_metrics = run(*sizes)
        for name, value in weights.items():
            torch.testing.assert_close(value, other_weights[name], rtol=1e-4, atol=1e-5)
        for one, other in zip(metrics, other_metrics, strict=True):
            for name in one.keys() - {"tokens_per_second"}:
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_evaluation_does_not_depend_on_batches(batch, tmp_path, tokenizer):
    trainer = make(tmp_path / "a", tokenizer, num_train_epochs=5, per_device_eval_batch_size=batch)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 100
    for name, value in trainer.evaluate().items():
        if not any(part in name for part in ("runtime", "per_second")):
            assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_swapping_the_sides_mirrors_the_metrics(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, loss="dpo", num_train_epochs=5)
    trainer.train()
    pairs = word_pairs(7, seed=1)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    other = make(tmp_path / "b", tokenizer, loss="dpo", model=trainer.model, rows=swapped)
    other.forward.reference = trainer.reference
    one = trainer.evaluate()
    other.eval_dataset = other.train_dataset
    two = other.evaluate()
    assert one["eval_rewards/chosen"] == pytest.approx(two["eval_rewards/rejected"])
    assert one["eval_logps/chosen"] == pytest.approx(two["eval_logps/rejected"])
    assert one["eval_rewards/margins"] == pytest.approx(-two["eval_rewards/margins"])
    assert one["eval_rewards/accuracies"] == pytest.approx(1 - two["eval_rewards/accuracies"])


def test_metrics_by_hand(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, beta=0.3, num_train_epochs=4)
    trainer.train()
    metrics = trainer.evaluate()
    rewards = {"chosen": [], "rejected": []}
    log_ratios, past, tokens = [], 0, 0
    for row in trainer.eval_dataset:
        for side, values in rewards.items():
            prompt, response = row["prompt_ids"], row[f"{side}_ids"]
            log_p = response_log_probs(trainer.model, prompt, response)
            log_q = response_log_probs(trainer.reference.model, prompt, response)
            index = torch.tensor(response)[:, None]
            ratio = (log_p - log_q).gather(-1, index).squeeze(-1)
            values.append(0.3 * ratio.sum().item())
            log_ratios += ratio.tolist()
        lengths = len(row["chosen_ids"]), len(row["rejected_ids"])
        past += max(lengths) - min(lengths)
        tokens += sum(lengths)
    margins = [w - r for w, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    expected = {
        "rewards/chosen": sum(rewards["chosen"]) / 7,
        "rewards/rejected": sum(rewards["rejected"]) / 7,
        "rewards/margins": sum(margins) / 7,
        "rewards/accuracies": sum(m > 0 for m in margins) / 7,
        "log_ratio/mean": sum(log_ratios) / tokens,
        "log_ratio/max_abs": max(map(abs, log_ratios)),
        "tokens/past_shorter": past / tokens,
    }
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_trains_and_its_reference_is_the_base(checkpointing, tmp_path, tokenizer):
    model = tiny_model()
    base = copy.deepcopy(model.state_dict())
    trainer = make(
        tmp_path,
        tokenizer,
        model=model,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        num_train_epochs=10,
        learning_rate=1e-2,
        activation_checkpointing=checkpointing,
    )
    trainer.train()
    lines = metrics_of(tmp_path)
    assert lines[0]["log_ratio/max_abs"] == 0
    assert lines[-1]["rewards/margins"] > 0
    for name, value in trainer.model.get_base_model().state_dict().items():
        plain = name.replace("base_layer.", "")
        if plain in base:
            assert torch.equal(value, base[plain]), name


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer):
    weights = []
    for flag in (False, True):
        trainer = make(tmp_path / str(flag), tokenizer, activation_checkpointing=flag, max_steps=2)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name])


def test_bf16_autocast_keeps_statistics_in_float32_and_starts_at_zero(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, bf16=True, max_steps=2)
    trainer.train()
    assert metrics_of(tmp_path)[0]["log_ratio/max_abs"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cpu_that_multiplies_bfloat16_trains_lora_as_others_do(
    loss, tmp_path, tokenizer, monkeypatch
):
    """Rounded products change a little, and nothing where policy and reference agree."""
    lines, settings = [], {"bf16": True, "loss": loss, "optim": "sgd", "learning_rate": 0.1}
    for is_fast in (False, True):
        monkeypatch.setattr(head, "multiplies_bfloat16", lambda device, answer=is_fast: answer)
        folder = tmp_path / str(is_fast)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        make(folder, tokenizer, peft_config=lora, max_steps=2, **settings).train()
        lines.append(metrics_of(folder))
    for line in lines:
        assert line[0]["log_ratio/max_abs"] == 0
    plain, fast = (line[1] for line in lines)
    assert 0 < plain["log_ratio/max_abs"] != fast["log_ratio/max_abs"]
    assert fast["log_ratio/max_abs"] == pytest.approx(plain["log_ratio/max_abs"], rel=0.03)
    assert fast["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.03)


def test_wrong_reference_is_noticed_before_the_first_update(tmp_path, tokenizer):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer = make(tmp_path, tokenizer, model=model, ref_model=tiny_model(seed=1))
    with pytest.raises(TokenRatioError, match="differ before the first update"):
        trainer.train()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    make(
        tmp_path, tokenizer, ref_model=tiny_model(seed=1), check_reference=False, max_steps=1
    ).train()


def test_reference_in_another_dtype_is_noticed(tmp_path, tokenizer):
    model = tiny_model()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.raises(TokenRatioError, match="differ before the first update"):
        make(tmp_path, tokenizer, model=model, ref_model=rounded).train()


def test_adapter_that_does_not_start_at_zero_is_noticed(tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    trainer = make(tmp_path, tokenizer, peft_config=lora)
    with pytest.raises(TokenRatioError, match="adapter that does not start at zero"):
        trainer.train()


def test_policy_as_its_own_reference_is_refused(tmp_path, tokenizer):
    model = tiny_model()
    with pytest.raises(TokenRatioError, match="ref_model shares its weights"):
        make(tmp_path, tokenizer, model=model, ref_model=model)


@pytest.mark.parametrize(
    "lora",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": [4, 5]},
        {"trainable_token_indices": {"lm_head": [4], "embed_tokens": [4]}},
    ],
)
def test_adapter_that_stays_on_in_the_reference_is_refused(lora, tmp_path, tokenizer):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **lora)
    with pytest.raises(TokenRatioError, match=r"reference would move|lm_head"):
        make(tmp_path, tokenizer, model=tiny_model("qwen2"), peft_config=config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head", "norm"]}]
)
def test_reference_of_an_adapter_does_not_move(extra, tmp_path, tokenizer):
    lora = LoraConfig(r=4, target_modules="all-linear", **extra)
    trainer = make(tmp_path, tokenizer, peft_config=lora, num_train_epochs=5, learning_rate=1e-2)
    untouched = make(tmp_path, tokenizer).model
    digest = trainer.reference.identity(trainer.model)["sha256"]
    trainer.train()
    batch = PairBatch(**trainer.data_collator(list(trainer.train_dataset)))
    request = TokenRequest(batch.states, batch.labels)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = untouched(**inputs, token_request=request)["log_probs"]
        hidden = trainer.reference.hidden(batch, trainer.model, trainer.forward.adapters)
        request = TokenRequest(batch.states, batch.labels, hidden)
        answer = trainer.model(**inputs, token_request=request)
    torch.testing.assert_close(answer["ref_log_probs"], expected)
    assert (answer["log_probs"] - expected).abs().max() > 0.1
    assert trainer.reference.identity(trainer.model)["sha256"] == digest


def test_evaluation_reports_the_kl_of_every_method(tmp_path, tokenizer):
    """In training only a method that needs it pays for it."""
    for loss in ("tbpo", "dpo", "tbpo_q", "tbpo_a"):
        trainer = make(tmp_path / loss, tokenizer, loss=loss, max_steps=2)
        trainer.train()
        assert ("kl_ref_policy" in metrics_of(tmp_path / loss)[-1]) == (loss == "tbpo_a")
        assert trainer.evaluate()["eval_kl_ref_policy"] > 0


def test_evaluation_takes_any_source(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    one = trainer.evaluate()
    two = trainer.evaluate(word_pairs(7, seed=1))
    assert one["eval_logps/chosen"] == two["eval_logps/chosen"]
    parts = {"a": word_pairs(3, seed=1), "train": word_pairs(4, seed=2)}
    three = trainer.evaluate(parts)
    assert {"eval_a_loss", "eval_train_loss"} <= three.keys()


def test_identity_keeps_training_and_evaluation_data_apart(tmp_path, tokenizer):
    trainer = TokenRatioTrainer(
        tiny_model(),
        args=settings(tmp_path, max_steps=1, model_init_kwargs={"token": "hf_secret", "a": 1}),
        train_dataset=word_pairs(8),
        eval_dataset={"train": word_pairs(3, seed=1)},
        processing_class=tokenizer,
    )
    trainer.train()
    text = (tmp_path / "run.json").read_text()
    assert "hf_secret" not in text
    data = json.loads(text)["data"]
    assert data["train"]["digest"] == trainer.train_data.digest
    assert data["eval train"]["digest"] == trainer.eval_data["train"].digest


def test_rows_that_the_model_cannot_take_are_refused(tmp_path, tokenizer):
    with pytest.raises(TokenRatioError, match="embeddings"):
        make(tmp_path, tokenizer, model=tiny_model(vocab_size=10))
    with pytest.raises(TokenRatioError, match="set max_length to 8"):
        make(tmp_path, tokenizer, model=tiny_model("gpt2", max_position_embeddings=8))
    with pytest.raises(TokenRatioError, match="ref_model 20"):
        make(tmp_path, tokenizer, ref_model=tiny_model(vocab_size=20))


def test_prompt_learning_is_refused(tmp_path, tokenizer):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(TokenRatioError, match="prompt learning"):
        make(tmp_path, tokenizer, peft_config=config)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q", "tbpo", "dpo"])
def test_cached_reference_changes_nothing(loss, adapter, tmp_path, tokenizer, caplog):
    """The same run to rounding; what is kept is used, and used again."""
    runs = {}
    for name, cached in (("live", False), ("first", True), ("again", True)):
        trainer = make(
            tmp_path / name,
            tokenizer,
            loss=loss,
            num_train_epochs=2,
            cache_reference=cached,
            reference_cache_dir=str(tmp_path / "cache"),
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )
        calls = []
        if cached:
            original = trainer.reference.hidden
            trainer.reference.hidden = lambda *a, f=original, c=calls: c.append(1) or f(*a)
        trainer.train()
        assert not calls
        assert ("once" in caplog.text) == (name == "first")
        caplog.clear()
        runs[name] = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
        runs[name] |= {k: v for k, v in trainer.evaluate().items() if "rewards" in k}
    for name, value in runs["live"].items():
        torch.testing.assert_close(runs["first"][name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(runs["again"][name], runs["first"][name], rtol=0, atol=0)


def test_settings_of_the_engine_are_checked(tmp_path, tokenizer, caplog):
    with pytest.raises(TokenRatioError, match="share_prompt must be one of auto, always, never"):
        make(tmp_path, tokenizer, share_prompt="often")
    with pytest.raises(TokenRatioError, match="cache_reference must be false: sft"):
        make(tmp_path, tokenizer, loss="sft", cache_reference=True)
    with pytest.raises(TokenRatioError, match="train_sampling_strategy must be"):
        make(tmp_path, tokenizer, train_sampling_strategy="batch_rebalance")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model(rope_parameters=dynamic)
    make(tmp_path, tokenizer, model=model)
    assert "once for each response: rotary" in caplog.text
    with pytest.raises(TokenRatioError, match="share_prompt: always, but rotary"):
        make(tmp_path, tokenizer, model=model, share_prompt="always")
    scaled = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(TokenRatioError, match="share_prompt: always, but adapters of type IA3"):
        make(tmp_path, tokenizer, peft_config=scaled, share_prompt="always")
    with pytest.raises(TokenRatioError, match="dpo needs whole responses"):
        make(tmp_path, tokenizer, loss="dpo", share_prompt="always")


@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q"])
def test_cached_reference_in_bfloat16_is_still_the_starting_policy(loss, tmp_path, tokenizer):
    """It ran in other batches, and rounds otherwise: that is no other checkpoint."""
    settings = {"loss": loss, "max_steps": 1, "reference_cache_dir": str(tmp_path / "cache")}
    make(tmp_path, tokenizer, cache_reference=True, bf16=True, **settings).train()
    other = {"cache_reference": True, "ref_model": tiny_model(seed=1)}
    with pytest.raises(TokenRatioError, match=r"differ before the first update.*on average"):
        make(tmp_path / "other", tokenizer, **settings, **other).train()


def test_cached_reference_belongs_to_its_run(tmp_path, tokenizer):
    cached = {
        "loss": "dpo",
        "cache_reference": True,
        "reference_cache_dir": str(tmp_path / "cache"),
        "max_steps": 1,
    }
    parts = {"a": word_pairs(3, seed=1), "b": word_pairs(4, seed=2)}
    first = make(tmp_path / "first", tokenizer, eval_rows=parts, **cached)
    first.train()
    assert {"eval_a_loss", "eval_b_loss"} <= first.evaluate().keys()
    assert "chosen_ref_log_probs" in first.train_data.dataset.column_names
    with pytest.raises(TokenRatioError, match="evaluate on the source itself"):
        first.evaluate(first.eval_data["a"].dataset)
    again = make(tmp_path / "again", tokenizer, rows=first.train_data, loss="dpo", max_steps=1)
    assert "chosen_ref_log_probs" not in again.train_data.dataset.column_names
    again.train()


@pytest.mark.parametrize("loss", ["tbpo_a", "dpo"])
def test_selected_rows_are_asked_about_by_their_own_number(loss, tmp_path, tokenizer):
    whole = make(tmp_path / "whole", tokenizer).train_data
    some = dataclasses.replace(whole, dataset=whole.dataset.select([6, 1, 4]))
    runs = []
    for cached in (False, True):
        trainer = make(
            tmp_path / str(cached),
            tokenizer,
            rows=some,
            loss=loss,
            max_steps=3,
            cache_reference=cached,
            reference_cache_dir=str(tmp_path / "cache"),
        )
        trainer.train()
        runs.append(dict(trainer.model.named_parameters()))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "random", "sequential", "group_by_length"])
def test_every_order_of_rows_trains_and_evaluates(strategy, tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, train_sampling_strategy=strategy, max_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_short_rows_do_not_weigh_more_in_sft(tmp_path, tokenizer):
    """SFT's mean over a batch's tokens is fair over random batches, not over batches of a kind."""
    kinds = {}
    for loss in ("sft", "tbpo_a", "dpo"):
        trainer = make(tmp_path / loss, tokenizer, loss=loss)
        kinds[loss] = type(trainer._get_train_sampler()).__name__
    grouped = "LengthGroupedSampler"
    assert kinds == {"sft": "RandomSampler", "tbpo_a": grouped, "dpo": grouped}


def test_non_finite_loss_names_the_rows_and_spares_the_checkpoint(tmp_path, tokenizer):
    rows = word_pairs(8)
    trainer = make(tmp_path, tokenizer, rows=rows, save_strategy="steps", save_steps=1, max_steps=6)

    class Poisoned(Forward):
        def __call__(self, *arguments):
            examples = super().__call__(*arguments)
            if trainer.state.global_step == 3:
                with torch.no_grad():
                    examples.loss[1] = math.nan
            return examples

    trainer.forward.__class__ = Poisoned
    with pytest.raises(TokenRatioError, match=r"loss is not finite at step 4 \(train_dataset:\d\)"):
        trainer.train()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-3"
    weights = load_file(checkpoint / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    resumed = make(tmp_path, tokenizer, rows=rows, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_non_finite_gradient_stops_before_the_update(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=2)
    weight = trainer.model.model.norm.weight
    weight.register_hook(lambda grad: grad * math.inf)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(TokenRatioError, match="gradient is not finite at step 1"):
        trainer.train()
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_run_folder_says_what_ran(tmp_path, tokenizer):
    rows = [*word_pairs(8), {"prompt": "ash", "chosen": " ", "rejected": "bay"}]
    trainer = make(tmp_path, tokenizer, rows=rows, loss="tbpo_q", max_steps=2)
    trainer.train()
    trainer.save_model()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["loss"] == "tbpo_q"
    assert torch.__version__.startswith(run["versions"]["torch"])
    assert len(run["reference"]["sha256"]) == 64
    assert run["reference"]["kind"] == "copy"
    assert run["data"]["train"]["digest"] == trainer.train_data.digest
    assert "8" in json.dumps(run["data"]["train"])
    assert (tmp_path / "state_baseline.safetensors").is_file()
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss", "grad_norm", "tokens_per_second", "state_weight/std"} <= lines[0].keys()


def test_a_name_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(TokenRatioError, match="cannot load"):
        TokenRatioTrainer(tmp_path / "nothing", args=settings(tmp_path), train_dataset=[])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss", "tbpo_z", "unknown loss 'tbpo_z'; did you mean"),
        ("beta", 0.0, "beta must be positive"),
        ("beta", math.nan, "beta must be positive"),
        ("generator", "sbaa", "did you mean .sba."),
        ("generator_lambda", -1.0, "lambda must be greater than -1"),
        ("generator_scale", 0.0, "scale must be positive"),
        ("baseline_clamp", -1.0, "baseline_clamp must be positive"),
        ("on_bad_row", "ignore", "on_bad_row"),
        ("max_length", 0, "max_length must be at least 1"),
        ("max_prompt_length", 32, "room for a response"),
        ("remove_unused_columns", True, "remove_unused_columns"),
    ],
)
def test_settings_outside_their_domain_are_refused(field, value, message, tmp_path):
    with pytest.raises(TokenRatioError, match=message):
        settings(tmp_path, **{field: value})


def test_settings_that_would_have_no_effect_are_refused(tmp_path):
    with pytest.raises(TokenRatioError, match="takes no generator_lambda"):
        settings(tmp_path, generator="logistic", generator_lambda=0.5)
    with pytest.raises(TokenRatioError, match="takes no generator_scale"):
        settings(tmp_path, generator="ba", generator_scale=2.0)


def test_published_settings_are_the_defaults(tmp_path):
    args = TokenRatioConfig(output_dir=str(tmp_path))
    assert (args.loss, args.beta, args.generator) == ("tbpo_a", 0.1, "sba")
    assert (args.generator_lambda, args.generator_scale) == (0.0, 4.0)
    assert (args.optim, args.learning_rate, args.max_grad_norm) == ("rmsprop", 5e-7, 10.0)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("cosine", 0.05)
    assert (args.num_train_epochs, args.max_length) == (1.0, 2048)
    assert (args.baseline_hidden_size, args.baseline_learning_rate) == (1024, 1e-3)
    assert (args.center_baseline, args.baseline_clamp) == (False, 10.0)
    assert args.report_to in ("none", [])
