"""Exact enumeration of docs/method.md §10: where TBPO's minimiser is π*; the check can fail."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tokenratio.bregman import Basu, Kliep, Logistic, Lsif, ScaledBasu
from tokenratio.losses import LOSSES, PairLoss
from tokenratio.ratios import kl_state_weight
from tokenratio.theory import Policy, Population, TokenMdp

BETA = 0.7  # not 1: at β = 1 a missing β on log w_t passes
GENERATORS = [Logistic(), Kliep(), Lsif(), Basu(0.3), Basu(-0.5), ScaledBasu(), ScaledBasu(0.5)]
MDPS = {
    "fixed length": TokenMdp.random(3, 3, seed=0, reward_scale=0.5),
    "with eos": TokenMdp.random(3, 3, seed=1, eos=2, reward_scale=0.5),
}
TBPO_A, TBPO_Q = LOSSES["tbpo_a"], LOSSES["tbpo_q"]
score_of = {"tbpo_a": "advantage", "tbpo_q": "value"}
each_mdp = pytest.mark.parametrize("mdp", MDPS.values(), ids=MDPS)


def kl_weight(pair):
    return kl_state_weight(pair.chosen.kl, pair.rejected.kl)


def with_state_weight(log_state_weight, needs=frozenset({"ref_log_probs", "kl_ref_policy"})):
    """TBPO with another log w_t, given as a learned one is."""

    def per_pair(pair, **settings):
        weighted = replace(pair, log_state_weight=log_state_weight(pair))
        return TBPO_Q.per_pair(weighted, **settings)

    return PairLoss(per_pair, "a fault, for a test", "token", TBPO_Q.settings, needs)


def k3(log_ratio):
    return log_ratio.expm1() - log_ratio


# Each is wrong; none has π* as stationary point under step labels.
FAULTS = {
    "no state weight": LOSSES["tbpo"],
    "K3 on the data token": with_state_weight(
        lambda pair: k3(pair.rejected.log_ratio) - k3(pair.chosen.log_ratio),
        needs=frozenset({"ref_log_probs"}),
    ),
    "sign of the state weight": with_state_weight(lambda pair: -kl_weight(pair)),
    "no beta on the state weight": with_state_weight(lambda pair: kl_weight(pair) / BETA),
}
DETACHED = with_state_weight(lambda pair: kl_weight(pair).detach())


@each_mdp
def test_tbpo_a_is_tbpo_q_with_the_kl_for_a_baseline(mdp):
    """The faults differ from TBPO-A by nothing but what they are named after."""
    policy = Policy(mdp.ref_logits + 0.3 * torch.sin(torch.arange(39.0).double()).view(13, 3))
    population = Population(mdp, beta=BETA)
    same = with_state_weight(kl_weight)
    for generator in GENERATORS:
        gradients = [population.gradient(policy, m, generator) for m in (TBPO_A, same)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@each_mdp
def test_probabilities_sum_to_one(mdp):
    for labels in ("a", "c"):
        for score in ("advantage", "value"):
            population = Population(mdp, beta=BETA, labels=labels, score=score)
            assert float(population.probability.sum()) == pytest.approx(1, abs=1e-12)


def test_loss_by_hand():
    """Two tokens, one step: σ of the reward difference, four ordered pairs."""
    mdp = TokenMdp.random(2, 1, seed=0)
    population, policy = Population(mdp, beta=BETA), Policy(torch.tensor([[0.3, -0.4]]).double())
    probs, reward = mdp.ref_logits.softmax(-1)[0], mdp.rewards[0]
    log_ratio = (policy.log_probs - mdp.ref_log_probs)[0]
    expected = sum(
        probs[i]
        * probs[j]
        * torch.sigmoid(sign * (reward[i] - reward[j]))
        * F.softplus(sign * BETA * (log_ratio[j] - log_ratio[i]))
        for i in range(2)
        for j in range(2)
        for sign in (1, -1)
    )
    loss = population.loss(policy, TBPO_A, Logistic())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@each_mdp
@pytest.mark.parametrize("generator", GENERATORS, ids=str)
@pytest.mark.parametrize("name", ["tbpo_a", "tbpo_q"])
def test_the_optimum_is_stationary_under_step_labels(mdp, generator, name):
    population = Population(mdp, beta=BETA, score=score_of[name])
    gradient = population.gradient(mdp.optimum(BETA), LOSSES[name], generator)
    assert gradient.norm() < 1e-12
    away = population.gradient(Policy(mdp.ref_logits, torch.ones(13)), LOSSES[name], generator)
    assert away.norm() > 1e-3


@each_mdp
@pytest.mark.parametrize("generator", [Logistic(), ScaledBasu()], ids=str)
@pytest.mark.parametrize("name", ["tbpo_a", "tbpo_q"])
def test_a_fit_from_the_reference_reaches_the_optimum(mdp, generator, name):
    best = mdp.optimum(BETA)
    assert mdp.kl(best, Policy(mdp.ref_logits)) > 0.1
    fitted = Population(mdp, beta=BETA, score=score_of[name]).fit(LOSSES[name], generator)
    assert mdp.kl(best, fitted) < 1e-8


@each_mdp
@pytest.mark.parametrize("generator", GENERATORS, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_criterion_can_fail(mdp, generator, fault):
    gradient = Population(mdp, beta=BETA).gradient(mdp.optimum(BETA), FAULTS[fault], generator)
    assert gradient.norm() > 1e-6


@each_mdp
def test_a_reversed_kl_moves_the_optimum(mdp):
    """KL(π ‖ π_ref) in place of KL(π_ref ‖ π), as a state baseline that depends on the policy."""
    policy = Policy(mdp.optimum(BETA).logits).leaf()
    log_ratio = policy.log_probs - mdp.ref_log_probs
    for direction, weights in (("right", -mdp.ref_log_probs.exp()), ("reversed", policy.log_probs)):
        per_token = weights * log_ratio if direction == "right" else weights.exp() * log_ratio
        with_kl = Policy(policy.logits, per_token.sum(-1))
        loss = Population(mdp, beta=BETA).loss(with_kl, TBPO_Q, ScaledBasu())
        (gradient,) = torch.autograd.grad(loss, policy.logits, retain_graph=True)
        assert gradient.norm() < 1e-12 if direction == "right" else gradient.norm() > 1e-6


@each_mdp
def test_the_wrong_score_moves_the_optimum(mdp):
    """TBPO-A's labels come from A_ref, TBPO-Q's from Q_ref; they are not interchangeable."""
    best = mdp.optimum(BETA)
    for name, score in (("tbpo_a", "value"), ("tbpo_q", "advantage")):
        population = Population(mdp, beta=BETA, score=score)
        assert population.gradient(best, LOSSES[name], ScaledBasu()).norm() > 1e-6


@each_mdp
@pytest.mark.parametrize("generator", GENERATORS, ids=str)
def test_sequence_labels_are_exact_for_the_summed_advantage(mdp, generator):
    """Σ_t A = Σ_t r − V(x) telescopes, so TDPO1 is exact under scheme "c" (docs/method.md §10).

    And under every generator, as BPO-A.
    """
    population, best = Population(mdp, beta=BETA, labels="c"), mdp.optimum(BETA)
    assert population.gradient(best, LOSSES["bpo_a"], generator).norm() < 1e-12
    reference = Policy(mdp.ref_logits)
    assert population.gradient(reference, LOSSES["bpo_a"], generator).norm() > 1e-3


@each_mdp
@pytest.mark.parametrize(
    ("name", "generator"),
    [
        ("tdpo1", Logistic()),
        ("bpo_a", Logistic()),
        ("bpo_a", ScaledBasu()),
        ("bpo_a", ScaledBasu(-0.5)),
    ],
    ids=str,
)
def test_a_fit_to_sequence_labels_reaches_the_optimum(mdp, name, generator):
    best = mdp.optimum(BETA)
    assert mdp.kl(best, Policy(mdp.ref_logits)) > 0.1
    fitted = Population(mdp, beta=BETA, labels="c").fit(LOSSES[name], generator)
    assert mdp.kl(best, fitted) < 1e-10


@each_mdp
def test_tdpo2_moves_the_optimum(mdp):
    """α = 1/2 and a chosen KL held still: neither is TDPO1, and the labels' optimum is not its."""
    population, best = Population(mdp, beta=BETA, labels="c"), mdp.optimum(BETA)
    assert population.gradient(best, LOSSES["tdpo1"], Logistic()).norm() < 1e-12
    assert population.gradient(best, LOSSES["tdpo2"], Logistic()).norm() > 1e-4
    held_still = PairLoss(
        lambda pair, **settings: LOSSES["tdpo2"].per_pair(pair, tdpo_alpha=1.0, **settings),
        "α of TDPO1, the chosen KL held still",
        "response",
        LOSSES["tdpo1"].settings,
        LOSSES["tdpo2"].needs,
    )
    assert population.gradient(best, held_still, Logistic()).norm() > 1e-4


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_robust_dpo_from_noisy_labels_is_dpo_from_clean_ones(share):
    """Labels the other way round with probability ε: the same population gradient."""
    mdp = MDPS["with eos"]
    population = Population(mdp, beta=BETA, labels="c")
    clean = population.probability.view(-1, 2)
    policy = Policy(mdp.ref_logits + 0.2)
    policy.logits[:, 0] += 0.4
    expected = population.gradient(policy, LOSSES["dpo"], Logistic())
    population.probability = ((1 - share) * clean + share * clean.flip(1)).flatten()
    robust = LOSSES["robust_dpo"]
    robust = replace(robust, settings=robust.settings | {"label_smoothing": share})
    found = population.gradient(policy, robust, Logistic())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    naive = population.gradient(policy, LOSSES["dpo"], Logistic())
    assert (naive - expected).norm() > 1e-4


