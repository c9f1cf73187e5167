"""Labels that may be wrong: the mixture of every method, and rDPO's correction."""

import inspect
from dataclasses import replace

import pytest
import torch

from pairs import fresh, gradients, make_pairs, only, swapped
from tokenratio.bregman import Basu, Kliep, Logistic, Lsif, ScaledBasu
from tokenratio.losses import LOSSES, METHODS, ratio_matching_loss, tbpo_loss
from tokenratio.types import StepStatistics

GENERATORS = [Logistic(), Kliep(), Lsif(), Basu(0.5), ScaledBasu(-0.5)]
each_generator = pytest.mark.parametrize("generator", GENERATORS, ids=str)
LABELLED = [name for name, method in METHODS.items() if "label_smoothing" in method.settings]
LOCAL = [name for name, method in METHODS.items() if method.is_local]
# Those whose loss of the swapped pair is the loss at the negated log R; the others have a margin
# (simpo), or what they do depends on the side (tdpo2 in its gradient, tis_dpo, t_reg).
SYMMETRIC = ["tbpo_a", "tbpo_q", "tbpo", "adpo", "dpo", "bpo", "bpo_a", "tdpo1", "ipo", "sepo"]


def pairs(name):
    return only(make_pairs([5, 1, 7, 4], [3, 4, 7, 6]), METHODS[name].needs)


def negated_contrast(pair):
    """As if the two contrasting models had changed places, too: sepo's selection stays."""
    sides = {
        side: replace(getattr(pair, side), contrast=-getattr(pair, side).contrast)
        for side in ("chosen", "rejected")
    }
    return replace(pair, **sides)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_is_the_mixture_with_the_swapped_pair(name):
    pair = pairs(name)
    other = swapped(pair)
    if name == "sepo":
        other = negated_contrast(other)
    clean, flipped = (METHODS[name].per_pair(which) for which in (pair, other))
    smoothed = METHODS[name].per_pair(pair, label_smoothing=0.3)
    mixture = 0.7 * clean + 0.3 * flipped
    torch.testing.assert_close(smoothed, mixture, rtol=1e-12, atol=1e-12)
    found = gradients(smoothed, pair)
    for key, expected in gradients(mixture, pair).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-10, atol=1e-12, msg=key)


def test_every_other_method_is_accounted_for():
    rest = {"robust_dpo", "simpo", "tdpo2", "tis_dpo", "t_reg"}
    assert set(LABELLED) == {*SYMMETRIC, *rest}
    assert set(METHODS) - set(LABELLED) == {"arc_bpo", "sft"}


@pytest.mark.parametrize("name", ["tis_dpo", "simpo", "t_reg", "tdpo2"])
def test_logistic_losses_of_one_margin(name):
    """ε softplus(−u) + (1−ε) softplus(u) is softplus(u) − ε u: the margin u moves it linearly."""
    pair = pairs(name)
    clean = METHODS[name].per_pair(pair)
    quarter, half = (METHODS[name].per_pair(pair, label_smoothing=e) for e in (0.2, 0.4))
    torch.testing.assert_close(half - clean, 2 * (quarter - clean), rtol=1e-11, atol=1e-13)
    assert ((quarter - clean).abs() > 1e-4).all()


@each_generator
def test_the_smoothed_loss_by_definition(generator):
    u = torch.linspace(-2, 2, 9, dtype=torch.float64)
    smoothed = ratio_matching_loss(u, generator=generator, label_smoothing=0.1)
    expected = 0.9 * generator.loss(u) + 0.1 * generator.loss(-u)
    torch.testing.assert_close(smoothed, expected, rtol=1e-14, atol=0)


@each_generator
def test_the_smoothed_minimum_is_where_the_labels_are(generator):
    """Proper generators: with P(chosen ≻ rejected) = 1 − ε, log R = log(ε/(1−ε)) is stationary."""
    share = torch.tensor(0.2, dtype=torch.float64)
    u = (share / (1 - share)).log().requires_grad_()
    loss = ratio_matching_loss(u, generator=generator, label_smoothing=0.2)
    (gradient,) = torch.autograd.grad(loss, u)
    assert gradient.abs() < 1e-12


