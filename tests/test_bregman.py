"""The generators against their definition, docs/method.md §3's table and each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenratio.bregman import (
    GENERATORS,
    Basu,
    BregmanGenerator,
    Kliep,
    Logistic,
    Lsif,
    ScaledBasu,
    make_generator,
)

EXACT = settings(deadline=None, derandomize=True)
NAMED = [Logistic(), Kliep(), Lsif(), ScaledBasu()]
ALL = [
    *NAMED,
    *(Basu(lam) for lam in (-0.7, 0.0, 0.3, 2.0)),
    *(ScaledBasu(lam, scale) for lam in (-0.9, -0.5, 1e-25, 0.5, 1.0) for scale in (1.0, 3.0)),
]
each_generator = pytest.mark.parametrize("generator", ALL, ids=str)
log_ratios = st.floats(-12, 12)
lambdas = st.floats(-0.99, 3)


def grid(bound: float = 6.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-bound, bound, 61, dtype=dtype)


def autograd_slope(generator: BregmanGenerator, u: Tensor) -> Tensor:
    u = u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(generator.loss(u).sum(), u)
    return slope


def table_slope(generator: BregmanGenerator, u: Tensor) -> Tensor:
    """The last column of docs/method.md §3's table, spelled out again."""
    match generator:
        case Logistic():
            return 1 / (1 + (-u).exp())
        case Kliep():
            return u.exp() + 1
        case Lsif():
            return (2 * u).exp() + (-u).exp()
        case Basu(lam):
            return (1 + lam) * (((1 + lam) * u).exp() + (-lam * u).exp())
        case ScaledBasu(lam, scale):
            return (((1 + lam) * u).exp() + (-lam * u).exp()) / scale
    raise AssertionError(generator)


@each_generator
def test_closed_form_is_the_definition_up_to_a_constant(generator):
    u = grid()
    difference = generator.loss(u) - BregmanGenerator.loss(generator, u)
    torch.testing.assert_close(
        difference, difference[:1].expand_as(u), rtol=0, atol=1e-9 * generator.loss(u).abs().max()
    )


@each_generator
def test_h_prime_is_the_derivative_of_h_and_h_is_convex(generator):
    ratio = grid(3).exp().requires_grad_()
    (derivative,) = torch.autograd.grad(generator.h(ratio).sum(), ratio)
    torch.testing.assert_close(derivative, generator.h_prime(ratio).detach())
    assert (generator.h_prime(ratio).diff() > 0).all()


@pytest.mark.parametrize("generator", [*NAMED, Basu(0.4)], ids=str)
def test_definition_by_hand(generator):
    """ℓ_h(2) − ℓ_h(1) from h as the table prints it."""
    h = {
        Logistic: lambda r: (r * math.log(r) - (1 + r) * math.log(1 + r)) / 2,
        Kliep: lambda r: r * math.log(r) - r,
        Lsif: lambda r: (r - 1) ** 2 / 2,
        Basu: lambda r: (r**1.4 - r) / 0.4,
        ScaledBasu: lambda r: r * math.log(r) / 4,  # the limit λ → 0, up to a term linear in R
    }[type(generator)]

    def h_prime(r: float) -> float:
        return (h(r + 1e-6) - h(r - 1e-6)) / 2e-6

    def loss(r: float) -> float:
        return h_prime(r) * r - h(r) - h_prime(1 / r)

    ours = generator.loss(torch.tensor([0.0, math.log(2)], dtype=torch.float64))
    assert float(ours[1] - ours[0]) == pytest.approx(loss(2.0) - loss(1.0), abs=1e-8)


@each_generator
def test_slope_is_the_gradient_of_the_loss_and_the_table(generator):
    u = grid(30)
    # The gradient of expm1 is the result plus one: exact to rounding of 1, not of itself.
    torch.testing.assert_close(
        generator.slope(u), autograd_slope(generator, u), rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(generator.slope(u), table_slope(generator, u), rtol=1e-12, atol=0)
    base = BregmanGenerator.slope(generator, u.requires_grad_())
    torch.testing.assert_close(base, table_slope(generator, u).detach(), rtol=1e-12, atol=1e-15)
    assert not base.requires_grad


@each_generator
@EXACT
@given(u=log_ratios)
def test_proper_and_positive(generator, u):
    u = torch.tensor(u, dtype=torch.float64)
    slope, mirrored = generator.slope(u), generator.slope(-u)
    assert slope > 0
    torch.testing.assert_close(mirrored, (-u).exp() * slope, rtol=1e-12, atol=0)


@EXACT
@given(lam=lambdas.filter(lambda lam: lam < 0), u=log_ratios)
def test_lambda_and_its_mirror_have_the_same_gradient(lam, u):
    u = torch.tensor(u, dtype=torch.float64)
    mirror = -1 - lam
    if mirror <= -1:
        return
    torch.testing.assert_close(
        autograd_slope(ScaledBasu(lam), u), autograd_slope(ScaledBasu(mirror), u), rtol=1e-9, atol=0
    )


@EXACT
@given(lam=lambdas, scale=st.floats(0.1, 10), u=log_ratios)
def test_relations_between_generators(lam, scale, u):
    u = torch.tensor([u, 0.0], dtype=torch.float64)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(
        Basu(lam).loss(u), scale * (1 + lam) * ScaledBasu(lam, scale).loss(u), **close
    )
    sba_1, lsif = ScaledBasu(1.0, scale).loss(u), Lsif().loss(u) / scale
    torch.testing.assert_close(sba_1 - sba_1[1], lsif - lsif[1], **close)
    torch.testing.assert_close(ScaledBasu(0.0, scale).loss(u), Kliep().loss(u) / scale, **close)
    torch.testing.assert_close(Basu(0.0).loss(u), Kliep().loss(u), **close)


def test_published_default_starts_with_the_logistic_slope():
    zero = torch.zeros((), dtype=torch.float64)
    assert make_generator("sba") == ScaledBasu(lam=0.0, scale=4.0)
    for lam in (-0.5, 0.0, 0.5, 1.0):
        assert ScaledBasu(lam).slope(zero) == 0.5
    assert Logistic().slope(zero) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e-8, 1e-12, 1e-16, 1e-19, 1e-20, 1e-21, 1e-30])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("kind", [Basu, ScaledBasu])
