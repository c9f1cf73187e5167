"""Win rates at equal length: judges prefer longer responses (docs/method.md §8)."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import optimize, stats
from scipy.special import expit, logit, logsumexp

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.resampling import LEVEL, cluster_codes
from tokenratio.evaluation.win_rate import probabilities

# Prompt effects in standard deviations. The trapezoid rule converges geometrically on a bell.
_NODES = np.linspace(-5.0, 5.0, 61)
_MAX_PROMPT_SD = 10.0
_PROMPT_SD_SCALE = 2.5
_STEP = 1e-5  # of central differences of the gradient, in log odds


@dataclass(frozen=True)
class LengthControlledWinRate:
    """The win rate of A over B if their responses were equally long.

    Attributes:
        win_rate: in [0, 1].
        standard_error: clustered by prompt; nan for one prompt.
        interval: 95 %, symmetric in log odds, so it stays within [0, 1].
        quality: Δθ, log odds of a win at equal length.
        length_effect: λ, added to the log odds per unit of tanh(Δlen/sd); positive if the judge
            likes length.
        prompt_sd: the standard deviation of u_x in log odds; 0 if no prompt occurs twice.
        num_comparisons: with a verdict; the figures above are over these.
        num_prompts: among them.
        num_missing: comparisons without a verdict; not counted.
    """

    win_rate: float
    standard_error: float
    interval: tuple[float, float]
    quality: float
    length_effect: float
    prompt_sd: float
    num_comparisons: int
    num_prompts: int
    num_missing: int


def length_controlled_win_rate(
    prob_a: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
) -> LengthControlledWinRate:
    """Fit P(A wins) = σ(Δθ + λ tanh(Δlen/sd) + u_x); return the mean of σ(Δθ + u_x).

    Δlen is A's length less B's, sd its standard deviation over the comparisons. A probability p
    counts as p wins and 1 − p losses. The standard error is the sandwich estimator's, clustered by
    prompt, with the delta method: to first order that of a bootstrap over prompts.

    The prompt effects u_x are normal with an estimated standard deviation and are integrated out.
    If no prompt occurs twice, or probabilities vary less than verdicts would, there are none, and
    the result is σ(Δθ). If all lengths are equal it is the mean of `prob_a`, up to the prior.

    The prior keeps coefficients finite for a policy that always wins or whose responses are all
    longer: half a win and half a loss for Δθ, and for λ at tanh = 1 (log-F(1, 1); Greenland and
    Mansournia, Statistics in Medicine 34, 2015), which weighs as much as one comparison. The
    standard deviation of u_x has a half-normal prior of scale 2.5.

    Args:
        prob_a: the judge's probability that A is better, the mean of both orders; nan without a
            verdict.
        lengths_a, lengths_b: of the responses, in the same unit.
        prompts: of each comparison; all differ if None.
    Raises:
        TokenRatioError: a value is not a probability or not a length, there is no verdict, or A's
            responses all differ from B's by the same length.
    """
    prob, lengths = probabilities("prob_a", prob_a), []
    for name, given in (("lengths_a", lengths_a), ("lengths_b", lengths_b)):
        array = np.asarray(given, dtype=np.float64)
        if array.shape != prob.shape:
            raise TokenRatioError(
                f"{name} has shape {array.shape}, prob_a {prob.shape}: each comparison needs "
                "one of each"
            )
        wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
        if wrong.size:
            raise TokenRatioError(f"{name}: row {wrong[0]} is {array[wrong[0]]}, not a length.")
        lengths.append(array)
    names = list(range(len(prob))) if prompts is None else list(prompts)
    if len(names) != len(prob):
        raise TokenRatioError(f"{len(names)} prompts for {len(prob)} comparisons.")
    kept = ~np.isnan(prob)
    if not kept.any():
        raise TokenRatioError(f"none of {len(prob)} comparisons has a verdict.")
    codes = cluster_codes([name for name, keep in zip(names, kept, strict=True) if keep])
    order = np.argsort(codes, kind="stable")  # a prompt's rows together
    length_difference = (lengths[0] - lengths[1])[kept][order]
    data = _Comparisons(prob[kept][order], _length_feature(length_difference), np.bincount(codes))
    params = _fit(data)
    value, error = _estimate(params, data)
    center, reach = logit(value), math.nan
    if data.num_prompts > 1:  # a t quantile, because the variance of few prompts is uncertain
        quantile = stats.t.ppf(1 - LEVEL / 2, data.num_prompts - 1)
        reach = quantile * error / (value * (1 - value))
    return LengthControlledWinRate(
        win_rate=value,
        standard_error=error,
        interval=(float(expit(center - reach)), float(expit(center + reach))),
        quality=float(params[0]),
        length_effect=float(params[1]),
        prompt_sd=float(params[2]) if len(params) == 3 else 0.0,
        num_comparisons=len(codes),
        num_prompts=data.num_prompts,
        num_missing=int((~kept).sum()),
    )


class _Comparisons:
    """The data, sorted by prompt, with the model's likelihood and its derivatives.

    Parameters are (Δθ, λ, τ), τ the standard deviation of u_x, or (Δθ, λ), without u_x.
    """

    def __init__(
        self,
        prob: Float[np.ndarray, "rows"],
        length: Float[np.ndarray, "rows"],
        sizes: Int[np.ndarray, "prompts"],
    ) -> None:
        self.prob, self.length = prob[:, None], length[:, None]
        self.sizes, self.starts = sizes, np.cumsum(sizes) - sizes
        self.num_prompts = len(sizes)

    def evaluate(
        self, params: Float[np.ndarray, "params"]
    ) -> tuple[float, Float[np.ndarray, "prompts params"], Float[np.ndarray, "prompts"]]:
        """Log-likelihood, its gradient by prompt, and each prompt's σ(Δθ + u_x), u_x averaged."""
        quality, length_effect = params[:2]
        nodes = _NODES if len(params) == 3 else np.zeros(1)
        effects = params[-1] * nodes if len(params) == 3 else nodes
        log_weights = -(nodes**2) / 2
        log_weights -= logsumexp(log_weights)
        log_odds = quality + length_effect * self.length + effects
        by_row = self.prob * log_odds - np.logaddexp(0.0, log_odds)
        joint = np.add.reduceat(by_row, self.starts) + log_weights
        log_likelihoods = logsumexp(joint, axis=1)
        posterior = np.exp(joint - log_likelihoods[:, None])
        residual = self.prob - expit(log_odds)
        columns = [
            np.add.reduceat(residual, self.starts),
            np.add.reduceat(residual * self.length, self.starts),
        ]
        columns += [columns[0] * nodes] if len(params) == 3 else []
        gradient = np.stack([(posterior * column).sum(1) for column in columns], axis=1)
        wins = posterior @ expit(quality + effects)
        return float(log_likelihoods.sum()), gradient, wins

    def win_rate(self, wins: Float[np.ndarray, "prompts"]) -> float:
        return float((self.sizes * wins).sum() / self.sizes.sum())