@each_generator
@pytest.mark.parametrize("share", [0.1, 0.45])
def test_robust_loss_is_the_clean_one_in_expectation(generator, share):
    """A label that is wrong with probability ε: E over it of the corrected loss, exactly."""
    u = torch.linspace(-3, 3, 13, dtype=torch.float64)
    right, wrong = (
        ratio_matching_loss(v, generator=generator, label_smoothing=share, is_robust=True)
        for v in (u, -u)
    )
    expected = (1 - share) * right + share * wrong
    torch.testing.assert_close(expected, generator.loss(u), rtol=1e-11, atol=1e-11)


def test_robust_dpo_is_dpo_in_expectation():
    """Values and gradients, of pairs whose labels are swapped with probability ε = 0.1."""
    pair = pairs("robust_dpo")
    right, wrong = (LOSSES["robust_dpo"].per_pair(which) for which in (pair, swapped(pair)))
    expected, clean = 0.9 * right + 0.1 * wrong, LOSSES["dpo"].per_pair(pair)
    torch.testing.assert_close(expected, clean, rtol=1e-12, atol=1e-12)
    found = gradients(expected, pair)
    for key, gradient in gradients(clean, pair).items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-11, atol=1e-13)
    assert (right != clean).all()


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("share", [0.0, 0.2])
@each_generator
def test_a_local_loss_is_made_of_its_steps(name, share, generator):
    """`per_step` over a pair's shared steps, averaged or summed, is `per_pair`."""
    method = LOSSES[name]
    settings = {"beta": 0.4, "label_smoothing": share, "generator": generator}
    pair, twin = pairs(name), fresh(pairs(name))
    mask = twin.pair_mask
    steps = StepStatistics(
        twin.chosen.log_ratio[mask],
        twin.rejected.log_ratio[mask],
        *(side.kl[mask] if "kl_ref_policy" in method.needs else None for side in sides(twin)),
        twin.log_state_weight[mask] if "baseline" in method.needs else None,
    )
    of_steps = torch.zeros(mask.shape, dtype=torch.float64)
    of_steps = of_steps.masked_scatter(mask, method.per_step(steps, **settings)).sum(-1)
    if method.aggregation == "mean":
        of_steps = of_steps / mask.sum(-1)
    whole = method.per_pair(pair, **settings)
    torch.testing.assert_close(of_steps, whole, rtol=1e-12, atol=1e-12)
    found = gradients(of_steps, twin)
    for key, expected in gradients(whole, pair).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-11, atol=1e-13, msg=key)


def sides(pair):
    return pair.chosen, pair.rejected


def test_what_is_not_local_has_no_steps():
    step = StepStatistics(torch.zeros(1), torch.zeros(1))
    for name in METHODS.keys() - LOCAL:
        with pytest.raises(NotImplementedError, match="local"):
            METHODS[name].per_step(step)
    assert set(LOCAL) == {"tbpo_a", "tbpo_q", "tbpo", "adpo"}


def test_half_wrong_labels_teach_nothing():
    """At ε → 1/2 the mixture is even in log R: its slope at 0 vanishes."""
    u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    settings = {"beta": 1.0, "generator": ScaledBasu(), "label_smoothing": 0.5 - 1e-12}
    loss = tbpo_loss(u, torch.zeros_like(u), **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), u)
    assert gradient.abs().max() < 1e-11


def test_the_documented_parameters_are_keywords():
    """Positions are for statistics; a loss's parameters have names."""
    for function in (ratio_matching_loss, tbpo_loss):
        parameters = inspect.signature(function).parameters
        assert parameters["label_smoothing"].kind is inspect.Parameter.KEYWORD_ONLY
