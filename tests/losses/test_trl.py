"""Losses that other libraries have, against them: values and the gradients of all parameters.

TRL's trainers and transformers' model find states, masks and labels by themselves.
"""

import copy

import pytest
import torch

from tokenratio.losses import METHODS, anchor_loss
from tokenratio.statistics import token_statistics
from tokenratio.types import CompletionBatch, PairBatch, PairStatistics, ResponseStatistics

# TRL's and transformers' own warnings.
pytestmark = pytest.mark.filterwarnings("ignore")
BETA = 0.3
PAIRS = {
    "prompt": ["a b", "c d e", "f"],
    "chosen": [" g h i", " j", " a c e g"],
    "rejected": [" j", " b b h", " d d"],
}


def make_models():
    """A tiny Llama and its reference, from which it has moved away."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
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
    return policy, reference


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_trainer(tmp_path, trainer, config, pairs=PAIRS, **settings):
    """One of TRL's trainers on that model and its reference, and a batch of all pairs."""
    from datasets import Dataset

    policy, reference = make_models()
    args = config(
        output_dir=str(tmp_path),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=len(pairs["prompt"]),
        dataloader_pin_memory=False,
        **settings,
    )
    models = (policy, reference) if "DPO" in trainer.__name__ else (policy,)
    made = trainer(
        *models,
        args=args,
        train_dataset=Dataset.from_dict(pairs),
        processing_class=make_tokenizer(),
    )
    made.reference = reference
    return made, next(iter(made.get_train_dataloader()))


def make_statistics(batch, policy, reference):
    """Of a batch of pairs through the library, from the last hidden states."""
    hidden, ref_hidden = (
        model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state[batch.states]
        for model in (policy, reference)
    )
    of_tokens = token_statistics(
        hidden, policy.lm_head.weight, batch.labels, ref_hidden, reference.lm_head.weight
    )
    sides = zip(
        batch.split(batch.align(of_tokens.log_probs)),
        batch.split(batch.response_mask),
        batch.split(batch.align(of_tokens.ref_log_probs)),
        strict=True,
    )
    return PairStatistics(*(ResponseStatistics(*side) for side in sides))


def assert_same(ours, theirs, policy):
    parameters = list(policy.parameters())
    expected = torch.autograd.grad(theirs, parameters)
    found = torch.autograd.grad(ours, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    scale = max(gradient.abs().max() for gradient in expected)
    assert scale > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def dpo_trainer(tmp_path, **settings):
    from trl import DPOConfig, DPOTrainer

    trainer, inputs = make_trainer(tmp_path, DPOTrainer, DPOConfig, **settings)
    batch = PairBatch(
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["completion_mask"].bool(),
        torch.arange(len(inputs["input_ids"]) // 2),
    )
    return trainer, inputs, batch


@pytest.mark.parametrize(
    ("name", "loss_type", "settings"),
    [
        ("dpo", "sigmoid", {}),
        ("robust_dpo", "robust", {"label_smoothing": 0.2}),
        ("ipo", "ipo", {}),
    ],
)
def test_against_trls_dpo_trainer(name, loss_type, settings, tmp_path):
    trainer, inputs, batch = dpo_trainer(tmp_path, loss_type=[loss_type], **settings)
    assert not batch.pair_mask.all()
    theirs = trainer.compute_loss(trainer.model, inputs)
    pair = make_statistics(batch, trainer.model, trainer.ref_model)
    ours = METHODS[name].per_pair(pair, beta=BETA, **settings).mean()
    assert_same(ours, theirs, trainer.model)


def test_the_anchor_against_trls_sft_term(tmp_path):
    """One pair: TRL's term is a mean over the batch's chosen tokens, ours over each response."""
    one = {name: column[:1] for name, column in PAIRS.items()}
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "pairs": one}
    trainer, inputs, batch = dpo_trainer(tmp_path, **settings)
    theirs = trainer.compute_loss(trainer.model, inputs)
    pair = make_statistics(batch, trainer.model, trainer.ref_model)
    ours = METHODS["dpo"].per_pair(pair, beta=BETA)
    ours = ours + 0.7 * anchor_loss(pair.chosen.log_probs, pair.chosen.mask)
    assert_same(ours.mean(), theirs, trainer.model)


def cpo_trainer(tmp_path, **settings):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer, inputs = make_trainer(tmp_path, CPOTrainer, CPOConfig, cpo_alpha=0.0, **settings)
    rows = trainer.concatenated_inputs(inputs, padding_value=trainer.pad_token_id)
    batch = PairBatch(
        rows["concatenated_input_ids"],
        rows["concatenated_attention_mask"],
        rows["concatenated_labels"] != -100,
        torch.arange(len(PAIRS["prompt"])),
    )
    assert not batch.pair_mask.all()
    return trainer, inputs, batch


@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
def test_simpo_against_trls_cpo_trainer(label_smoothing, tmp_path):
    settings = {"simpo_gamma": 0.4, "label_smoothing": label_smoothing}
    trainer, inputs, batch = cpo_trainer(tmp_path, loss_type="simpo", **settings)
    theirs = trainer.compute_loss(trainer.model, inputs)
    pair = make_statistics(batch, trainer.model, trainer.reference)
    ours = METHODS["simpo"].per_pair(pair, beta=BETA, **settings).mean()
    assert_same(ours, theirs, trainer.model)


def test_smoothed_dpo_against_trls_cpo_trainer(tmp_path):
    """CPO without its NLL term is DPO under a reference that likes all tokens alike."""
    settings = {"label_smoothing": 0.15}
    trainer, inputs, batch = cpo_trainer(tmp_path, loss_type="sigmoid", **settings)
    theirs = trainer.compute_loss(trainer.model, inputs)
    pair = make_statistics(batch, trainer.model, trainer.reference)
    sides = (
        ResponseStatistics(side.log_probs, side.mask, torch.zeros_like(side.log_probs))
        for side in (pair.chosen, pair.rejected)
    )
    ours = METHODS["dpo"].per_pair(PairStatistics(*sides), beta=BETA, **settings).mean()
    assert_same(ours, theirs, trainer.model)


def test_sft_against_transformers_own_loss():
    """Cross-entropy of the chosen responses over the batch's response tokens."""
    policy, _ = make_models()
    lengths = torch.tensor([[2, 6], [3, 4], [1, 9]])
    position = torch.arange(9)
    batch = CompletionBatch(
        torch.randint(3, 13, (3, 9), generator=torch.Generator().manual_seed(1)),
        (position < lengths[:, 1:]).long(),
        (position >= lengths[:, :1]) & (position < lengths[:, 1:]),
        torch.arange(3),
    )
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    labels = batch.input_ids.masked_fill(~batch.completion_mask, -100)
    theirs = policy(**inputs, labels=labels).loss
    hidden = policy.model(**inputs).last_hidden_state[batch.states]
    log_probs = token_statistics(hidden, policy.lm_head.weight, batch.labels).log_probs
    side = ResponseStatistics(batch.align(log_probs), batch.response_mask)
    per_row = METHODS["sft"].per_pair(PairStatistics(side, side))
    assert_same(per_row.sum() / len(batch.labels), theirs, policy)