@pytest.mark.slow
@each_mdp
def test_biases_of_the_table(mdp):
    """The rest of docs/method.md §10: small bias of TBPO under "c", large ones of its variants."""
    best = mdp.optimum(BETA)

    def distance(method, labels="a", **settings):
        score = "value" if method is TBPO_Q else "advantage"
        population = Population(mdp, beta=BETA, labels=labels, score=score, **settings)
        return mdp.kl(best, population.fit(method, ScaledBasu(), max_iterations=300))

    assert distance(DETACHED) < 1e-8  # a detached KL has the same minimiser under "a" ...
    exact = distance(TBPO_A, "c")
    assert 1e-5 < exact < 0.02
    assert distance(DETACHED, "c") > 3 * exact  # ... but not under "c"
    assert distance(LOSSES["tbpo"], "c") > 3 * exact
    assert distance(LOSSES["tbpo"]) > 1e-5
    assert distance(TBPO_Q, center_baseline=True) > 1e-3


def test_dpo_under_sequence_labels_finds_the_sequence_level_optimum():
    """π_ref exp(Σr/β): not π* (docs/method.md §10)."""
    mdp = MDPS["fixed length"]
    fitted = Population(mdp, beta=BETA, labels="c").fit(LOSSES["dpo"], Logistic())
    batch = mdp.responses
    of_tokens = torch.stack([mdp.ref_log_probs, mdp.rewards / BETA, fitted.log_probs])
    ref, reward, ours = (batch.align(t[mdp.states, batch.labels]).sum(1) for t in of_tokens)
    sequence_optimum = (ref + reward).log_softmax(0)
    assert float((sequence_optimum.exp() * (sequence_optimum - ours)).sum()) < 1e-8
    assert mdp.kl(mdp.optimum(BETA), fitted) > 1e-3


def test_unknown_labels_are_refused():
    with pytest.raises(ValueError, match="labels"):
        Population(MDPS["with eos"], beta=BETA, labels="b")
