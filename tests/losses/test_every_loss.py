"""Every method of the table: against loops, and what all of them promise."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from loss_oracles import ORACLES, by_hand, logistic, sba
from pairs import (
    ALL_NEEDS,
    fresh,
    gradients,
    leaves,
    make_pairs,
    map_sides,
    map_values,
    only,
    swapped,
)
from tokenratio.bregman import Logistic, ScaledBasu
from tokenratio.losses import METHODS
from tokenratio.types import PairStatistics, ResponseStatistics

CHOSEN, REJECTED = [5, 1, 7, 4, 2], [3, 4, 7, 1, 6]
each_method = pytest.mark.parametrize("name", METHODS)
# Settings away from the defaults, so that none is used by mistake.
OTHERS = {
    "beta": 0.37,
    "label_smoothing": 0.2,
    "simpo_gamma": 0.6,
    "tdpo_alpha": 0.8,
    "tis_lower": -0.3,
    "tis_upper": 0.9,
    "sepo_share": 0.5,
    "t_reg_weight": 0.4,
    "arc_chunk_length": 3,
    "arc_target_margin": 1.3,
}
# What may hold anything, even NaN, past a response's end; the others ask for zeros there.
CARELESS = {
    **dict.fromkeys(("tbpo_a", "tbpo_q", "tbpo", "adpo", "arc_bpo"), ("log_probs",)),
    "sft": ("log_probs",),
    "sepo": ("log_probs", "contrast"),
}
LABELLED = [name for name, method in METHODS.items() if "label_smoothing" in method.settings]


def others(name):
    """Those of them the method has; the user's generator aside."""
    return {key: OTHERS[key] for key in METHODS[name].settings if key in OTHERS}


def takes_generator(name):
    return "generator" in METHODS[name].settings


def test_no_method_lacks_an_oracle():
    assert set(ORACLES) == set(METHODS)


CASES = [
    (name, smoothing, lam)
    for name in METHODS
    for smoothing in ((0.0, 0.2) if name in LABELLED else (None,))
    for lam in ((None, -0.5, 0.0, 1.0) if takes_generator(name) else (None,))
]


@pytest.mark.parametrize(("name", "smoothing", "lam"), CASES)
def test_values_and_gradients_by_hand(name, smoothing, lam):
    """In float64; unequal lengths; gradients in everything the statistics hold."""
    settings = others(name) | ({} if smoothing is None else {"label_smoothing": smoothing})
    hand = dict(settings)
    if takes_generator(name):
        generator = Logistic() if lam is None else ScaledBasu(lam)
        settings["generator"] = generator
        hand["ell"] = logistic if lam is None else sba(lam)
        if name == "arc_bpo":
            hand = others(name) | {"h": generator.h, "h_prime": generator.h_prime}
    pair = make_pairs(CHOSEN, REJECTED)
    given = only(pair, METHODS[name].needs)
    ours = METHODS[name].per_pair(given, **settings)
    theirs = by_hand(name, pair, **hand)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    expected = gradients(theirs, pair)
    either = pair.chosen.mask | pair.rejected.mask
    masks = {"chosen": pair.chosen.mask, "rejected": pair.rejected.mask}
    for key, gradient in gradients(ours, given).items():
        # What the contrast is made of is known beforehand.
        if "contrast" not in key:
            exists = masks.get(key.split(".")[0], either)
            torch.testing.assert_close(
                gradient * exists, expected[key], rtol=1e-10, atol=1e-12, msg=key
            )


@each_method
def test_defaults_are_those_of_its_settings(name):
    method, pair = METHODS[name], only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs)
    assert torch.equal(method.per_pair(pair), method.per_pair(pair, **method.settings))


@each_method
def test_every_setting_matters(name):
    method, pair = METHODS[name], only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs)
    before = method.per_pair(pair)
    changed = others(name) | ({"generator": ScaledBasu(0.3)} if takes_generator(name) else {})
    assert changed.keys() == method.settings.keys()
    for key, value in changed.items():
        assert not torch.equal(method.per_pair(pair, **{key: value}), before), key


@each_method
def test_reads_no_more_than_it_needs(name):
    """What it does not declare changes nothing, whatever it is."""
    method, pair = METHODS[name], make_pairs(CHOSEN, REJECTED)
    given = only(pair, method.needs)
    loss, expected = method.per_pair(given), gradients(method.per_pair(given), given)
    assert torch.equal(method.per_pair(pair), loss)
    found = gradients(method.per_pair(pair), pair)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all((found[key] == 0).all() for key in found.keys() - expected.keys())


@pytest.mark.parametrize(
    ("name", "need"), [(name, need) for name in METHODS for need in sorted(METHODS[name].needs)]
)
def test_refuses_statistics_that_lack_what_it_needs(name, need):
    assert need in ALL_NEEDS
    pair = only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs - {need})
    with pytest.raises(ValueError, match=r"reference|KL|baseline|contrast"):
        METHODS[name].per_pair(pair)


@each_method
def test_everything_it_needs_is_used(name):
    """No need without a use: each of them changes the loss."""
    pair = only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs)
    before = METHODS[name].per_pair(pair)
    for key, value in leaves(pair).items():
        side, _, field = key.rpartition(".")
        if not side:
            changed = replace(pair, log_state_weight=-value)
        else:
            response = replace(getattr(pair, side), **{field: -value})
            changed = replace(pair, **{side: response})
        differs = not torch.equal(METHODS[name].per_pair(changed), before)
        assert differs == (name != "sft" or side == "chosen"), key
    assert METHODS[name].has_reference == ("ref_log_probs" in METHODS[name].needs)
    assert METHODS[name].needs <= ALL_NEEDS


