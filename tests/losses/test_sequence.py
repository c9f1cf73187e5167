"""DPO against its formula and against TRL's trainer on the same model and batch."""

import copy
import math

import pytest
import torch

from tokenratio.bregman import Kliep, Logistic
from tokenratio.losses import LOSSES, Method, dpo_loss
from tokenratio.statistics import token_statistics
from tokenratio.types import PairBatch, PairStatistics


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_by_hand(beta):
    chosen, rejected = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([0.3, -2.0, 100.0, -500.0], [0.1, 1.5, -100.0, 500.0])
    )
    ours = dpo_loss(chosen, rejected, beta=beta)
    for loss, rho_w, rho_l in zip(ours.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        margin = beta * (rho_w - rho_l)
        expected = -margin if margin < -50 else math.log1p(math.exp(-margin))
        assert loss == pytest.approx(expected, rel=1e-12)


def test_dpo_sums_whole_responses_and_ignores_the_generator():
    chosen_mask = torch.tensor([[True, True, True]])
    rejected_mask = torch.tensor([[True, False, False]])
    pairs = PairStatistics(
        torch.tensor([[0.1, 0.2, 0.4]]),
        torch.tensor([[-0.3, 0.0, 0.0]]),
        torch.full((1, 3), 9.0),  # DPO has no state weight
        chosen_mask,
        rejected_mask,
    )
    for generator in (Logistic(), Kliep()):
        loss = LOSSES["dpo"].per_pair(pairs, beta=0.5, generator=generator)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * (0.7 + 0.3))), rel=1e-6)


def test_losses_is_a_plain_table():
    assert type(LOSSES) is dict
    assert {"dpo", "tbpo_a", "tbpo_q", "tbpo"} <= set(LOSSES)
    assert all(isinstance(method, Method) and method.source for method in LOSSES.values())
    needs = {name: LOSSES[name].state_weight for name in ("dpo", "tbpo_a", "tbpo_q", "tbpo")}
    assert needs == {"dpo": "none", "tbpo_a": "kl", "tbpo_q": "baseline", "tbpo": "none"}


@pytest.fixture
def trl_trainer(tmp_path):
    """TRL's DPO trainer on a tiny Llama that has moved away from its reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    reference = LlamaForCausalLM(config)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    settings = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=3,
        dataloader_pin_memory=False,
    )
    pairs = {
        "prompt": ["a b", "c d e", "f"],
        "chosen": [" g h i", " j", " a c e g"],
        "rejected": [" j", " b b h", " d d"],
    }
    dataset = Dataset.from_dict(pairs)
    return DPOTrainer(
        policy, reference, settings, train_dataset=dataset, processing_class=tokenizer
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own
def test_dpo_is_trls_dpo_on_the_same_batch(trl_trainer):
    """Loss and all parameters' gradients, from rows of which TRL finds the states itself."""
    policy, reference = trl_trainer.model, trl_trainer.ref_model
    inputs = next(iter(trl_trainer.get_train_dataloader()))
    theirs = trl_trainer.compute_loss(policy, inputs)
    expected = torch.autograd.grad(theirs, list(policy.parameters()))

    batch = PairBatch(
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["completion_mask"].bool(),
        torch.arange(3),
    )
    assert not batch.pair_mask.all()
    hidden, ref_hidden = (
        model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state[batch.states]
        for model in (policy, reference)
    )
    statistics = token_statistics(
        hidden, policy.lm_head.weight, batch.labels, ref_hidden, reference.lm_head.weight
    )
    ratios = batch.split(batch.align(statistics.log_probs - statistics.ref_log_probs))
    pairs = PairStatistics(*ratios, torch.zeros_like(ratios[0]), *batch.split(batch.response_mask))
    ours = LOSSES["dpo"].per_pair(pairs, beta=0.3, generator=Logistic()).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(ours, list(policy.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
