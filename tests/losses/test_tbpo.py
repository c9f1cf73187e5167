"""Token-level losses against loops, and the facts of docs/method.md §4 and §10."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs import linear_model, make_pairs, model_statistics, only, random
from tokenratio.bregman import Basu, Kliep, Logistic, Lsif, ScaledBasu
from tokenratio.losses import LOSSES, dpo_loss, over_steps, tbpo_loss
from tokenratio.ratios import baseline_state_weight, kl_state_weight
from tokenratio.types import PairBatch, PairStatistics, ResponseStatistics

BETA = 0.3
GENERATORS = [Logistic(), Kliep(), Lsif(), Basu(0.5), ScaledBasu()]
BY_HAND = {  # ℓ(u) of docs/method.md §3's table, BA's with the constant of its expm1 form
    Logistic: lambda u: math.log(1 + math.exp(u)),
    Kliep: lambda u: math.exp(u) + u,
    Lsif: lambda u: math.exp(2 * u) / 2 - math.exp(-u),
    Basu: lambda u: math.exp(1.5 * u) - 3 * math.exp(-0.5 * u) + 3,
    ScaledBasu: lambda u: (math.exp(u) + u) / 4,
}
each_generator = pytest.mark.parametrize("generator", GENERATORS, ids=str)


def mean_loss(log_ratio, mask, generator):
    """TBPO of pairs that have these log R."""
    zeros = torch.zeros_like(log_ratio)
    pair = PairStatistics(
        ResponseStatistics(zeros, mask, zeros), ResponseStatistics(log_ratio, mask, zeros)
    )
    return LOSSES["tbpo"].per_pair(pair, beta=1.0, generator=generator)


@each_generator
@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=4),
    seed=st.integers(0, 5),
)
def test_method_by_hand(generator, lengths, seed):
    """Mean over t ≤ min(|y^w|, |y^l|) of ℓ(β(ρ^l − ρ^w + log w))."""
    pairs = make_pairs(*map(list, zip(*lengths, strict=True)), seed=seed)
    chosen_ratio, rejected_ratio = pairs.chosen.log_ratio, pairs.rejected.log_ratio
    log_weights = {
        "tbpo_a": pairs.rejected.kl - pairs.chosen.kl,
        "tbpo_q": pairs.log_state_weight,
        "tbpo": torch.zeros_like(chosen_ratio),
    }
    for name, log_weight in log_weights.items():
        given = only(pairs, LOSSES[name].needs)
        ours = LOSSES[name].per_pair(given, beta=BETA, generator=generator)
        assert ours.dtype == torch.float64
        for pair, (chosen, rejected) in enumerate(lengths):
            shared = min(chosen, rejected)
            expected = 0.0
            for t in range(shared):
                u = rejected_ratio[pair, t] - chosen_ratio[pair, t]
                u = BETA * (u + log_weight[pair, t]).item()
                expected += BY_HAND[type(generator)](u) / shared
            assert ours[pair].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@each_generator
def test_gradient_by_hand(generator):
    """dℓ/du / T on shared tokens, 0 elsewhere."""
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    log_ratio = random(3, 3).requires_grad_()
    loss = mean_loss(log_ratio, mask, generator)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    for pair in range(3):
        for t in range(3):
            expected = 0.0
            if mask[pair, t]:
                expected = float(generator.slope(log_ratio[pair, t].detach())) / int(
                    mask[pair].sum()
                )
            assert float(gradient[pair, t]) == pytest.approx(expected, rel=1e-12, abs=0)


@each_generator
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
def test_values_under_the_mask_poison_neither_loss_nor_gradient(generator, bad):
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    results = []
    for filler in (0.0, bad):
        leaf = random(3, 3).masked_fill(~mask, filler).requires_grad_()
        loss = mean_loss(leaf, mask, generator)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for clean, poisoned in zip(*results, strict=True):
        assert poisoned.isfinite().all()
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@each_generator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_overlap_is_zero_with_zero_gradient(generator, dtype):
    for shape in [(2, 3), (2, 0), (0, 3)]:
        log_ratio = torch.full(shape, math.nan, dtype=dtype, requires_grad=True)
        loss = mean_loss(log_ratio, torch.zeros(shape, dtype=torch.bool), generator)
        assert loss.dtype == dtype
        assert loss.tolist() == [0.0] * shape[0]
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert (gradient == 0).all()


@each_generator
def test_padding_changes_nothing(generator):
    pairs = make_pairs([4, 2, 1], [3, 5, 1])
    log_ratio = pairs.rejected.log_ratio - pairs.chosen.log_ratio
    loss = mean_loss(log_ratio, pairs.pair_mask, generator)
    padded = torch.nn.functional.pad(log_ratio, (0, 3), value=7.0)
    mask = torch.nn.functional.pad(pairs.pair_mask, (0, 3))
    torch.testing.assert_close(mean_loss(padded, mask, generator), loss)


@each_generator
def test_the_table_runs_the_papers_equation(generator):
    """`loss: tbpo_a` is `tbpo_loss` of every step, averaged over the steps both responses have."""
    pair = only(make_pairs([4, 2, 1], [3, 5, 1]), LOSSES["tbpo_a"].needs)
    mask, log_weight = pair.pair_mask, kl_state_weight(pair.chosen.kl, pair.rejected.kl)
    arrays = (pair.chosen.log_ratio, pair.rejected.log_ratio, log_weight)
    settings = {"beta": BETA, "generator": generator}
    per_step = tbpo_loss(*(array[mask] for array in arrays), **settings)
    for aggregation in ("mean", "sum"):
        method = replace(LOSSES["tbpo_a"], aggregation=aggregation)
        expected = over_steps(per_step, mask, aggregation)
        assert torch.equal(method.per_pair(pair, **settings), expected)
        whole = tbpo_loss(*arrays, **settings)
        of_rows = [getattr(row[kept], aggregation)() for row, kept in zip(whole, mask, strict=True)]
        torch.testing.assert_close(expected, torch.stack(of_rows), rtol=1e-13, atol=0)


def test_low_precision_is_computed_in_float32():
    log_ratio = random(2, 3).bfloat16()
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss = mean_loss(log_ratio, mask, ScaledBasu())
    assert loss.dtype == torch.float32
    exact = mean_loss(log_ratio.double(), mask, ScaledBasu())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["tbpo_a", "tbpo_q", "tbpo"])
def test_one_token_responses_with_the_logistic_generator_are_dpo(name):
    pairs = model_statistics(*linear_model([(1, 1)] * 3), LOSSES[name].needs)
    settings = {"beta": BETA, "generator": Logistic()}
    token, sequence = (LOSSES[which].per_pair(pairs, **settings) for which in (name, "dpo"))
    torch.testing.assert_close(token, sequence, rtol=1e-14, atol=0)
    expected = dpo_loss(pairs.chosen.log_ratio, pairs.rejected.log_ratio, beta=BETA)
    torch.testing.assert_close(token, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "generator", [Logistic(), *(ScaledBasu(lam) for lam in (-0.5, 0.0, 0.5, 1.0))], ids=str
)
def test_first_step_is_that_of_dpo(generator):
    """T·∇TBPO-A = ∇DPO at θ = ref with equal lengths (docs/method.md §10)."""
    length = 5
    model = linear_model([(length, length)] * 3, moved=False)
    gradients = []
    for name in ("tbpo_a", "dpo"):
        pairs = model_statistics(*model, LOSSES[name].needs)
        loss = LOSSES[name].per_pair(pairs, beta=BETA, generator=generator)
        gradients.extend(torch.autograd.grad(loss.mean(), model[2]))
    assert gradients[1].norm() > 1e-2
    torch.testing.assert_close(length * gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


@each_generator
def test_tbpo_a_from_raw_logits(generator):
    """The whole of TBPO-A, unequal lengths, against docs/method.md §10's identity row by row.

    `A(s,a) = β[(z_θ − z_ref)(a) − E_ref(z_θ − z_ref)]` and log R_t = A^l − A^w: no log-probability
    and no KL in it, so a wrong sign, a missing β, K3, a detached or reversed KL all show.
    """
    lengths = [(3, 5), (1, 4), (4, 4), (2, 1)]
    batch, embedding, weight, ref_weight = linear_model(lengths)
    pairs = model_statistics(batch, embedding, weight, ref_weight, LOSSES["tbpo_a"].needs)
    loss = LOSSES["tbpo_a"].per_pair(pairs, beta=BETA, generator=generator)
    (gradient,) = torch.autograd.grad(loss.mean(), weight)

    def score(row, t):
        state, action = batch.input_ids[row, 1 + t], batch.input_ids[row, 2 + t]
        difference = (weight - ref_weight) @ embedding[state]
        return BETA * (difference[action] - (ref_weight @ embedding[state]).softmax(0) @ difference)

    expected = []
    for pair, shared in enumerate(min(both) for both in lengths):
        terms = [
            generator.loss(score(len(lengths) + pair, t) - score(pair, t)) for t in range(shared)
        ]
        expected.append(sum(terms) / shared)
    expected = torch.stack(expected)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), weight)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_tokens_past_the_overlap_get_no_gradient():
    """Only t ≤ T enters TBPO: cutting the longer response leaves loss and gradient.

    docs/method.md §5.
    """
    batch, embedding, weight, ref_weight = linear_model([(3, 5), (4, 2)])
    results = []
    for cut in (False, True):
        mask = batch.completion_mask.clone()
        if cut:
            mask[2, 5:] = False  # the rejected response of the first pair keeps 3 tokens
            mask[1, 4:] = False  # the chosen response of the second keeps 2
        shorter = PairBatch(batch.input_ids, batch.attention_mask, mask, batch.row)
        pairs = model_statistics(shorter, embedding, weight, ref_weight, LOSSES["tbpo_a"].needs)
        loss = LOSSES["tbpo_a"].per_pair(pairs, beta=BETA, generator=ScaledBasu())
        results.append((loss, *torch.autograd.grad(loss.sum(), weight)))
    for whole, pruned in zip(*results, strict=True):
        torch.testing.assert_close(whole, pruned, rtol=1e-12, atol=1e-13)


def test_the_prompts_state_weighs_nothing():
    """log w_1 = 0 for both variants: at t = 1 both states are the prompt (docs/method.md §4)."""
    batch, embedding, weight, ref_weight = linear_model([(3, 5), (4, 2)])
    pairs = model_statistics(batch, embedding, weight, ref_weight, LOSSES["tbpo_a"].needs)
    log_weight = kl_state_weight(pairs.chosen.kl, pairs.rejected.kl)
    assert (log_weight[:, 0] == 0).all()
    assert (log_weight[:, 1].abs() > 1e-6).all()
    baseline = batch.align(embedding[batch.input_ids[batch.states]].square().sum(1))
    log_weight = baseline_state_weight(*batch.split(baseline), batch.pair_mask)
    assert (log_weight[:, 0] == 0).all()
    assert (log_weight[:, 1].abs() > 1e-6).all()
