import statistics

import pytest
import torch

from tokenratio.evaluation.distance import kl_policy_ref
from tokenratio.models.generation import encode_prompts, sample_responses
from tokenratio.models.token_rows import TokenRow

PROMPTS = ["review of the hotel :", "the", "note about the old camera for my boss :"] * 4


@pytest.fixture
def policies(make_policy):
    return make_policy(0), make_policy(1)


@pytest.fixture
def samples(policies, tokenizer):
    drawn = sample_responses(
        policies[0], tokenizer, PROMPTS, num_samples=2, max_new_tokens=10, seed=0
    )
    prompts = zip(encode_prompts(tokenizer, PROMPTS), drawn, strict=True)
    return [[TokenRow(ids, response.token_ids) for response in group] for ids, group in prompts]


def by_hand(model, ref_model, sample):
    """KL of one response, token by token in float64."""
    kl = 0.0
    for t in range(len(sample.response_ids)):
        state = torch.tensor([sample.prompt_ids + sample.response_ids[:t]])
        with torch.no_grad():
            p = model(state).logits[0, -1].double().softmax(-1)
            ref_p = ref_model(state).logits[0, -1].double().softmax(-1)
        kl += (p * (p / ref_p).log()).sum().item()
    return kl


def rows_of(samples):
    return [sample for row in samples for sample in row]


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, None), (5, 3), (64, 1000)])
def test_against_a_loop_over_tokens(policies, samples, batch_size, chunk_size):
    rows = rows_of(samples)
    ours = kl_policy_ref(*policies, rows, batch_size=batch_size, chunk_size=chunk_size)
    expected = [by_hand(*policies, sample) for sample in rows]
    assert ours == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) > 10


def test_no_distance_from_oneself(policies, samples):
    ours = kl_policy_ref(policies[0], policies[0], rows_of(samples), batch_size=8)
    assert ours == [0.0] * len(ours)


@pytest.mark.slow
def test_a_small_distance_is_exact(policies, samples, make_policy):
    """Far below the rounding of Σ p (log p − log p_ref) in float32."""
    near, ref = policies[0], make_policy(0)
    with torch.no_grad():
        for parameter in near.lm_head.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter += 2e-5 * noise
    rows = rows_of(samples)
    mean = statistics.mean(kl_policy_ref(near, ref, rows, batch_size=8))
    exact = statistics.mean(by_hand(near, ref, sample) for sample in rows)
    assert 0 < exact < 1e-5
    assert mean == pytest.approx(exact, rel=5e-2)


def test_a_huge_distance_is_finite(policies, samples):
    sharp, ref = policies
    with torch.no_grad():
        sharp.lm_head.weight *= 100
    ours = torch.tensor(kl_policy_ref(sharp, ref, rows_of(samples), batch_size=8))
    assert ours.isfinite().all()
    assert ours.mean() > 1


def test_modes_are_restored(policies, samples):
    policies[0].train()
    kl_policy_ref(*policies, rows_of(samples), batch_size=8)
    assert policies[0].training
