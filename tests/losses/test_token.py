"""Losses whose tokens count differently: weights, selections, a regulariser, chunks."""

import math
from dataclasses import replace

import pytest
import torch

from loss_oracles import chunks
from pairs import fresh, gradients, make_pairs, only, random
from tokenratio.bregman import Basu, Kliep, Logistic, Lsif, ScaledBasu
from tokenratio.losses import (
    LOSSES,
    arc_bpo_loss,
    sepo_loss,
    sepo_selection,
    simpo_loss,
    tis_dpo_loss,
    tis_weights,
)
from tokenratio.losses.token_weighted import chunk_sums

GENERATORS = [Logistic(), Kliep(), Lsif(), Basu(0.5), ScaledBasu(-0.5), ScaledBasu(1.0)]
each_generator = pytest.mark.parametrize("generator", GENERATORS, ids=str)
CHOSEN, REJECTED = [5, 1, 7, 4], [3, 4, 7, 6]


def pairs_for(name):
    return only(make_pairs(CHOSEN, REJECTED), LOSSES[name].needs)


def with_contrast(pair, value):
    sides = {
        side: replace(
            getattr(pair, side),
            contrast=torch.full_like(getattr(pair, side).contrast, value, requires_grad=True),
        )
        for side in ("chosen", "rejected")
    }
    return replace(pair, **sides)


def assert_same(one, other, **tolerances):
    """Two (loss, pair): values and the gradients in the policy's log-probabilities."""
    torch.testing.assert_close(one[0], other[0], **tolerances)
    found, expected = gradients(*one), gradients(*other)
    for side in ("chosen", "rejected"):
        mask, key = getattr(one[1], side).mask, f"{side}.log_probs"
        torch.testing.assert_close(found[key][mask], expected[key][mask], **tolerances, msg=key)


# --- TIS-DPO --------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tis_dpo_without_contrast_is_dpo(smoothing):
    pair, twin = with_contrast(pairs_for("tis_dpo"), 0.0), fresh(pairs_for("dpo"))
    settings = {"beta": 0.3, "label_smoothing": smoothing}
    one = LOSSES["tis_dpo"].per_pair(pair, **settings), pair
    other = LOSSES["dpo"].per_pair(twin, **settings), twin
    assert_same(one, other, rtol=1e-13, atol=1e-14)
    ratios = [side.log_ratio for side in (twin.chosen, twin.rejected)]
    ones = [torch.ones_like(ratio) for ratio in ratios]
    torch.testing.assert_close(tis_dpo_loss(*ratios, *ones, **settings), one[0])


