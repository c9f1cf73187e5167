"""generator × state weight × aggregation: named methods as points of one space.

docs/method.md §11.
"""

from dataclasses import replace

import pytest
import torch

from pairs import fresh, gradients, linear_model, make_pairs, model_statistics, only, random
from tokenratio.bregman import Basu, Kliep, Logistic, Lsif, ScaledBasu
from tokenratio.losses import LOSSES, bpo_loss, dpo_loss, over_steps, tbpo_loss, tbpo_variant
from tokenratio.ratios import kl_state_weight

BETA = 0.3
GENERATORS = [Logistic(), Kliep(), Lsif(), Basu(0.5), ScaledBasu(-0.5)]
each_generator = pytest.mark.parametrize("generator", GENERATORS, ids=str)
LENGTHS = [(3, 5), (1, 4), (4, 4), (2, 1)]
CHOSEN, REJECTED = map(list, zip(*LENGTHS, strict=True))
# (state weight, aggregation) of each named point; None for the user's generator.
POINTS = {
    "tbpo_a": ("kl", "mean", None),
    "tbpo_q": ("baseline", "mean", None),
    "adpo": ("none", "sum", Logistic()),
    "dpo": ("none", "sequence", Logistic()),
    "bpo": ("none", "sequence", None),
    "bpo_a": ("kl", "sequence", None),
    "tdpo1": ("kl", "sequence", Logistic()),
}


def assert_same(one, other, **tolerances):
    """Two (loss, pair): values and every gradient."""
    torch.testing.assert_close(one[0], other[0], **tolerances)
    found = gradients(*one)
    for key, expected in gradients(*other).items():
        torch.testing.assert_close(found[key], expected, **tolerances, msg=key)


@pytest.mark.parametrize("name", POINTS)
@each_generator
def test_named_methods_are_points_of_the_space(name, generator):
    state_weight, aggregation, fixed = POINTS[name]
    if fixed is not None:
        generator = fixed
    point = tbpo_variant(state_weight, aggregation)
    method = LOSSES[name]
    assert point.needs == method.needs
    assert (point.is_local, point.level) == (method.is_local, method.level)
    pair = only(make_pairs(CHOSEN, REJECTED), method.needs)
    twin = fresh(pair)
    settings = {"beta": BETA, "generator": generator}
    assert_same(
        (method.per_pair(pair, **settings), pair),
        (point.per_pair(twin, **settings), twin),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("state_weight", ["none", "kl", "baseline"])
@pytest.mark.parametrize("aggregation", ["mean", "sum", "sequence"])
@each_generator
def test_every_point_by_definition(state_weight, aggregation, generator):
    """log R_t, and then ℓ of what is aggregated, or the aggregate of ℓ."""
    method = tbpo_variant(state_weight, aggregation)
    pair = only(make_pairs(CHOSEN, REJECTED), method.needs)
    chosen, rejected = pair.chosen, pair.rejected
    log_r = rejected.log_probs - rejected.ref_log_probs - chosen.log_probs + chosen.ref_log_probs
    if state_weight == "kl":
        log_r = log_r + rejected.kl - chosen.kl
    if state_weight == "baseline":
        log_r = log_r + pair.log_state_weight
    if aggregation == "sequence":
        expected = generator.loss((BETA * log_r).sum(-1))
    else:
        shared = [min(both) for both in LENGTHS]
        terms = [generator.loss(BETA * log_r[row, :n]) for row, n in enumerate(shared)]
        expected = torch.stack([getattr(of_pair, aggregation)() for of_pair in terms])
    ours = method.per_pair(pair, beta=BETA, generator=generator)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@each_generator
def test_bpo_by_definition(generator):
    """h'(R) R − h(R) − h'(1/R) at R = e^{Σ log R_t}, up to a constant (docs/method.md §3)."""
    log_r = 0.2 * random(4, 5)
    one, other = log_r.clone().requires_grad_(), log_r.clone().requires_grad_()
    ours = bpo_loss(torch.zeros_like(one), one, beta=1.0, generator=generator)
    ratio = other.sum(-1).exp()
    h, h_prime = generator.h, generator.h_prime
    by_definition = h_prime(ratio) * ratio - h(ratio) - h_prime(1 / ratio)
    difference = (ours - by_definition).detach()
    torch.testing.assert_close(difference, difference[:1].expand(4), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), one),
        torch.autograd.grad(by_definition.sum(), other),
        rtol=1e-10,
        atol=1e-12,
    )


def test_published_bpo():
    """SBA with λ = −1/2, s = 4: (2 e^{u/2} + 2 expm1(u/2)) / 4; DPO's slope at R = 1."""
    pair = only(make_pairs(CHOSEN, REJECTED), LOSSES["bpo"].needs)
    u = 0.1 * (pair.rejected.log_ratio.sum(-1) - pair.chosen.log_ratio.sum(-1))
    expected = ((u / 2).exp() * 2 + 2 * torch.expm1(u / 2)) / 4
    torch.testing.assert_close(LOSSES["bpo"].per_pair(pair), expected, rtol=1e-12, atol=1e-12)
    zero = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    generator = LOSSES["bpo"].settings["generator"]
    loss = bpo_loss(zero.detach(), zero, beta=1.0, generator=generator)
    assert torch.autograd.grad(loss.sum(), zero)[0].tolist() == [[0.5, 0.5]]