def _length_feature(difference: Float[np.ndarray, "rows"]) -> Float[np.ndarray, "rows"]:
    if not difference.any():
        return difference
    sd = difference.std(ddof=1) if len(difference) > 1 else 0.0
    if not sd > 0:
        raise TokenRatioError(
            f"every response of A is {length_gap(difference[0])} than B's: the effects of length "
            "and quality cannot be separated; report the raw win rate"
        )
    return np.tanh(difference / sd)


def length_gap(difference: float) -> str:
    """A difference in words, such as "longer by 4"."""
    return f"{'longer' if difference > 0 else 'shorter'} by {abs(difference):g}"


def _log_prior(
    params: Float[np.ndarray, "params"],
) -> tuple[float, Float[np.ndarray, "params"]]:
    coefficients = params[:2]
    value = float((coefficients / 2 - np.logaddexp(0.0, coefficients)).sum())
    gradient = 0.5 - expit(coefficients)
    if len(params) == 3:
        scaled = params[2] / _PROMPT_SD_SCALE
        value, gradient = value - scaled**2 / 2, np.append(gradient, -scaled / _PROMPT_SD_SCALE)
    return value, gradient


def _fit(data: _Comparisons) -> Float[np.ndarray, "params"]:
    """The likeliest parameters, without τ if no prompt occurs twice or τ is 0."""

    def loss(params: Float[np.ndarray, "params"]) -> tuple[float, Float[np.ndarray, "params"]]:
        value, gradient, _ = data.evaluate(params)
        prior, prior_gradient = _log_prior(params)
        return -value - prior, -gradient.sum(0) - prior_gradient

    free = [(None, None)] * 2
    options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000}

    def fit(
        start: np.ndarray, bounds: list[tuple[float | None, float | None]] | None = None
    ) -> Float[np.ndarray, "params"]:
        found = optimize.minimize(
            loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        return np.asarray(found.x)

    if data.num_prompts < len(data.prob):
        params = fit(np.array([0.0, 0.0, 1.0]), [*free, (0.0, _MAX_PROMPT_SD)])
        if params[2] > 1e-2:  # below, as good as none, and flat
            return params
    return fit(np.zeros(2))


def _estimate(params: Float[np.ndarray, "params"], data: _Comparisons) -> tuple[float, float]:
    """The win rate at equal length and its standard error."""
    _, scores, wins = data.evaluate(params)
    value = data.win_rate(wins)
    if data.num_prompts < 2:
        return value, math.nan
    hessian, slope = np.empty((len(params), len(params))), np.empty(len(params))
    for index in range(len(params)):
        step = np.zeros(len(params))
        step[index] = _STEP
        ends = []
        for moved in (params + step, params - step):
            _, gradient, moved_wins = data.evaluate(moved)
            ends.append((gradient.sum(0) + _log_prior(moved)[1], data.win_rate(moved_wins)))
        hessian[index] = (ends[0][0] - ends[1][0]) / (2 * _STEP)
        slope[index] = (ends[0][1] - ends[1][1]) / (2 * _STEP)
    direction = np.linalg.solve(-(hessian + hessian.T) / 2, slope)
    influence = data.sizes * (wins - value) / data.sizes.sum() + scores @ direction
    # The prior's half wins and losses are draws like the others; where the data never lose, what
    # is uncertain lies in them.
    chance = expit(params[:2])
    prior = np.concatenate([(1 - chance) / 2, -chance / 2]) * np.tile(direction[:2], 2)
    correction = data.num_prompts / (data.num_prompts - 1)
    return value, math.sqrt(correction * float((influence**2).sum()) + float((prior**2).sum()))
