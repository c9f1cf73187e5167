import math
import statistics

import pytest
import torch

from tokenratio.evaluation.generation import sample_responses
from tokenratio.evaluation.gold import clustered_mean, summarize_policy

PROMPTS = ["review of the hotel :", "the", "note about the old camera for my boss :"] * 4


@pytest.fixture
def policies(make_policy):
    return make_policy(0), make_policy(1)


@pytest.fixture
def samples(policies, tokenizer):
    return sample_responses(
        policies[0], tokenizer, PROMPTS, num_samples=2, max_new_tokens=10, seed=0
    )


def by_hand(model, ref_model, sample):
    """KL and entropy of one response, token by token in float64."""
    kl, entropies = 0.0, []
    for t in range(len(sample.response_ids)):
        state = torch.tensor([sample.prompt_ids + sample.response_ids[:t]])
        with torch.no_grad():
            p = model(state).logits[0, -1].double().softmax(-1)
            ref_p = ref_model(state).logits[0, -1].double().softmax(-1)
        kl += (p * (p / ref_p).log()).sum().item()
        entropies.append(-(p * p.log()).sum().item())
    return kl, statistics.mean(entropies)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_against_a_loop_over_tokens(policies, samples, world, batch_size):
    summary = summarize_policy(
        *policies,
        samples,
        world.gold_reward,
        has_insult=world.has_insult,
        batch_size=batch_size,
    )
    rows = [sample for row in samples for sample in row]
    kl, entropy = zip(*(by_hand(*policies, sample) for sample in rows), strict=True)
    assert summary["kl_policy_ref"].mean == pytest.approx(statistics.mean(kl), rel=1e-5)
    assert summary["entropy"].mean == pytest.approx(statistics.mean(entropy), rel=1e-5)
    assert summary["length"].mean == statistics.mean(len(row.response_ids) for row in rows)
    rewards = [world.gold_reward(row.text) for row in rows]
    assert summary["gold_reward"].mean == pytest.approx(statistics.mean(rewards))
    assert summary["insult_share"].mean == statistics.mean(world.has_insult(r.text) for r in rows)
    assert {estimate.num for estimate in summary.values()} == {24}


def test_no_distance_from_oneself(policies, samples, world):
    summary = summarize_policy(policies[0], policies[0], samples, world.gold_reward)
    assert summary["kl_policy_ref"].mean == 0.0
    assert "insult_share" not in summary


def test_a_small_distance_is_exact(policies, samples, world, make_policy):
    """Far below the rounding of Σ p (log p − log p_ref) in float32."""
    near, ref = policies[0], make_policy(0)
    with torch.no_grad():
        for parameter in near.lm_head.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter += 2e-5 * noise
    summary = summarize_policy(near, ref, samples, world.gold_reward)
    exact = [by_hand(near, ref, sample)[0] for row in samples for sample in row]
    assert 0 < statistics.mean(exact) < 1e-5
    assert summary["kl_policy_ref"].mean == pytest.approx(statistics.mean(exact), rel=5e-2)


def test_a_huge_distance_is_finite(policies, samples, world):
    sharp, ref = policies
    with torch.no_grad():
        sharp.lm_head.weight *= 100
    summary = summarize_policy(sharp, ref, samples, world.gold_reward)
    assert all(math.isfinite(estimate.mean) for estimate in summary.values())
    assert summary["kl_policy_ref"].mean > 1


def test_modes_are_restored(policies, samples, world):
    policies[0].train()
    summarize_policy(*policies, samples, world.gold_reward)
    assert policies[0].training


def test_standard_errors():
    values = [1.0, 4.0, 2.0, 8.0]
    alone = clustered_mean(values, [1] * 4)
    assert alone.standard_error == pytest.approx(statistics.stdev(values) / 2)
    # samples that repeat their prompt's value add nothing
    repeated = clustered_mean([value for value in values for _ in range(3)], [3] * 4)
    assert repeated.standard_error == pytest.approx(alone.standard_error)
    assert repeated.num == 12
    assert math.isnan(clustered_mean(values, [4]).standard_error)
    with pytest.raises(ValueError, match="no samples"):
        summarize_policy(None, None, [[]], len)