def test_continuous_at_lambda_zero(kind, sign, size, dtype):
    u = torch.cat([grid(8, dtype), torch.tensor([1e-7, -1e-7, 0.0], dtype=dtype)])
    near, limit = kind(sign * size), kind(0.0)
    # The true change is of order λ u² beside values of order e^u.
    tolerance = 100 * size + 4 * torch.finfo(dtype).eps
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(near.loss(u), limit.loss(u), **close)
    torch.testing.assert_close(autograd_slope(near, u), autograd_slope(limit, u), **close)
    torch.testing.assert_close(near.slope(u), limit.slope(u), **close)
    torch.testing.assert_close(near.h(u.exp()), limit.h(u.exp()), rtol=tolerance, atol=1e-3 * size)
    torch.testing.assert_close(near.h_prime(u.exp()), limit.h_prime(u.exp()), **close)


def test_the_released_lsif_is_told_apart():
    """R² − 2R has a negative slope below R = 1 and is not proper (docs/method.md §9)."""
    u = torch.tensor([-1.0, -0.5, 0.7], dtype=torch.float64)
    wrong = 2 * (2 * u).exp() - 2 * u.exp()
    right = Lsif().slope(u)
    assert (wrong[:2] < 0).all()
    assert (right > 0).all()
    assert not torch.allclose(right / right[0], wrong / wrong[0], rtol=0.1)
    by_hand = torch.tensor([math.exp(2 * v) + math.exp(-v) for v in u.tolist()])
    torch.testing.assert_close(right, by_hand.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("sba", {"lam": -1.0}),
        ("sba", {"lam": -1.5}),
        ("sba", {"lam": math.nan}),
        ("sba", {"lam": math.inf}),
        ("sba", {"scale": 0.0}),
        ("sba", {"scale": -4.0}),
        ("sba", {"scale": math.nan}),
        ("sba", {"scale": math.inf}),
        ("sba", {"lam": "0"}),
        ("ba", {"lam": -1.0}),
        ("ba", {"lam": -math.inf}),
        ("ba", {}),
        ("ba", {"lam": 0.5, "scale": 4.0}),
        ("logistic", {"lam": 0.5}),
        ("kliep", {"scale": 1.0}),
        ("lsif", {"beta": 1.0}),
        ("dpo", {}),
        ("SBA", {}),
        ("", {}),
    ],
)
def test_domain_errors_are_value_errors(name, params):
    with pytest.raises(ValueError, match=r"lambda|scale|generator"):
        make_generator(name, **params)


def test_every_name_makes_its_generator():
    assert set(GENERATORS) == {"logistic", "kliep", "lsif", "ba", "sba"}
    for name, kind in GENERATORS.items():
        params = {"lam": 0.25} if name == "ba" else {}
        assert type(make_generator(name, **params)) is kind
    assert make_generator("sba", lam=0.5, scale=2.0) == ScaledBasu(0.5, 2.0)


@each_generator
def test_precision_is_float32_at_least(generator):
    low = torch.tensor([-2.3, 0.1, 3.7], dtype=torch.bfloat16)
    for function in (generator.loss, generator.slope):
        assert function(low).dtype == torch.float32
        torch.testing.assert_close(function(low), function(low.float()), rtol=0, atol=0)
        assert function(low.double()).dtype == torch.float64
        assert function(low.half()).dtype == torch.float32
    for function in (generator.h, generator.h_prime):
        assert function(low.exp()).dtype == torch.float32
        assert function(low.exp().double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logistic_is_finite_and_right_far_out(dtype):
    u = torch.tensor([-1e4, -100.0, -30.0, 30.0, 100.0, 1e4], dtype=dtype)
    loss, slope = Logistic().loss(u), autograd_slope(Logistic(), u)
    truth = [math.log1p(math.exp(v)) if v < 50 else v for v in u.tolist()]
    rounding = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-45}
    torch.testing.assert_close(loss, torch.tensor(truth, dtype=dtype), **rounding)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope, u.sigmoid())


@pytest.mark.parametrize("generator", [Kliep(), ScaledBasu(), ScaledBasu(0.5)], ids=str)
def test_finite_up_to_the_stated_overflow(generator):
    """float32 overflows at u > 88.7/(1+λ) and not before (docs/method.md §3)."""
    edge = 88.7 / (1 + getattr(generator, "lam", 0.0))
    u = torch.tensor([-edge, edge - 0.5])
    assert generator.loss(u).isfinite().all()
    assert autograd_slope(generator, u).isfinite().all()
    assert generator.loss(torch.tensor([edge + 0.5])).isinf().all()


def test_shape_is_kept():
    for shape in [(), (0,), (2, 3), (1, 0, 2)]:
        u = torch.zeros(shape)
        for generator in NAMED:
            assert generator.loss(u).shape == generator.slope(u).shape == shape
