"""Products with the heads of both models: which are rounded, and by how much at most."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenratio.statistics import Head, head
from tokenratio.statistics.products import Precision, Products

UNIT = 2.0**-9  # relative rounding of bfloat16
ROWS, VOCABULARY, WIDTH = 11, 257, 48


def make(*, one_head=True, bias=False, softcap=None, distance=0.1, autocast=True):
    """Products in float32, the states of both models, and the policy's head."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=rng)

    policy = Head(random(VOCABULARY, WIDTH), random(VOCABULARY) if bias else None, softcap)
    reference = policy.detach() if one_head else Head(random(VOCABULARY, WIDTH), None, softcap)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        precision = Precision.of(torch.float32, policy.weight)
    hidden = random(ROWS, WIDTH)
    products = Products(policy, reference, precision, rows=ROWS + 3)
    return products, hidden, hidden + distance * random(ROWS, WIDTH), policy, reference


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch):
    monkeypatch.setattr(head, "multiplies_bfloat16", lambda device: True)


class _Dtypes(TorchDispatchMode):
    """The dtype of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.seen.append(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_rounding_is_that_of_the_difference(distance, bias):
    """Three roundings of one unit: of either factor and of the result."""
    products, hidden, ref_hidden, policy, _ = make(distance=distance, bias=bias)
    logits, ref_logits = products.write_logits(hidden, ref_hidden)
    exact, ref_exact = (policy.to(torch.float64).logits(h.double()) for h in (hidden, ref_hidden))
    torch.testing.assert_close(ref_logits.double(), ref_exact, rtol=1e-5, atol=1e-5)
    terms = (hidden - ref_hidden).abs().double() @ policy.weight.abs().double().T
    error = ((logits - ref_logits).double() - (exact - ref_exact)).abs()
    assert (error <= 3 * UNIT * terms + 1e-5).all()
    assert (error.max() > 1e-5) == (distance > 0)  # the rounding is there


def test_a_gradient_is_rounded_three_times():
    products, *_, policy, _ = make()
    d_logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    error = (products.d_hidden(d_logits) - d_logits.double() @ policy.weight.double()).abs()
    assert (error <= 3 * UNIT * (d_logits.abs() @ policy.weight.abs()) + 1e-5).all()
    assert error.max() > 1e-3


def test_what_is_rounded():
    products, hidden, ref_hidden, *_ = make()
    with _Dtypes() as dtypes:
        logits, _ = products.write_logits(hidden, ref_hidden)
        products.d_hidden(logits)
        products.add_d_weight(torch.zeros(VOCABULARY, WIDTH), logits, hidden)
    low, full = torch.bfloat16, torch.float32
    assert dtypes.seen == [full, low, low, full]  # reference, policy, states, weight


@pytest.mark.parametrize("settings", [{"one_head": False}, {"softcap": 3.0}])
def test_other_logits_are_not_rounded(settings):
    products, hidden, ref_hidden, policy, reference = make(**settings)
    logits, ref_logits = products.write_logits(hidden, ref_hidden)
    torch.testing.assert_close(logits, policy.logits(hidden))
    torch.testing.assert_close(ref_logits, reference.logits(ref_hidden))


@pytest.mark.parametrize("why", ["no autocast", "no instructions"])
def test_nothing_is_rounded(why, monkeypatch):
    monkeypatch.setattr(head, "multiplies_bfloat16", lambda device: why == "no autocast")
    products, hidden, ref_hidden, policy, _ = make(autocast=why != "no autocast")
    with _Dtypes() as dtypes:
        logits, _ = products.write_logits(hidden, ref_hidden)
        torch.testing.assert_close(logits, policy.logits(hidden), rtol=0, atol=1e-5)
        assert products.d_hidden(logits).dtype == torch.float32
    assert set(dtypes.seen) == {torch.float32}


def test_float64_stays_float64():
    weight = torch.zeros(3, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        precision = Precision.of(torch.float64, weight)
    assert precision == Precision(*[torch.float64] * 3)