def test_tis_weights_by_hand():
    """e^c for chosen tokens and e^{−c} for rejected ones, c clamped before the sign."""
    contrast = torch.tensor([[-9.0, -0.5, -0.2, 0.0, 1.0, 1.5, 9.0]], dtype=torch.float64)
    clamped = [-0.5, -0.5, -0.2, 0.0, 1.0, 1.5, 1.5]
    for sign in (1, -1):
        weights = tis_weights(contrast, sign=sign, lower=-0.5, upper=1.5)
        expected = [math.exp(sign * value) for value in clamped]
        assert weights[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_tis_dpo_weighs_what_the_positive_model_prefers():
    """A token the positive model likes counts more in the chosen response, less in the rejected."""
    pair = pairs_for("tis_dpo")
    found = gradients(LOSSES["tis_dpo"].per_pair(pair), pair)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        weight = found[f"{side}.log_probs"].abs()[2]
        assert torch.equal(
            weight.argsort(stable=True),
            (sign * getattr(pair, side).contrast[2].clamp(-0.5, 1.5)).argsort(stable=True),
        )


def test_a_tis_weight_of_zero_leaves_the_token_out():
    ratio, weight = random(1, 3), torch.tensor([[1.0, 0.0, 1.0]]).double()
    loss = tis_dpo_loss(ratio, 0 * ratio, weight, weight, beta=0.3)
    expected = -torch.log(torch.sigmoid(0.3 * (ratio[:, 0] + ratio[:, 2])))
    torch.testing.assert_close(loss, expected)


# --- SePO -----------------------------------------------------------------------------------------


def selected(scores, share, length=None):
    score = torch.tensor([scores], dtype=torch.float64)
    mask = torch.arange(len(scores)) < (len(scores) if length is None else length)
    return sepo_selection(score, mask[None], share=share)[0].int().tolist()


@pytest.mark.parametrize(
    ("scores", "share", "expected"),
    [
        ([3, 1, 2, 0], 0.5, [1, 0, 1, 0]),
        ([3, 1, 2, 0], 1.0, [1, 1, 1, 1]),
        ([3, 1, 2, 0], 0.25, [1, 0, 0, 0]),
        ([3, 1, 2, 0], 0.74, [1, 0, 1, 0]),  # floor of 2.96
        ([3, 1, 2, 0], 0.01, [1, 0, 0, 0]),  # at least one
        ([1, 1, 1, 1], 0.5, [1, 1, 0, 0]),  # ties go to the earlier
        ([0, 2, 1, 2], 0.25, [0, 1, 0, 0]),
        ([-5], 0.3, [1]),
        ([-math.inf, -math.inf], 0.5, [1, 0]),
    ],
)
def test_selection_on_crafted_scores(scores, share, expected):
    assert selected(scores, share) == expected


@pytest.mark.parametrize("past", [math.nan, math.inf, 99.0])
def test_selection_never_takes_padding(past):
    assert selected([-3, -1, -2, -4, past, past], 0.5, length=4) == [0, 1, 1, 0, 0, 0]
    assert selected([-3, -1, past, past], 1.0, length=2) == [1, 1, 0, 0]
    assert selected([past, past], 0.5, length=0) == [0, 0]


def test_selection_counts_exactly():
    """⌊share · |y|⌋ with share a decimal fraction: 3 of 10 at 0.3, never 2 of 2.9999..."""
    assert sum(selected(range(10), 0.3)) == 3
    longest = 2000
    steps = torch.arange(longest)
    lengths = torch.tensor([10, 90, 100, 900, 1000, 1100, 1700, 1999, 2000])
    mask = steps < lengths[:, None]
    for percent in range(1, 101):
        found = sepo_selection(random(len(lengths), longest), mask, share=percent / 100).sum(-1)
        assert found.tolist() == [max(1, n * percent // 100) for n in lengths.tolist()], percent


def test_selection_of_a_row_is_its_own():
    score, mask = random(4, 7), torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    together = sepo_selection(score, mask, share=0.4)
    for row in range(4):
        alone = sepo_selection(score[row : row + 1], mask[row : row + 1], share=0.4)
        assert torch.equal(alone[0], together[row])


def test_sepo_takes_the_top_of_the_chosen_and_the_bottom_of_the_rejected():
    pair = pairs_for("sepo")
    found = gradients(LOSSES["sepo"].per_pair(pair, sepo_share=0.5), pair)
    for side, best in (("chosen", True), ("rejected", False)):
        response = getattr(pair, side)
        for row, length in enumerate(response.mask.sum(-1).tolist()):
            count = max(1, length // 2)
            order = response.contrast[row, :length].argsort(descending=best)
            trained = found[f"{side}.log_probs"][row].nonzero().flatten()
            assert sorted(order[:count].tolist()) == trained.tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sepo_on_all_tokens_is_its_base_loss(smoothing):
    """SimPO without a margin."""
    pair, twin = pairs_for("sepo"), fresh(pairs_for("simpo"))
    settings = {"beta": 2.5, "label_smoothing": smoothing}
    one = LOSSES["sepo"].per_pair(pair, sepo_share=1.0, **settings), pair
    other = LOSSES["simpo"].per_pair(twin, simpo_gamma=0.0, **settings), twin
    assert_same(one, other, rtol=1e-13, atol=1e-14)
    sides = (pair.chosen, pair.rejected)
    masks = [side.mask for side in sides]
    means = [side.log_probs.sum(-1) / side.mask.sum(-1) for side in sides]
    direct = sepo_loss(*(side.log_probs for side in sides), *masks, **settings)
    torch.testing.assert_close(direct, simpo_loss(*means, gamma=0.0, **settings))


# --- T-REG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_t_reg_of_weight_zero_or_without_contrast_is_dpo(smoothing):
    settings = {"beta": 0.3, "label_smoothing": smoothing}
    pair = pairs_for("t_reg")
    indifferent = with_contrast(pairs_for("t_reg"), 0.0)
    for given, weight in ((pair, 0.0), (indifferent, 0.5)):
        twin = pairs_for("dpo")
        other = LOSSES["dpo"].per_pair(twin, **settings), twin
        one = LOSSES["t_reg"].per_pair(given, t_reg_weight=weight, **settings), given
        assert_same(one, other, rtol=1e-13, atol=1e-14)


def test_t_regs_gradient_is_dpos_token_by_token():
    """−w β (1 + α r_t) for chosen tokens, w β (1 − α r_t) for rejected ones: w is a constant.

    DPO's gradient is w β on every token, w = σ(β(Σρ^l − Σρ^w)), and the regulariser shifts it by
    each token's reward r_t = σ(contrast) − 1/2.
    """
    beta, alpha = 0.3, 0.25
    pair = pairs_for("t_reg")
    loss = LOSSES["t_reg"].per_pair(pair, beta=beta, t_reg_weight=alpha)
    found = gradients(loss, pair)
    margin = beta * (pair.chosen.log_ratio.sum(-1) - pair.rejected.log_ratio.sum(-1))
    weight = (1 / (1 + margin.exp()))[:, None]
    for side, sign in (("chosen", 1), ("rejected", -1)):
        reward = 1 / (1 + (-getattr(pair, side).contrast).exp()) - 0.5
        expected = -weight * beta * (sign + alpha * reward)
        torch.testing.assert_close(found[f"{side}.log_probs"], expected, rtol=1e-11, atol=1e-13)
        # The reference is a constant of training; the regulariser is on log π, not on ρ.
        of_reference = found[f"{side}.ref_log_probs"]
        torch.testing.assert_close(of_reference, (sign * weight * beta).expand_as(of_reference))


# --- ARC-BPO --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_length", [1, 2, 3, 4, 16])
def test_chunks_are_even_and_as_few_as_may_be(chunk_length):
    lengths = list(range(12))
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    values = random(12, 12).masked_fill(~mask, math.nan)
    sums, counts = chunk_sums(values, mask, chunk_length=chunk_length)
    for row, length in enumerate(lengths):
        parts = chunks(values[row, :length], chunk_length) if length else []
        sizes = [len(part) for part in parts]
        assert counts[row].item() == len(parts) == math.ceil(length / chunk_length)
        assert sum(sizes) == length
        assert all(0 < size <= chunk_length for size in sizes)
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        expected = [sum(part).item() for part in parts]
        assert sums[row, : len(parts)].tolist() == pytest.approx(expected, rel=1e-12)
        assert (sums[row, len(parts) :] == 0).all()


def test_chunks_do_not_depend_on_padding():
    mask = torch.arange(9) < torch.tensor([7, 5])[:, None]
    values = random(2, 9)
    expected = [[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1]]
    sums, counts = chunk_sums(values, mask, chunk_length=3)
    assert counts.tolist() == [3, 2]
    for row, of_step in enumerate(expected):
        for chunk in range(int(counts[row])):
            total = sum(
                v for v, c in zip(values[row].tolist(), of_step, strict=False) if c == chunk
            )
            assert sums[row, chunk].item() == pytest.approx(total, rel=1e-12)


def arc(pair, **settings):
    sides = (pair.chosen, pair.rejected)
    settings = {"beta": 0.3, "chunk_length": 3, "target_margin": 2.0} | settings
    ratios, masks = [side.log_ratio for side in sides], [side.mask for side in sides]
    return arc_bpo_loss(*ratios, *masks, **settings)


@each_generator
def test_one_chunk_compares_whole_responses(generator):
    """With ±Δ/2: the divergence of e^{∓Δ/2} from e^{−β Σρ}, by hand."""
    pair = only(make_pairs(CHOSEN, REJECTED), LOSSES["arc_bpo"].needs)
    loss = arc(pair, generator=generator, chunk_length=100, target_margin=1.4)
    expected = torch.zeros(len(CHOSEN), dtype=torch.float64)
    for side, target in ((pair.chosen, 0.7), (pair.rejected, -0.7)):
        ratio = (-0.3 * side.log_ratio.sum(-1)).exp()
        goal = torch.tensor(math.exp(-target), dtype=torch.float64)
        expected = expected + generator.h(goal) - generator.h(ratio)
        expected = expected - generator.h_prime(ratio) * (goal - ratio)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)


@each_generator
@pytest.mark.parametrize("chunk_length", [1, 3, 100])
def test_arc_bpos_minimum_is_at_its_targets(generator, chunk_length):
    """0, with gradient 0, where each chunk's reward is its target; all add up to the margin Δ."""
    beta, margin = 0.3, 1.4
    pair = only(make_pairs(CHOSEN, REJECTED), LOSSES["arc_bpo"].needs)
    moved, total = {}, torch.zeros(len(CHOSEN), dtype=torch.float64)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        response = getattr(pair, side)
        log_probs = response.ref_log_probs.detach().clone()
        for row, length in enumerate(response.mask.sum(-1).tolist()):
            parts = chunks(list(range(length)), chunk_length)
            for part in parts:
                target = sign * margin / 2 / len(parts)
                log_probs[row, part] += target / beta / len(part)
                total[row] += sign * target
        moved[side] = replace(response, log_probs=log_probs.requires_grad_())
    torch.testing.assert_close(total, torch.full_like(total, margin))
    at_targets = replace(pair, **moved)
    settings = {"generator": generator, "chunk_length": chunk_length, "target_margin": margin}
    loss = arc(at_targets, beta=beta, **settings)
    assert loss.abs().max() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients(loss, at_targets).values())
    elsewhere = arc(pair, beta=beta, **settings)
    assert (elsewhere > 1e-4).all()
    found = gradients(elsewhere, pair)
    assert found["chosen.log_probs"].norm() > 1e-3


@each_generator
def test_arc_bpo_draws_from_both_sides(generator):
    """Too little reward is raised, too much lowered: no pairing across the two responses."""
    for reward, sign in ((0.1, -1), (3.0, 1)):
        pair = only(make_pairs([4], [4]), LOSSES["arc_bpo"].needs)
        log_probs = pair.chosen.ref_log_probs.detach() + reward
        chosen = replace(pair.chosen, log_probs=log_probs.requires_grad_())
        pair = replace(pair, chosen=chosen)
        found = gradients(arc(pair, generator=generator, beta=1.0, chunk_length=1), pair)
        assert (sign * found["chosen.log_probs"] > 0).all()


def test_arc_bpo_is_a_mean_over_chunks():
    """A response whose chunks are all alike costs what one of them does, against its target."""
    losses = []
    for length, margin in ((2, 1.0), (6, 3.0)):
        pair = only(make_pairs([length], [length]), LOSSES["arc_bpo"].needs)
        sides = {
            side: replace(
                getattr(pair, side), log_probs=getattr(pair, side).ref_log_probs.detach() + 0.4
            )
            for side in ("chosen", "rejected")
        }
        pair = replace(pair, **sides)
        losses.append(arc(pair, generator=Kliep(), chunk_length=2, target_margin=margin))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("reward", [1e3, -1e3])
def test_arc_bpo_is_held_at_the_largest_exponent(reward):
    """e^{±30} at most, at the published generator in float32."""
    pair = only(make_pairs([4], [4]), LOSSES["arc_bpo"].needs)
    log_probs = (pair.chosen.ref_log_probs.detach() + reward).float().requires_grad_()
    mask = pair.chosen.mask
    loss = arc_bpo_loss(
        log_probs,
        -log_probs,
        mask,
        mask,
        beta=0.1,
        generator=ScaledBasu(1.0),
        chunk_length=2,
        target_margin=2.0,
    )
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), log_probs)[0].isfinite().all()
