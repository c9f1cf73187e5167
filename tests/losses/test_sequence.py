"""Losses of whole responses against their formulas, and the table they stand in."""

import math

import pytest
import torch

from pairs import gradients, make_pairs, only, random
from tokenratio.bregman import Kliep, Logistic
from tokenratio.losses import (
    LOSSES,
    METHODS,
    Method,
    anchor_loss,
    dpo_loss,
    ipo_loss,
    sft_loss,
    simpo_loss,
)
from tokenratio.types import PairStatistics, ResponseStatistics


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_by_hand(beta):
    chosen, rejected = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([0.3, -2.0, 100.0, -500.0], [0.1, 1.5, -100.0, 500.0])
    )
    ours = dpo_loss(chosen[:, None], rejected[:, None], beta=beta)
    for loss, rho_w, rho_l in zip(ours.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        margin = beta * (rho_w - rho_l)
        expected = -margin if margin < -50 else math.log1p(math.exp(-margin))
        assert loss == pytest.approx(expected, rel=1e-12)


def test_dpo_sums_whole_responses_and_ignores_the_generator():
    chosen_mask = torch.tensor([[True, True, True]])
    rejected_mask = torch.tensor([[True, False, False]])
    zeros = torch.zeros(1, 3)
    pairs = PairStatistics(
        ResponseStatistics(torch.tensor([[0.1, 0.2, 0.4]]), chosen_mask, zeros),
        ResponseStatistics(torch.tensor([[-0.3, 0.0, 0.0]]), rejected_mask, zeros),
        torch.full((1, 3), 9.0),  # DPO has no state weight
    )
    for generator in (Logistic(), Kliep()):
        loss = LOSSES["dpo"].per_pair(pairs, beta=0.5, generator=generator)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * (0.7 + 0.3))), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo_by_hand(beta):
    """The square of what the per-token margin lacks to 1/(2β): 0 exactly there."""
    chosen, rejected = torch.tensor([0.7, 1 / (2 * beta)]).double(), torch.tensor([-0.2, 0.0])
    loss = ipo_loss(chosen, rejected.double(), beta=beta)
    assert loss[0].item() == pytest.approx((0.7 + 0.2 - 1 / (2 * beta)) ** 2, rel=1e-6)
    assert loss[1].item() == pytest.approx(0, abs=1e-12)


def test_ipo_takes_means_over_each_response():
    """Every token twice leaves the loss as it is; for a sum it would not."""
    pair = only(make_pairs([3, 2], [2, 3]), LOSSES["ipo"].needs)
    sides = [
        ResponseStatistics(*(x.repeat(1, 2) for x in (s.log_probs, s.mask, s.ref_log_probs)))
        for s in (pair.chosen, pair.rejected)
    ]
    for name, is_same in (("ipo", True), ("simpo", True), ("dpo", False)):
        loss, twice = (METHODS[name].per_pair(p) for p in (pair, PairStatistics(*sides)))
        assert torch.allclose(loss, twice, rtol=1e-12) == is_same, name


def test_simpo_by_hand():
    """−log σ(β (p^w − p^l) − γ): the margin is in units of the reward, β does not scale it."""
    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -0.5]).double()
    loss = simpo_loss(chosen, rejected, beta=2.0, gamma=0.75)
    for got, margin in zip(loss.tolist(), (2.0 * 0.5 - 0.75, 2.0 * -1.5 - 0.75), strict=True):
        assert got == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-12)


def test_cross_entropy_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0, math.nan], [-3.0, math.inf, -0.5]]).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sft_loss(log_probs, mask).tolist() == [3.0, 3.0]
    assert anchor_loss(log_probs, mask).tolist() == [1.5, 3.0]
    assert anchor_loss(log_probs, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_cross_entropy_and_the_anchor_see_the_chosen_response_alone():
    pair = only(make_pairs([3, 2], [2, 3]), METHODS["sft"].needs)
    found = gradients(METHODS["sft"].per_pair(pair), pair)
    assert torch.equal(found["chosen.log_probs"], -pair.chosen.mask.double())
    assert (found["rejected.log_probs"] == 0).all()
    leaf = random(2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(anchor_loss(leaf, pair.chosen.mask).sum(), leaf)
    expected = pair.chosen.mask / pair.chosen.mask.sum(1, keepdim=True).double()
    torch.testing.assert_close(gradient, -expected)


def test_losses_is_a_plain_table():
    assert type(LOSSES) is dict
    assert {"dpo", "tbpo_a", "tbpo_q", "tbpo"} <= set(LOSSES)
    assert set(METHODS) == {*LOSSES, "sft"}
    assert all(isinstance(method, Method) and method.source for method in METHODS.values())
    weights = {name: LOSSES[name].state_weight for name in ("dpo", "tbpo_a", "tbpo_q", "tbpo")}
    assert weights == {"dpo": "none", "tbpo_a": "kl", "tbpo_q": "baseline", "tbpo": "none"}


def test_the_table_of_needs():
    """What each method has to be given, typed out; the rest is not computed for it."""
    reference, kl = {"ref_log_probs"}, {"ref_log_probs", "kl_ref_policy"}
    contrast = {"ref_log_probs", "contrast"}
    assert {name: set(method.needs) for name, method in METHODS.items()} == {
        **dict.fromkeys(("tbpo", "adpo", "dpo", "robust_dpo", "bpo", "ipo", "arc_bpo"), reference),
        **dict.fromkeys(("tbpo_a", "bpo_a", "tdpo1", "tdpo2"), kl),
        **dict.fromkeys(("tis_dpo", "t_reg"), contrast),
        "tbpo_q": {"ref_log_probs", "baseline"},
        "simpo": set(),
        "sepo": {"contrast"},
        "sft": set(),
    }
    for name, method in METHODS.items():
        assert method.has_reference == (name not in ("simpo", "sepo", "sft")), name
        assert method.needs_kl == (name in ("tbpo_a", "bpo_a", "tdpo1", "tdpo2")), name
        assert method.needs_baseline == (name == "tbpo_q"), name
        assert method.needs_contrast == (name in ("tis_dpo", "sepo", "t_reg")), name


def test_dpo_runs_dpo_loss():
    """Whoever changes the equation changes what `loss: dpo` trains."""
    pair = only(make_pairs([3, 2], [2, 4]), LOSSES["dpo"].needs)
    ratios = (pair.chosen.log_ratio, pair.rejected.log_ratio)
    for name, fixed in (("dpo", {}), ("robust_dpo", {"is_robust": True})):
        settings = {"beta": 0.3, "label_smoothing": 0.2}
        expected = dpo_loss(*ratios, **settings, **fixed)
        assert LOSSES[name].equation is dpo_loss
        assert torch.equal(LOSSES[name].per_pair(pair, **settings), expected)


def test_cost_says_what_is_run():
    costs = {name: method.cost for name, method in METHODS.items()}
    assert costs["tbpo_a"] == "policy and reference + KL; shared steps, one pass"
    assert costs["tdpo1"] == "policy and reference + KL; whole responses, two passes"
    assert costs["adpo"] == "policy and reference; shared steps, one pass"
    assert costs["simpo"] == "policy; whole responses, two passes"