def test_bpo_with_the_logistic_generator_is_dpo():
    pair = only(make_pairs(CHOSEN, REJECTED), LOSSES["dpo"].needs)
    twin = fresh(pair)
    bpo = LOSSES["bpo"].per_pair(pair, beta=BETA, generator=Logistic())
    ratios = (side.log_ratio for side in (twin.chosen, twin.rejected))
    assert_same((bpo, pair), (dpo_loss(*ratios, beta=BETA), twin), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(LOSSES["dpo"].per_pair(pair, beta=BETA), bpo, rtol=0, atol=0)


def test_adpo_is_tbpo_summed():
    """−Σ_t log σ(β(ρ^w − ρ^l)) over shared steps: the published formula, T times TBPO's mean."""
    pair = only(make_pairs(CHOSEN, REJECTED), LOSSES["adpo"].needs)
    adpo = LOSSES["adpo"].per_pair(pair, beta=BETA)
    tbpo = LOSSES["tbpo"].per_pair(pair, beta=BETA, generator=Logistic())
    shared = torch.tensor([min(both) for both in LENGTHS])
    torch.testing.assert_close(adpo, shared * tbpo, rtol=1e-12, atol=0)
    mask = pair.pair_mask
    ratios = (side.log_ratio[mask] for side in (pair.chosen, pair.rejected))
    summed = over_steps(tbpo_loss(*ratios, beta=BETA, generator=Logistic()), mask, "sum")
    torch.testing.assert_close(adpo, summed, rtol=0, atol=0)


def test_bpo_a_with_the_logistic_generator_is_tdpo1():
    """Values and the gradient of a model's head, the KL's part included."""
    results = []
    for name, settings in (("bpo_a", {"generator": Logistic()}), ("tdpo1", {})):
        model = linear_model(LENGTHS)
        pair = model_statistics(*model, LOSSES[name].needs)
        loss = LOSSES[name].per_pair(pair, beta=BETA, **settings)
        results.append((loss, *torch.autograd.grad(loss.sum(), model[2])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def head_scores(model):
    """Σ_t ρ_t and Σ_t KL_t of every response, from whole logits, one row and token at a time."""
    batch, embedding, weight, ref_weight = model
    found = []
    for row in range(len(batch.input_ids)):
        states = (batch.completion_mask[row].nonzero().flatten() - 1).tolist()
        ratio, kl = torch.zeros(()).double(), torch.zeros(()).double()
        for place in states:
            hidden = embedding[batch.input_ids[row, place]]
            label = batch.input_ids[row, place + 1]
            log_p = (weight @ hidden).log_softmax(0)
            log_q = (ref_weight @ hidden).log_softmax(0)
            ratio = ratio + log_p[label] - log_q[label]
            kl = kl + sum(log_q[z].exp() * (log_q[z] - log_p[z]) for z in range(len(log_q)))
        found.append((ratio, kl))
    half = len(found) // 2
    return list(zip(found[:half], found[half:], strict=True))


@pytest.mark.parametrize("alpha", [0.5, 1.7])
@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_on_a_model_by_hand(name, alpha):
    """In float64 through a linear model: α, and which KL is a constant (2404.11999, eq. 16, 18)."""
    model = linear_model(LENGTHS)
    settings = {"tdpo_alpha": alpha} if name == "tdpo2" else {}
    pair = model_statistics(*model, LOSSES[name].needs)
    ours = LOSSES[name].per_pair(pair, beta=BETA, **settings)
    expected = []
    for (rho_w, kl_w), (rho_l, kl_l) in head_scores(model):
        if name == "tdpo1":
            margin = BETA * (rho_w - rho_l) - (BETA * kl_l - BETA * kl_w)
        else:
            margin = BETA * (rho_w - rho_l) - alpha * (BETA * kl_l - (BETA * kl_w).detach())
        expected.append(-torch.log(torch.sigmoid(margin)))
    expected = torch.stack(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours.sum(), model[2])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), model[2])
    assert expected_gradient.norm() > 1e-2
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_tdpo2_holds_the_chosen_kl_still():
    """Its value has it, its gradient has not; the rejected response's has α β times DPO's slope."""
    pair = only(make_pairs(CHOSEN, REJECTED), LOSSES["tdpo2"].needs)
    found = gradients(LOSSES["tdpo2"].per_pair(pair, beta=BETA), pair)
    assert (found["chosen.kl"] == 0).all()
    torch.testing.assert_close(found["rejected.kl"], 0.5 * found["rejected.log_probs"])
    weight = kl_state_weight(pair.chosen.kl, pair.rejected.kl)
    assert (weight[pair.pair_mask].abs() > 1e-3).all()
    doubled = replace(pair, chosen=replace(pair.chosen, kl=2 * pair.chosen.kl))
    losses = [LOSSES["tdpo2"].per_pair(which, beta=BETA) for which in (pair, doubled)]
    assert (losses[1] < losses[0]).all()


@pytest.mark.parametrize("name", ["bpo", "bpo_a", "tdpo1", "tdpo2", "dpo"])
def test_sequence_losses_see_tokens_past_the_overlap(name):
    """Unlike TBPO: the token past the shorter response counts as the others do."""
    pair = only(make_pairs([3], [5]), LOSSES[name].needs)
    found = gradients(LOSSES[name].per_pair(pair), pair)
    of_rejected = found["rejected.log_probs"]
    assert (of_rejected == of_rejected[0, 0]).all()
    assert of_rejected[0, 0] > 0


@each_generator
def test_equal_lengths_of_one_token_make_all_aggregations_one(generator):
    pair = only(make_pairs([1, 1], [1, 1]), frozenset({"ref_log_probs"}))
    losses = [
        tbpo_variant("none", aggregation).per_pair(pair, generator=generator)
        for aggregation in ("mean", "sum", "sequence")
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-14, atol=0)
