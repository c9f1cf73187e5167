"""Gold reward against KL(π ‖ π_ref): what a method gains for its distance from the reference.

A method is a set of policies, its checkpoints or its βs, each with a KL (nats per response) and a
mean reward. A policy that answers with π₁ or π₂ at random has the mean of their rewards and, the KL
being convex, at most the mean of their KLs. So every point of the upper concave hull of the
policies and the reference can be reached; past the last policy the frontier is flat.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.results import PolicyMeasures


@dataclass(frozen=True)
class PolicyPoint:
    """A policy's distance and reward.

    Attributes:
        label: its checkpoint or β.
        kl: KL(π ‖ π_ref) ≥ 0 in nats per response.
        reward: its mean gold reward.
        by_prompt: `(Σ KL, Σ reward, responses)` of each prompt, for the bootstrap; None if only
            the means are known.
    """

    label: str
    kl: float
    reward: float
    by_prompt: Mapping[Hashable, tuple[float, float, int]] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.reward) and math.isfinite(self.kl) and self.kl >= 0):
            raise TokenRatioError(
                f"policy {self.label}: reward {self.reward} and KL {self.kl} must be finite, and "
                "the KL not negative"
            )


@dataclass(frozen=True)
class Frontier:
    """The reward that a method reaches at each KL.

    Attributes:
        points: the policies not dominated by another (KL as small and reward as large, one of them
            strictly), by rising KL.
        dominated: labels of the others.
        hull: corners `(kl, reward)` of the upper concave hull, reference first; rewards rise.
        area: mean height of the hull above the reference's reward over KLs from 0 to `budget`, in
            units of `unit`: 0 for the reference itself, 1 for a gain of `unit` that costs no KL.
        standard_error, low, high: of the area, by a bootstrap over prompts, with the 95 %
            percentile interval; nan unless the reference and all policies have `by_prompt`. A hull
            over noisy points is biased upwards, the more points the more.
        budget, unit: those of the area; areas with different ones cannot be compared.
        resampled: the area in each resample, paired between the methods of one call.
    """

    points: tuple[PolicyPoint, ...]
    dominated: tuple[str, ...]
    hull: tuple[tuple[float, float], ...]
    area: float
    standard_error: float
    low: float
    high: float
    budget: float
    unit: float
    resampled: tuple[float, ...] = field(repr=False)


def policy_point(
    label: str, kls: Sequence[float], rewards: Sequence[float], prompts: Sequence[Hashable]
) -> PolicyPoint:
    """A policy from the KL, reward and prompt of each of its responses.

    Raises:
        TokenRatioError: lengths differ, there are no responses, a value is not finite, or the mean
            KL is negative.
    """
    if not len(kls) == len(rewards) == len(prompts) > 0:
        raise TokenRatioError(
            f"policy {label}: {len(kls)} KLs, {len(rewards)} rewards, {len(prompts)} prompts; each "
            "response must have one of each"
        )
    by_prompt: dict[Hashable, tuple[float, float, int]] = {}
    for kl, reward, prompt in zip(kls, rewards, prompts, strict=True):
        old = by_prompt.get(prompt, (0.0, 0.0, 0))
        by_prompt[prompt] = (old[0] + kl, old[1] + reward, old[2] + 1)
    means = math.fsum(kls) / len(kls), math.fsum(rewards) / len(rewards)
    return PolicyPoint(label, *means, by_prompt)


def compare_frontiers(
    methods: Mapping[str, Sequence[PolicyPoint]],
    reference: PolicyPoint,
    *,
    budget: float | None = None,
    unit: float | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Frontier]:
    """The frontiers of several methods, with the same budget and unit.

    Args:
        methods: the policies of each, by name.
        reference: π_ref, with KL 0.
        budget: the largest KL considered; by default the smallest of the methods' largest KLs.
        unit: the gain in reward over the reference that counts as 1; by default the largest that
            any method reaches within the budget. The bootstrap varies neither budget nor unit.
        num_bootstrap: resamples of the prompts, the same for all methods and the reference.
        seed: of the resamples.
    Raises:
        TokenRatioError: a method has no policies, the reference's KL is not 0, budget or unit is
            not positive, or policies and reference answered different prompts.
    """
    if reference.kl != 0:
        raise TokenRatioError(f"the reference has KL {reference.kl} to itself: it must be 0")
    if empty := [name for name, points in methods.items() if not points]:
        raise TokenRatioError(f"method {empty[0]} has no policy")
    if not methods:
        return {}
    if budget is None:
        budget = min(max(point.kl for point in points) for points in methods.values())
    for name, value in (("KL budget", budget), ("unit of reward", unit)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise TokenRatioError(f"the {name} must be positive and finite, not {value}")
    hulls = {
        name: _hull([(point.kl, point.reward) for point in points], reference.reward)
        for name, points in methods.items()
    }
    if unit is None:
        unit = max(_height(hull, budget) for hull in hulls.values()) - reference.reward
    frontiers = {}
    for name, points in methods.items():
        areas = [
            _area(_hull(coordinates, base), base, budget, unit)
            for base, coordinates in _resamples(points, reference, num_bootstrap, seed)
        ]
        low, high = np.quantile(areas, (0.025, 0.975)) if len(areas) > 1 else (math.nan, math.nan)
        best = non_dominated(points)
        frontiers[name] = Frontier(
            points=tuple(best),
            dominated=tuple(point.label for point in points if point not in best),
            hull=tuple(hulls[name]),
            area=_area(hulls[name], reference.reward, budget, unit),
            standard_error=float(np.std(areas, ddof=1)) if len(areas) > 1 else math.nan,
            low=float(low),
            high=float(high),
            budget=budget,
            unit=unit,
            resampled=tuple(areas),
        )
    return frontiers


def frontiers_of(
    policies: Sequence[PolicyMeasures], reference_name: str
) -> tuple[dict[str, list[PolicyPoint]], PolicyPoint, dict[str, Frontier]] | None:
    """The policies of each group, the reference, and each group's frontier.

    None unless gold rewards and KLs of the reference and at least two policies are known.
    """
    points: dict[str, list[PolicyPoint]] = {}
    reference = None
    for policy in policies:
        prompts = [prompt for prompt, _, _ in policy.values("gold_reward")]
        rewards = [value for _, _, value in policy.values("gold_reward")]
        kls = [value for _, _, value in policy.values("kl_policy_ref")]
        if rewards and policy.policy == reference_name:
            reference = policy_point(policy.policy, [0.0] * len(rewards), rewards, prompts)
        elif rewards and kls:
            if sum(kls) < 0:  # an estimate of a KL of about 0
                kls = [0.0] * len(kls)
            point = policy_point(policy.policy, kls, rewards, prompts)
            points.setdefault(policy.group, []).append(point)
    # A policy equal to the reference has no frontier.
    points = {name: found for name, found in points.items() if any(p.kl > 0 for p in found)}
    if reference is None or sum(map(len, points.values())) < 2:
        return None
    return points, reference, compare_frontiers(points, reference)


def frontier_lines(policies: Sequence[PolicyMeasures], reference_name: str) -> list[str]:
    """The frontier of each group of policies in words, if gold rewards and KLs are known."""
    found = frontiers_of(policies, reference_name)
    if found is None:
        return []
    lines = ["Gold reward for KL to the reference, normalised area under the frontier:"]
    for name, frontier in found[2].items():
        best = ", ".join(f"{p.label} ({p.kl:.2f} nats, {p.reward:.3f})" for p in frontier.points)
        beaten = f"; dominated: {', '.join(frontier.dominated)}" if frontier.dominated else ""
        lines.append(
            f"- {name}: {frontier.area:.3f} ± {frontier.standard_error:.3f} up to "
            f"{frontier.budget:.2f} nats; {best}{beaten}"
        )
    return lines


def non_dominated(points: Sequence[PolicyPoint]) -> list[PolicyPoint]:
    """The policies not dominated by another, by rising KL; equal ones all stay."""

    def place(point: PolicyPoint) -> tuple[float, float]:
        return point.kl, -point.reward

    best: list[PolicyPoint] = []
    for point in sorted(points, key=place):
        if not best or point.reward > best[-1].reward or place(point) == place(best[-1]):
            best.append(point)
    return best


def _hull(points: Sequence[tuple[float, float]], base: float) -> list[tuple[float, float]]:
    """Corners of the upper concave hull from the reference, (0, base), to the largest reward."""
    hull: list[tuple[float, float]] = []
    for kl, reward in sorted([(0.0, base), *points]):
        if hull and reward <= hull[-1][1]:
            continue  # the hull is flat after its top
        while hull and (hull[-1][0] == kl or (len(hull) > 1 and _is_below(hull, kl, reward))):
            hull.pop()
        hull.append((kl, reward))
    return hull


def _is_below(hull: list[tuple[float, float]], kl: float, reward: float) -> bool:
    """Whether the last corner is on or below the line from the corner before it to a new point."""
    (kl_0, reward_0), (kl_1, reward_1) = hull[-2:]
    return (reward_1 - reward_0) * (kl - kl_0) <= (reward - reward_0) * (kl_1 - kl_0)


def _height(hull: Sequence[tuple[float, float]], kl: float) -> float:
    kls, rewards = zip(*hull, strict=True)
    return float(np.interp(kl, kls, rewards))


def _area(hull: Sequence[tuple[float, float]], base: float, budget: float, unit: float) -> float:
    """Mean of hull − base over KLs in [0, budget], in units of reward `unit`."""
    if unit == 0:
        return 0.0  # no method rises above the reference
    corners = [*(kl for kl, _ in hull if kl < budget), budget]
    heights = [_height(hull, kl) - base for kl in corners]
    return float(np.trapezoid(heights, corners)) / (budget * unit)


def _resamples(
    points: Sequence[PolicyPoint], reference: PolicyPoint, num: int, seed: int
) -> Iterator[tuple[float, list[tuple[float, float]]]]:
    """The reference's reward and the policies' `(kl, reward)` in each resample of the prompts.

    Empty if responses are not known, or only those to one prompt.
    """
    policies = [reference, *points]
    known = [point.by_prompt for point in policies if point.by_prompt is not None]
    if len(known) < len(policies) or len(known[0]) < 2:
        return
    prompts = list(known[0])
    for point, by_prompt in zip(policies, known, strict=True):
        if unshared := by_prompt.keys() ^ set(prompts):
            raise TokenRatioError(
                f"policy {point.label} and the reference do not answer the same prompts: "
                f"{len(unshared)} have responses from only one; evaluate both on the same prompts"
            )
    # [policies, prompts, (Σ KL, Σ reward, responses)]
    sums = np.array([[by_prompt[prompt] for prompt in prompts] for by_prompt in known])
    rng = np.random.default_rng(seed)
    for _ in range(num):
        counts = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)))
        kls, rewards, sizes = np.einsum("p,mps->sm", counts, sums)
        coordinates = zip((kls / sizes).clip(min=0.0), rewards / sizes, strict=True)
        (_, base), *others = [(float(kl), float(reward)) for kl, reward in coordinates]
        yield base, others
