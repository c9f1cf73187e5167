"""AlpacaEval 2's length-controlled leaderboard, refitted from its published judgements."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from tokenratio.data.tables import number_of, read_table
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.length_control import length_gap

# Fixed by the figures that AlpacaEval 2 published.
_EXTRA_WEIGHT = 0.1
_INVERSE_PENALTIES = np.logspace(-4, 4, 10)
_NUM_FOLDS = 5


def alpaca_eval_leaderboard(
    judgements_csv: str | Path,
    eval_set_jsonl: str | Path,
    extra_rows_csv: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Win rates of many models over one baseline, as AlpacaEval 2 publishes them.

    Each model is fitted alone: P(model wins) = σ(a tanh(Δlen/sd) + d difficulty + c), Δlen the
    baseline's length less the model's, with an L1 penalty chosen by 5-fold cross-validation
    (Dubois et al., arXiv 2404.04475). The win rate is the mean of σ(d difficulty + c). The extra
    rows, weight 0.1 each and without c, come from the baseline prompted to be concise or verbose.

    If a model lacks rows, the published code uses the difficulty of the instruction at the row's
    position in the model's file instead of the row's own; this function does the same.

    If all of a model's responses are as long as the baseline's, the result is the raw win rate: 50
    for the baseline against itself, as published. A model that cannot be fitted (fewer than 5
    judgements, or lengths that all differ by the same amount) gets a reason instead.

    Args:
        judgements_csv: columns `model`, `file_pos` (from 0), `len_baseline`, `len_model`,
            `preference` (1: the baseline wins, 2: the model; 0 and 1.5: a draw). May be gzipped.
        eval_set_jsonl: each instruction's `instruction_difficulty`, in order.
        extra_rows_csv: columns `preference` (in [0, 1]), `std_delta_len`,
            `instruction_difficulty`. Without it the results differ from the published ones by up
            to 3 points.
    Returns:
        Best first: `model`; `win_rate`, its `standard_error` (nan for one judgement) and
        `length_controlled_win_rate`, in percent. Models that cannot be fitted come last, by raw
        win rate, with None and a `reason`.
    Raises:
        TokenRatioError: a file cannot be read, a value is missing or out of range, or no model can
            be fitted.
    """
    difficulties = np.array(
        [number_of(row, "instruction_difficulty") for row in read_table(eval_set_jsonl)]
    )
    columns = ("std_delta_len", "instruction_difficulty")
    extra = [
        (*(number_of(row, column) for column in columns), number_of(row, "preference", 0.0, 1.0))
        for row in ([] if extra_rows_csv is None else read_table(extra_rows_csv))
    ]
    models: dict[str, dict[int, tuple[float, ...]]] = {}
    for row in read_table(judgements_csv):
        position = int(number_of(row, "file_pos", 0.0, len(difficulties) - 1.0))
        shorter = number_of(row, "len_baseline", 0.0) - number_of(row, "len_model", 0.0)
        preference = number_of(row, "preference", 0.0, 2.0) or 1.5
        model = models.setdefault(row.fields.get("model", ""), {})
        if preference < 1 or position in model:
            raise TokenRatioError(
                f"{row.origin}: preference {preference:g} at file_pos {position}; a model has one "
                "row for each position, and a preference is 1 (the baseline wins) to 2, or 0 (a "
                "draw)."
            )
        model[position] = (shorter, difficulties[position], preference - 1)
    given = np.array(extra).reshape(-1, 3)
    table = [
        {"model": model, **_alpaca_eval_row(np.array(list(rows.values())), given)}
        for model, rows in models.items()
    ]
    fitted = [entry for entry in table if "reason" not in entry]
    others = [entry for entry in table if "reason" in entry]
    if not fitted:
        reasons = "; ".join(f"{entry['model']}: {entry['reason']}" for entry in others)
        raise TokenRatioError(f"no model can be fitted: {reasons}")
    fitted.sort(key=lambda entry: -entry["length_controlled_win_rate"])
    return fitted + sorted(others, key=lambda entry: -entry["win_rate"])


def _alpaca_eval_row(
    rows: Float[np.ndarray, "rows 3"], extra: Float[np.ndarray, "extra 3"]
) -> dict[str, Any]:
    num, shorter, wins = len(rows), rows[:, 0], rows[:, 2]
    figures = {
        "win_rate": 100 * float(wins.mean()),
        "standard_error": 100 * float(wins.std(ddof=1)) / math.sqrt(num) if num > 1 else math.nan,
    }
    if not shorter.any():
        return {**figures, "length_controlled_win_rate": figures["win_rate"]}
    reason = None
    if num < _NUM_FOLDS:
        reason = f"{num} judgements; cross-validation needs at least {_NUM_FOLDS}"
    elif not np.ptp(shorter):
        reason = (
            f"every response is {length_gap(-shorter[0])} than the baseline's: the effects of "
            "length and quality cannot be separated"
        )
    if reason is not None:
        return {**figures, "length_controlled_win_rate": None, "reason": reason}
    sd = shorter.std(ddof=1)
    extra_features = np.column_stack([np.tanh(extra[:, 0]), extra[:, 1], np.zeros(len(extra))])
    features = np.column_stack([np.tanh(shorter / sd), rows[:, 1], np.ones(num)])
    coefficients = _select_and_fit(
        np.concatenate([extra_features, features]),
        np.concatenate([extra[:, 2], wins]),
        np.concatenate([np.full(len(extra), _EXTRA_WEIGHT), np.ones(num)]),
    )
    at_equal_length = expit(features[:, 1:] @ coefficients[1:])
    return {**figures, "length_controlled_win_rate": 100 * float(at_equal_length.mean())}


def _select_and_fit(
    features: Float[np.ndarray, "rows features"],
    wins: Float[np.ndarray, "rows"],
    weights: Float[np.ndarray, "rows"],
) -> Float[np.ndarray, "features"]:
    """The L1-penalised fit with the penalty whose weighted log loss on held-out rows is least."""
    # Every fifth row is held out. The published code uses scikit-learn's GroupKFold, which breaks
    # ties between equal groups as numpy's sort does on each machine.
    folds = np.arange(len(wins)) % _NUM_FOLDS
    losses = np.zeros(len(_INVERSE_PENALTIES))
    for fold in range(_NUM_FOLDS):
        fit, held_out = folds != fold, folds == fold
        for index, inverse_penalty in enumerate(_INVERSE_PENALTIES):
            found = _l1_fit(features[fit], wins[fit], weights[fit], inverse_penalty)
            log_odds = features[held_out] @ found
            loss = np.logaddexp(0.0, log_odds) - wins[held_out] * log_odds
            losses[index] += (weights[held_out] * loss).mean()
    return _l1_fit(features, wins, weights, float(_INVERSE_PENALTIES[losses.argmin()]))


def _l1_fit(
    features: Float[np.ndarray, "rows features"],
    wins: Float[np.ndarray, "rows"],
    weights: Float[np.ndarray, "rows"],
    inverse_penalty: float,
) -> Float[np.ndarray, "features"]:
    from sklearn.linear_model import LogisticRegression

    # Each row is a win and a loss, weighted by their probabilities. liblinear needs some weight on
    # each.
    wins = wins.clip(1e-9, 1 - 1e-9)
    model = LogisticRegression(
        C=inverse_penalty, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=123
    )
    model.fit(
        np.concatenate([features, features]),
        np.repeat([1, 0], len(wins)),
        sample_weight=np.concatenate([wins * weights, (1 - wins) * weights]),
    )
    coefficients: Float[np.ndarray, features] = model.coef_[0]
    return coefficients
