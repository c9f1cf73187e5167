r"""Bregman generators and their losses of a log-ratio (arXiv 2605.12288; docs/method.md §3).

For a strictly convex generator `h` the loss at a ratio `R = e^u` is

    ℓ_h(R) = h'(R) R − h(R) − h'(1/R)

up to a constant that no gradient sees. Every generator here is *proper*: `ℓ'(−u) = e^{−u} ℓ'(u)`,
and every slope `dℓ/du` is positive, so each loss pushes the ratio of rejected over chosen down.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Below this, λ is λ → 0: e^{−λu} is 1 − λu to float64 rounding for every usable u.
_LAMBDA_ZERO = 1e-20


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class BregmanGenerator(ABC):
    """A strictly convex `h` on ratios R > 0. Computes in float32 at least; float64 stays float64.

    `loss` and `slope` are the definition, from `h` and `h_prime` alone; subclasses override them
    with closed forms that stay finite where `h(e^u)` does not.

    Attributes:
        name: what the setting `generator` calls it.
    """

    name: ClassVar[str]

    @abstractmethod
    def h(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The generator h(R), R > 0."""

    @abstractmethod
    def h_prime(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Its derivative h'(R), R > 0."""

    def loss(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """ℓ_h at R = e^u for `u = log_ratio` (nats, any real): h'(R) R − h(R) − h'(1/R)."""
        log_ratio = _at_least_float32(log_ratio)
        ratio, inverse = log_ratio.exp(), (-log_ratio).exp()
        return self.h_prime(ratio) * ratio - self.h(ratio) - self.h_prime(inverse)

    def slope(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """dℓ/du at `u = log_ratio`: the weight a token pair gets in the gradient; positive."""
        with torch.enable_grad():
            point = _at_least_float32(log_ratio).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(point).sum(), point)
        return slope


@dataclass(frozen=True)
class Logistic(BregmanGenerator):
    """h(R) = (R log R − (1 + R) log(1 + R)) / 2, so the loss is log(1 + R), DPO's."""

    name: ClassVar[str] = "logistic"

    def h(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        ratio = _at_least_float32(ratio)
        return (torch.xlogy(ratio, ratio) - (1 + ratio) * ratio.log1p()) / 2

    def h_prime(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        # (log R − log(1 + R)) / 2 without the cancellation at large R.
        return F.logsigmoid(_at_least_float32(ratio).log()) / 2

    def loss(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        # log(1 + e^u); F.softplus is cut off at u = 20, which float64 sees.
        return -F.logsigmoid(-_at_least_float32(log_ratio))

    def slope(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _at_least_float32(log_ratio).sigmoid()


@dataclass(frozen=True)
class Kliep(BregmanGenerator):
    """h(R) = R log R − R, so the loss is e^u + u, which falls without bound as u → −∞."""

    name: ClassVar[str] = "kliep"

    def h(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        ratio = _at_least_float32(ratio)
        return torch.xlogy(ratio, ratio) - ratio

    def h_prime(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _at_least_float32(ratio).log()

    def loss(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = _at_least_float32(log_ratio)
        return log_ratio.exp() + log_ratio

    def slope(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _at_least_float32(log_ratio).exp() + 1


@dataclass(frozen=True)
class Lsif(BregmanGenerator):
    """h(R) = (R − 1)² / 2, so the loss is e^{2u}/2 − e^{−u}; not R² − 2R (docs/method.md §9)."""

    name: ClassVar[str] = "lsif"

    def h(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (_at_least_float32(ratio) - 1).square() / 2

    def h_prime(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _at_least_float32(ratio) - 1

    def loss(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = _at_least_float32(log_ratio)
        return (2 * log_ratio).exp() / 2 - (-log_ratio).exp()

    def slope(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = _at_least_float32(log_ratio)
        return (2 * log_ratio).exp() + (-log_ratio).exp()


@dataclass(frozen=True)
class ScaledBasu(BregmanGenerator):
    """h(R) = (R^{1+λ} − R) / (s λ (1 + λ)): SBA, by default the published λ = 0, s = 4.

    The loss is (e^{(1+λ)u}/(1+λ) − expm1(−λu)/λ)/s, continuous in λ through 0, where it is (e^u +
    u)/s. With s = 4 its slope at R = 1 is the logistic loss's, 1/2.

    Args:
        lam: λ > −1. Bounded below for λ < 0; not convex in u for λ > 0.
        scale: s > 0.
    Raises:
        ValueError: λ ≤ −1, s ≤ 0, or either not finite.
    """

    name: ClassVar[str] = "sba"

    lam: float = 0.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        _check_lambda(self.lam)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive and finite, not {self.scale}")

    def h(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        ratio = _at_least_float32(ratio)
        return ratio * _box_cox(ratio.log(), self.lam) / (self.scale * (1 + self.lam))

    def h_prime(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = _at_least_float32(ratio).log()
        return (_box_cox(log_ratio, self.lam) + 1 / (1 + self.lam)) / self.scale

    def loss(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = _at_least_float32(log_ratio)
        power = 1 + self.lam
        return ((power * log_ratio).exp() / power - _box_cox(-log_ratio, self.lam)) / self.scale

    def slope(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        log_ratio = _at_least_float32(log_ratio)
        return (((1 + self.lam) * log_ratio).exp() + (-self.lam * log_ratio).exp()) / self.scale


@dataclass(frozen=True)
class Basu(BregmanGenerator):
    """h(R) = (R^{1+λ} − R) / λ: BA(λ) = s (1 + λ) · SBA(λ, s) (docs/method.md §3).

    Args:
        lam: λ > −1; λ → 0 is KLIEP.
    Raises:
        ValueError: λ ≤ −1 or not finite.
    """

    name: ClassVar[str] = "ba"

    lam: float

    def __post_init__(self) -> None:
        _check_lambda(self.lam)

    @property
    def _scaled(self) -> ScaledBasu:
        return ScaledBasu(self.lam, scale=1 / (1 + self.lam))

    def h(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self._scaled.h(ratio)

    def h_prime(self, ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self._scaled.h_prime(ratio)

    def loss(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self._scaled.loss(log_ratio)

    def slope(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self._scaled.slope(log_ratio)


def _check_lambda(lam: float) -> None:
    if not (math.isfinite(lam) and lam > -1):
        raise ValueError(f"lambda must be greater than -1 and finite, not {lam}")


def _box_cox(log_value: Tensor, lam: float) -> Tensor:
    """(e^{λv} − 1)/λ for `v = log_value`, continuous in λ: v at λ = 0."""
    if abs(lam) < _LAMBDA_ZERO:
        return log_value
    return torch.expm1(lam * log_value) / lam


GENERATORS: dict[str, type[BregmanGenerator]] = {
    generator.name: generator for generator in (Logistic, Kliep, Lsif, Basu, ScaledBasu)
}


def make_generator(name: str, **params: Any) -> BregmanGenerator:
    """The generator of that name: `logistic`, `kliep`, `lsif`, `ba` (lam), `sba` (lam, scale).

    >>> make_generator("sba", lam=0.5)
    ScaledBasu(lam=0.5, scale=4.0)

    Raises:
        ValueError: an unknown name, a parameter the generator does not have or lacks, or one
            outside its domain.
    """
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name!r}; choose one of {', '.join(GENERATORS)}")
    try:
        return GENERATORS[name](**params)
    except TypeError as error:
        raise ValueError(f"generator {name!r} does not take {params}: {error}") from None