@pytest.mark.parametrize("name", CARELESS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_values_past_the_end_poison_neither_loss_nor_gradient(name, bad):
    clean = only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs)

    def poison(side):
        dirty = {
            key: getattr(side, key).detach().masked_fill(~side.mask, bad).requires_grad_()
            for key in CARELESS[name]
        }
        return replace(side, **dirty)

    results = []
    for pair in (clean, map_sides(clean, poison)):
        loss = METHODS[name].per_pair(pair)
        found = gradients(loss, pair)
        results.append([loss, *found.values()])
        for key in ("chosen", "rejected"):
            past = found[f"{key}.log_probs"][~getattr(pair, key).mask]
            assert (past == 0).all()
    for before, after in zip(*results, strict=True):
        assert after.isfinite().all()
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@each_method
def test_padding_changes_nothing(name):
    pair = only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs)

    def pad(value):
        return F.pad(value, (0, 3))

    padded = map_values(pair, pad, of_mask=pad)
    loss, longer = (METHODS[name].per_pair(which) for which in (pair, padded))
    torch.testing.assert_close(longer, loss, rtol=1e-13, atol=1e-13)
    found = gradients(longer, padded)
    for key, expected in gradients(loss, pair).items():
        torch.testing.assert_close(found[key][:, :-3], expected, rtol=1e-13, atol=1e-13, msg=key)


def far_apart(name, dtype, gaps):
    """Short responses whose log-ratio is `gaps` nats at each token of a side."""
    sides = []
    for gap, lengths in zip(gaps, ([3, 1, 3], [3, 3, 1]), strict=True):
        mask = torch.arange(3) < torch.tensor(lengths)[:, None]
        filled = mask.to(dtype)
        values = {
            "log_probs": -1 + min(gap, 0.0) * filled,
            "ref_log_probs": -1 - max(gap, 0.0) * filled,
            "kl": abs(gap) * filled,
            "contrast": gap * filled,
        }
        values = {key: (value * mask).requires_grad_() for key, value in values.items()}
        sides.append(ResponseStatistics(mask=mask, **values))
    weight = (10.0 * (sides[0].mask | sides[1].mask)).to(dtype).requires_grad_()
    return only(PairStatistics(*sides, weight), METHODS[name].needs)


@each_method
def test_finite_at_large_log_ratios(name):
    """±80 nats a token of short responses, at each method's own β and generator."""
    for case in itertools.product(
        (torch.float32, torch.bfloat16),
        itertools.product((80.0, -80.0), repeat=2),
        (0.0, 0.1) if name in LABELLED else (None,),
    ):
        dtype, gaps, smoothing = case
        settings = {} if smoothing is None else {"label_smoothing": smoothing}
        pair = far_apart(name, dtype, gaps)
        loss = METHODS[name].per_pair(pair, **settings)
        assert loss.isfinite().all(), case
        for key, gradient in gradients(loss, pair).items():
            assert gradient.isfinite().all(), (key, case)


@each_method
def test_bfloat16_is_near_float64_of_the_same_values(name):
    low = map_values(
        only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs),
        lambda value: value.bfloat16(),
    )
    exact = map_values(low, lambda value: value.double())
    losses = [METHODS[name].per_pair(pair) for pair in (low, exact)]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=3e-2, atol=3e-2)
    found = gradients(losses[0], low)
    for key, expected in gradients(losses[1], exact).items():
        torch.testing.assert_close(found[key].double(), expected, rtol=5e-2, atol=2e-2, msg=key)


@each_method
def test_no_pairs_and_empty_responses(name):
    """No pair at all, and pairs without a token on one side or both."""
    method = METHODS[name]
    for chosen, rejected in (([0, 0, 2], [2, 0, 0]), ([0, 0, 0], [0, 0, 0])):
        pair = only(make_pairs(chosen, rejected), method.needs)
        loss = method.per_pair(pair)
        assert loss.isfinite().all()
        assert all(value.isfinite().all() for value in gradients(loss, pair).values())
        if method.is_local:
            assert loss.tolist() == [0.0] * 3
    pair = only(make_pairs([2, 2], [2, 2]), method.needs)
    none = map_values(pair, lambda value: value[:0], of_mask=lambda mask: mask[:0])
    assert method.per_pair(none).shape == (0,)


@each_method
def test_a_pair_is_looked_at_by_itself(name):
    """Each pair alone gives what it gives among the others."""
    pair = only(make_pairs(CHOSEN, REJECTED), METHODS[name].needs)
    together = METHODS[name].per_pair(pair, **others(name))
    for row in range(len(CHOSEN)):
        this = slice(row, row + 1)
        one = map_values(
            pair, lambda value, this=this: value[this], of_mask=lambda mask, this=this: mask[this]
        )
        alone = METHODS[name].per_pair(one, **others(name))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-13, atol=1e-13)


def separated():
    """A pair whose chosen response is likelier, by ratio too, and its rejected one unlikelier."""
    pair = make_pairs([4, 4], [4, 4], scale=0.1)

    def move(side, by):
        return replace(side, log_probs=(side.log_probs.detach() + by).requires_grad_())

    return replace(pair, chosen=move(pair.chosen, 1.0), rejected=move(pair.rejected, -1.0))


@each_method
def test_the_right_order_costs_less(name):
    pair = separated()
    right = METHODS[name].per_pair(only(pair, METHODS[name].needs))
    wrong = METHODS[name].per_pair(only(swapped(pair), METHODS[name].needs))
    assert (right < wrong).all()
    given = fresh(only(pair, METHODS[name].needs))
    found = gradients(METHODS[name].per_pair(given), given)
    assert (found["chosen.log_probs"].sum(-1) < 0).all()
    if name != "sft":
        assert (found["rejected.log_probs"].sum(-1) > 0).all()
