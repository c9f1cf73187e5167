"""What the viewer shows of a method is what the method's own loss computes."""

import pytest
import torch

from loss_oracles import ORACLES, by_hand, logistic, sba
from pairs import gradients, make_pairs, only
from tokenratio.bregman import ScaledBasu
from tokenratio.errors import TokenRatioError
from tokenratio.losses import LOSSES, RatioMatching
from tokenratio.report.credit_methods import (
    ShownMethod,
    method_values,
    notes_on_settings,
    shown_methods,
)

CHOSEN, REJECTED = [5, 1, 7, 4], [3, 4, 7, 1]
SHOWN = [name for name, method in LOSSES.items() if not method.needs_contrast]
RATIOS = [name for name in SHOWN if isinstance(LOSSES[name], RatioMatching)]


def settings_of(name):
    """For the library and for the oracle, away from the defaults."""
    ours = dict(LOSSES[name].settings) | {"beta": 0.37}
    if "label_smoothing" in ours:
        ours["label_smoothing"] = 0.1
    theirs = {key: value for key, value in ours.items() if key != "generator"}
    if "generator" in ours:
        generator = ScaledBasu(-0.5)
        ours["generator"] = generator
        theirs["ell"] = sba(-0.5)
        if name == "arc_bpo":
            del theirs["ell"]
            theirs |= {"h": generator.h, "h_prime": generator.h_prime}
    return ours, theirs


def shown(name):
    ours, theirs = settings_of(name)
    pair = make_pairs(CHOSEN, REJECTED)
    given = only(pair, LOSSES[name].needs)
    return method_values(ShownMethod(name, LOSSES[name], ours), given), pair, theirs


@pytest.mark.parametrize("name", SHOWN)
def test_losses_and_pushes_are_those_of_the_oracle(name):
    values, pair, settings = shown(name)
    expected = by_hand(name, pair, **settings)
    torch.testing.assert_close(values.loss, expected.detach(), rtol=1e-12, atol=1e-12)
    found = gradients(expected, pair)
    for side in ("chosen", "rejected"):
        push = getattr(values, f"{side}_push")
        torch.testing.assert_close(push, -found[f"{side}.log_probs"], rtol=1e-10, atol=1e-12)


def log_ratio_by_hand(name, pair, row, step, settings):
    """log R of one step from scalars; 0 for a side that has no token there."""

    def side(which):
        response = getattr(pair, which)
        if not response.mask[row, step]:
            return 0.0, 0.0
        return (
            (response.log_probs[row, step] - response.ref_log_probs[row, step]).item(),
            response.kl[row, step].item(),
        )

    (chosen, chosen_kl), (rejected, rejected_kl) = side("chosen"), side("rejected")
    weight = {
        "none": 0.0,
        "kl": settings.get("tdpo_alpha", 1.0) * (rejected_kl - chosen_kl),
        "baseline": pair.log_state_weight[row, step].item(),
    }[LOSSES[name].state_weight]
    return settings["beta"] * (rejected - chosen + weight), weight


@pytest.mark.parametrize("name", RATIOS)
def test_steps_are_those_of_the_formula(name):
    values, pair, settings = shown(name)
    method = LOSSES[name]
    loss = settings.get("ell", logistic)
    smoothing = settings["label_smoothing"]
    for row in range(len(CHOSEN)):
        lengths = CHOSEN[row], REJECTED[row]
        steps = range(min(lengths) if method.is_local else max(lengths))
        by_step = [log_ratio_by_hand(name, pair, row, step, settings) for step in steps]
        assert values.steps["pair_log_ratio"][row, : len(steps)].tolist() == pytest.approx(
            [u for u, _ in by_step], abs=1e-12
        )
        assert not values.steps["pair_log_ratio"][row, len(steps) :].any()
        if method.state_weight != "none":
            assert values.steps["log_state_weight"][row, : len(steps)].tolist() == pytest.approx(
                [weight for _, weight in by_step], abs=1e-12
            )
        for step, (u, _) in enumerate(by_step):
            point = u if method.is_local else sum(each for each, _ in by_step)
            at = torch.tensor(point, dtype=torch.float64, requires_grad=True)
            one = (1 - smoothing) * loss(at)
            other = smoothing * loss(-at)
            value = (one - other) / (1 - 2 * smoothing) if name == "robust_dpo" else one + other
            (slope,) = torch.autograd.grad(value, at)
            assert float(values.steps["slope"][row, step]) == pytest.approx(float(slope), rel=1e-9)
            if method.is_local:
                assert float(values.steps["loss"][row, step]) == pytest.approx(
                    float(value.detach())
                )
        if method.is_local:
            total = values.steps["loss"][row].sum()
            share = len(steps) if method.aggregation == "mean" else 1
            assert float(total / share) == pytest.approx(float(values.loss[row]))
    assert ("loss" in values.steps) == method.is_local


def test_methods_without_a_ratio_have_no_steps():
    assert not shown("simpo")[0].steps
    assert set(SHOWN) - set(RATIOS) == {"ipo", "simpo", "arc_bpo"}
    assert set(ORACLES) >= set(SHOWN)


def test_a_run_s_own_method_comes_first_with_its_own_settings():
    config = {"loss": "tdpo2", "beta": 0.3, "tdpo_alpha": 0.9, "label_smoothing": 0.0}
    found, notes = shown_methods(None, [config], beta=None, has_baseline=True)
    assert [each.name for each in found] == ["tdpo2", "tbpo_a", "tbpo_q", "tdpo1", "dpo"]
    assert (found[0].settings["beta"], found[0].settings["tdpo_alpha"]) == (0.3, 0.9)
    assert found[1].settings["beta"] == 0.1
    assert not notes


def test_a_second_run_adds_its_method_and_what_is_not_its_own_is_said():
    """Each method is shown once, as the first run that was trained with it had it."""
    runs = {
        "a": {"loss": "dpo", "beta": 0.5},
        "b": {"loss": "tdpo1", "beta": 0.01},
        "c": {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.1},
        "d": {},
    }
    found, _ = shown_methods(None, [*runs.values()], beta=None, has_baseline=False)
    shown_beta = {each.name: each.settings["beta"] for each in found if each.is_own}
    assert shown_beta == {"dpo": 0.5, "tdpo1": 0.01}
    assert notes_on_settings(runs, found, beta=0.5) == [
        "b is not shown with its own settings: rewards have β = 0.5, not its 0.01",
        "c is not shown with its own settings: dpo has another label_smoothing",
    ]


def test_methods_that_cannot_be_shown():
    found, notes = shown_methods(None, [{"loss": "tis_dpo"}], beta=0.2, has_baseline=False)
    assert [each.name for each in found] == ["tbpo_a", "tdpo1", "dpo"]
    assert all(each.settings["beta"] == 0.2 for each in found)
    assert notes == ["tis_dpo, the run's own method, is not shown: it needs token scores"]
    with pytest.raises(
        TokenRatioError, match="tbpo_q cannot be shown: it needs the state baseline"
    ):
        shown_methods(["tbpo_q"], [{}], beta=None, has_baseline=False)
    with pytest.raises(TokenRatioError, match="unknown loss 'tdop1'; did you mean 'tdpo1'"):
        shown_methods(["tdop1"], [{}], beta=None, has_baseline=False)
