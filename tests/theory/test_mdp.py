"""The tabular token MDP against sums over paths, written out by hand."""

import itertools
import math

import pytest
import torch

from tokenratio.theory import Policy, TokenMdp

BETA = 0.7
MDPS = [
    TokenMdp.random(3, 3, seed=0),
    TokenMdp.random(3, 3, seed=1, eos=2),
    TokenMdp.random(2, 4, seed=2, eos=0),
    TokenMdp.random(4, 1, seed=3),
    TokenMdp.random(1, 3, seed=4),
]
each_mdp = pytest.mark.parametrize("mdp", MDPS)


def paths(mdp, prefix=()):
    """Every way to finish `prefix`, as a list of (state, token) from there on."""
    vocabulary = mdp.ref_logits.shape[1]
    if len(prefix) == mdp.horizon or (mdp.eos is not None and mdp.eos in prefix):
        return [[]]
    state = 0
    for token in prefix:
        state = vocabulary * state + token + 1
    return [
        [(state, token), *rest]
        for token in range(vocabulary)
        for rest in paths(mdp, (*prefix, token))
    ]


def expected_reward(mdp, prefix):
    """E_ref of the rewards still to come, as a sum over whole paths."""
    probs = mdp.ref_logits.softmax(-1)
    return sum(
        math.prod(float(probs[step]) for step in path)
        * sum(float(mdp.rewards[step]) for step in path)
        for path in paths(mdp, prefix)
        if path
    )


@each_mdp
def test_q_ref_is_reward_plus_the_references_expected_future(mdp):
    vocabulary = mdp.ref_logits.shape[1]
    for length in range(mdp.horizon):
        for prefix in itertools.product(range(vocabulary), repeat=length):
            if mdp.eos in prefix:
                continue
            state = 0
            for token in prefix:
                state = vocabulary * state + token + 1
            for token in range(vocabulary):
                expected = float(mdp.rewards[state, token])
                expected += expected_reward(mdp, (*prefix, token))
                assert float(mdp.q_ref[state, token]) == pytest.approx(expected, abs=1e-12)


@each_mdp
def test_advantage_has_reference_mean_zero(mdp):
    mean = (mdp.ref_logits.softmax(-1) * mdp.a_ref).sum(-1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)


@each_mdp
def test_optimum_satisfies_both_identities_of_the_paper(mdp):
    """Q_ref = β log(π*/π_ref) + β log Z and A_ref = β log(π*/π_ref) + β KL(π_ref ‖ π*)."""
    best = mdp.optimum(BETA)
    log_ratio = best.log_probs - mdp.ref_log_probs
    kl = -(mdp.ref_log_probs.exp() * log_ratio).sum(-1, keepdim=True)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(BETA * (log_ratio + best.baseline[:, None]), mdp.q_ref, **close)
    torch.testing.assert_close(BETA * (log_ratio + kl), mdp.a_ref, **close)


@each_mdp
def test_optimum_maximises_the_token_objective(mdp):
    """max_π E_π[A_ref] − β KL(π ‖ π_ref) in every state: no nearby policy is better."""

    def objective(log_probs):
        gain = mdp.a_ref - BETA * (log_probs - mdp.ref_log_probs)
        return (log_probs.exp() * gain).sum(-1)

    best = mdp.optimum(BETA).log_probs
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        noise = 0.3 * torch.randn(best.shape, generator=rng, dtype=best.dtype)
        assert (objective((best + noise).log_softmax(-1)) <= objective(best) + 1e-14).all()


@each_mdp
def test_responses_are_all_paths_once_with_their_states(mdp):
    batch = mdp.responses
    expected = [step for path in paths(mdp) for step in path]
    assert list(zip(mdp.states.tolist(), batch.labels.tolist(), strict=True)) == expected
    assert len(batch.input_ids) == len(paths(mdp))
    probability = batch.align(mdp.ref_log_probs[mdp.states, batch.labels]).sum(1).exp().sum()
    assert float(probability) == pytest.approx(1.0, abs=1e-14)


@each_mdp
def test_kl_is_the_sum_over_responses(mdp):
    batch, best, reference = mdp.responses, mdp.optimum(BETA), Policy(mdp.ref_logits)
    ours, theirs = (
        batch.align(policy.log_probs[mdp.states, batch.labels]).sum(1)
        for policy in (best, reference)
    )
    expected = float((ours.exp() * (ours - theirs)).sum())
    assert mdp.kl(best, reference) == pytest.approx(expected, abs=1e-12)
    assert mdp.kl(best, best) == 0


def test_seed_and_scale():
    first, again = TokenMdp.random(3, 2, seed=5), TokenMdp.random(3, 2, seed=5, reward_scale=2.0)
    assert first.ref_logits.shape == (4, 3)
    assert first.rewards.dtype == torch.float64
    torch.testing.assert_close(2 * first.rewards, again.rewards, rtol=0, atol=0)
    assert not torch.equal(first.rewards, TokenMdp.random(3, 2, seed=6).rewards)
