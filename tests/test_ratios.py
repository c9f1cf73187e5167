"""log R and the state weights against loops over pairs and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.bregman import Logistic, ScaledBasu
from tokenratio.losses import over_steps, tbpo_loss
from tokenratio.ratios import baseline_state_weight, kl_state_weight, pair_log_ratio

BETA = 0.3  # not 1: at β = 1 a missing β on log w_t passes
LENGTHS = [4, 2, 0, 1]
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]


def random(*shape, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=rng, dtype=torch.float64)


def baseline_by_hand(chosen, rejected, lengths, *, center, clamp):
    expected = torch.zeros_like(chosen)
    for pair, length in enumerate(lengths):
        weights = [float(rejected[pair, t] - chosen[pair, t]) for t in range(length)]
        if center and length:
            mean = sum(weights) / length
            weights = [weight - mean for weight in weights]
        for t, weight in enumerate(weights):
            expected[pair, t] = min(max(weight, -clamp), clamp)
    return expected


def test_pair_log_ratio_by_hand():
    chosen, rejected, weight = (random(3, 4, seed=seed) for seed in range(3))
    ours = pair_log_ratio(chosen, rejected, weight, beta=BETA)
    for pair in range(3):
        for t in range(4):
            rho_w, rho_l, log_w = (float(x[pair, t]) for x in (chosen, rejected, weight))
            assert float(ours[pair, t]) == pytest.approx(BETA * (rho_l - rho_w + log_w), rel=1e-14)


def test_signs_and_beta_of_each_term():
    """Rejected over chosen; β on all three terms (docs/method.md §2)."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    assert pair_log_ratio(one, zero, zero, beta=BETA).item() == -BETA
    assert pair_log_ratio(zero, one, zero, beta=BETA).item() == BETA
    assert pair_log_ratio(zero, zero, one, beta=BETA).item() == BETA


def test_training_raises_chosen_and_lowers_rejected():
    chosen, rejected = (random(2, 4, seed=seed).requires_grad_() for seed in range(2))
    loss = tbpo_loss(chosen, rejected, beta=BETA, generator=ScaledBasu())
    d_chosen, d_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert (d_chosen < 0).all()
    assert (d_rejected > 0).all()


def test_kl_state_weight_is_rejected_minus_chosen_with_gradients_through_both():
    chosen, rejected = (random(2, 3, seed=seed).abs().requires_grad_() for seed in range(2))
    weight = kl_state_weight(chosen, rejected)
    assert torch.equal(weight, (rejected - chosen).detach())
    d_chosen, d_rejected = torch.autograd.grad(weight.sum(), (chosen, rejected))
    assert (d_chosen == -1).all()
    assert (d_rejected == 1).all()


@settings(deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    center=st.booleans(),
    clamp=st.sampled_from([0.5, 2.0, 10.0, math.inf]),
    seed=st.integers(0, 5),
)
def test_baseline_state_weight_by_hand(lengths, center, clamp, seed):
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    chosen, rejected = (random(len(lengths), 5, seed=seed + i, scale=3.0) for i in range(2))
    ours = baseline_state_weight(chosen, rejected, mask, center=center, clamp=clamp)
    expected = baseline_by_hand(chosen, rejected, lengths, center=center, clamp=clamp)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_centring_comes_before_clamping():
    chosen = torch.zeros(1, 2, dtype=torch.float64)
    rejected = torch.tensor([[0.0, 30.0]], dtype=torch.float64)
    ours = baseline_state_weight(chosen, rejected, torch.ones(1, 2).bool(), center=True, clamp=10.0)
    assert ours.tolist() == [[-10.0, 10.0]]  # clamped first, it would be ±5


def test_defaults_are_the_papers():
    """No centring, |log w| ≤ 10 (docs/method.md §4)."""
    rejected = torch.tensor([[1.0, 50.0, -50.0]])
    mask = torch.ones(1, 3).bool()
    ours = baseline_state_weight(torch.zeros(1, 3), rejected, mask)
    assert ours.tolist() == [[1.0, 10.0, -10.0]]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_outside_the_overlap_do_not_matter(center, bad):
    chosen, rejected = random(4, 4, seed=1), random(4, 4, seed=2)
    results = []
    for filler in (0.0, bad):
        leaves = [x.masked_fill(~MASK, filler).requires_grad_() for x in (chosen, rejected)]
        weight = baseline_state_weight(*leaves, MASK, center=center)
        loss = (weight * random(4, 4, seed=3)).sum()
        results.append([weight, *torch.autograd.grad(loss, leaves)])
    for clean, poisoned in zip(*results, strict=True):
        assert poisoned.isfinite().all()
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
        assert (poisoned[~MASK] == 0).all()


@pytest.mark.parametrize("generator", [Logistic(), ScaledBasu(0.5)], ids=str)
@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("step", [0, 1])
def test_q_is_unchanged_by_a_constant_on_both_baselines(generator, pair, step):
    """b(x, t) + c on both states of one (x, t) cancels in log w_t (docs/method.md §10)."""
    chosen, rejected, rho_w, rho_l = (random(4, 4, seed=seed) for seed in range(4))
    shift = torch.zeros_like(chosen)
    shift[pair, step] = 3.7

    def loss(chosen, rejected):
        weight = baseline_state_weight(chosen, rejected, MASK)
        arrays = (array[MASK] for array in (rho_w, rho_l, weight))
        return over_steps(tbpo_loss(*arrays, beta=BETA, generator=generator), MASK)

    before, both = loss(chosen, rejected), loss(chosen + shift, rejected + shift)
    torch.testing.assert_close(both, before, rtol=1e-14, atol=1e-14)
    assert (loss(chosen + shift, rejected) - before)[pair].abs() > 1e-3


def test_the_shared_first_state_weighs_nothing():
    """At t = 1 both states are the prompt: log w_1 = 0, unless centred (docs/method.md §4)."""
    chosen, rejected = random(4, 4, seed=1), random(4, 4, seed=2)
    rejected[:, 0] = chosen[:, 0]
    assert (kl_state_weight(chosen, rejected)[:, 0] == 0).all()
    assert (baseline_state_weight(chosen, rejected, MASK)[:, 0] == 0).all()
    centred = baseline_state_weight(chosen, rejected, MASK, center=True)
    assert (centred[:2, 0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(dtype):
    values = torch.ones(4, 4, dtype=dtype)
    assert baseline_state_weight(values, values, MASK, center=True).dtype == dtype
    assert kl_state_weight(values, values).dtype == dtype
    assert pair_log_ratio(values, values, values, beta=BETA).dtype == dtype
