import csv
import gzip
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from scipy.special import expit

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.length_control import (
    _select_and_fit,
    alpaca_eval_leaderboard,
    length_controlled_win_rate,
)

ALPACA_EVAL = Path(__file__).parents[2].parent / "shared" / "data" / "alpaca_eval"


def judged(rng, num_prompts, *, samples=1, quality=0.0, length=0.0, prompt_sd=0.0, longer=1.4):
    """Verdicts of a judge that follows the model, on responses of A that are mostly longer."""
    num = num_prompts * samples
    lengths_a, lengths_b = longer * rng.lognormal(5, 0.5, num), rng.lognormal(5, 0.5, num)
    difference = lengths_a - lengths_b
    prompts = np.repeat(np.arange(num_prompts), samples)
    log_odds = quality + length * np.tanh(difference / difference.std(ddof=1))
    chance = expit(log_odds + (prompt_sd * rng.normal(size=num_prompts))[prompts])
    return (rng.random(num) < chance).astype(float), lengths_a, lengths_b, prompts.tolist()


def test_a_judge_that_only_likes_length():
    """50 at equal length, while the raw win rate is far from it."""
    rng = np.random.default_rng(0)
    prob, *rest = judged(rng, 2000, length=3.0, longer=2.0)
    found = length_controlled_win_rate(prob, *rest)
    assert prob.mean() > 0.65
    assert found.win_rate == pytest.approx(0.5, abs=3 * found.standard_error)
    assert found.interval[0] < 0.5 < found.interval[1]
    assert found.standard_error < 0.02
    assert found.length_effect == pytest.approx(3.0, abs=0.5)
    # The longer of the two wins, without exception: no finite fit without a prior.
    certain = (rest[0] > rest[1]).astype(float)
    found = length_controlled_win_rate(certain, *rest)
    assert found.win_rate == pytest.approx(0.5, abs=3 * found.standard_error)


def test_a_judge_that_does_not_see_length():
    rng = np.random.default_rng(1)
    for quality in (-1.0, 0.0, 0.8):
        prob, *rest = judged(rng, 1000, quality=quality)
        found = length_controlled_win_rate(prob, *rest)
        assert found.win_rate == pytest.approx(prob.mean(), abs=1.5 * found.standard_error)
        assert abs(found.length_effect) < 0.5


@pytest.mark.parametrize("samples", [1, 4])
def test_equal_lengths_leave_the_raw_win_rate(samples):
    """Up to the prior's half win and half loss, with and without prompt effects."""
    rng = np.random.default_rng(2)
    prob, _, _, prompts = judged(rng, 150, samples=samples, quality=0.5, prompt_sd=2.0)
    lengths = rng.integers(1, 100, len(prob))
    found = length_controlled_win_rate(prob, lengths, lengths, prompts)
    assert found.win_rate == pytest.approx(prob.mean(), abs=0.5 / len(prob))
    spread = stats.sem(prob.reshape(150, samples).mean(1))
    assert found.standard_error == pytest.approx(spread, rel=0.02)
    assert found.length_effect == 0.0
    assert (found.prompt_sd > 1) == (samples == 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_prompts", "samples", "prompt_sd"), [(60, 1, 0.0), (200, 1, 1.0), (60, 3, 1.5)]
)
def test_intervals_hold_the_truth(num_prompts, samples, prompt_sd):
    rng = np.random.default_rng(samples)
    effects = prompt_sd * np.random.default_rng(0).normal(size=200_000)
    truth, covered, errors, values = expit(0.5 + effects).mean(), 0, [], []
    for _ in range(200):
        rows = judged(
            rng, num_prompts, samples=samples, quality=0.5, length=1.0, prompt_sd=prompt_sd
        )
        found = length_controlled_win_rate(*rows)
        covered += found.interval[0] <= truth <= found.interval[1]
        errors.append(found.standard_error)
        values.append(found.win_rate)
    assert 0.90 < covered / 200 < 0.99
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    assert np.mean(values) == pytest.approx(truth, abs=0.015)


@pytest.mark.slow
def test_standard_error_against_a_bootstrap():
    """Prompts drawn anew, everything fitted anew."""
    rng = np.random.default_rng(3)
    prob, lengths_a, lengths_b, prompts = judged(
        rng, 80, samples=3, quality=0.4, length=1.5, prompt_sd=1.0
    )
    values = []
    for _ in range(200):
        drawn = rng.integers(0, 80, 80)
        rows = (drawn[:, None] * 3 + np.arange(3)).ravel()
        names = np.repeat(np.arange(80), 3).tolist()
        resample = (prob[rows], lengths_a[rows], lengths_b[rows], names)
        values.append(length_controlled_win_rate(*resample).win_rate)
    found = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    assert found.standard_error == pytest.approx(np.std(values), rel=0.15)


def test_coefficients_against_scikit_learn():
    """Soft labels, each prompt once; scikit-learn has no prior here, and gets ours as rows."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(4)
    _, lengths_a, lengths_b, _ = judged(rng, 120)
    prob = rng.beta(1, 0.7, size=120)
    difference = lengths_a - lengths_b
    length = np.tanh(difference / difference.std(ddof=1))
    features = np.vstack([np.column_stack([np.ones(120), length]), np.eye(2)])
    wins = np.append(prob, [0.5, 0.5])
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        np.tile(features, (2, 1)),
        np.repeat([1, 0], 122),
        sample_weight=np.concatenate([wins, 1 - wins]),
    )
    found = length_controlled_win_rate(prob, lengths_a, lengths_b)
    assert (found.quality, found.length_effect) == pytest.approx(theirs.coef_[0], abs=1e-5)
    assert found.win_rate == pytest.approx(expit(theirs.coef_[0][0]), abs=1e-6)


@pytest.mark.slow
def test_prompt_effects_against_adaptive_integration():
    """The same model, u_x integrated out by scipy's quadrature and fitted without gradients."""
    rng = np.random.default_rng(5)
    prob, lengths_a, lengths_b, prompts = judged(
        rng, 8, samples=4, quality=0.5, length=1.0, prompt_sd=3.0
    )
    difference = (lengths_a - lengths_b).reshape(8, 4)
    length = np.tanh(difference / difference.std(ddof=1))
    wins = prob.reshape(8, 4)

    def integral(params, row, factor=lambda u: 1.0):
        quality, effect, sd = params

        def density(u):
            chance = expit(quality + effect * length[row] + u)
            likelihood = np.prod(np.where(wins[row] == 1, chance, 1 - chance))
            return factor(u) * likelihood * stats.norm.pdf(u, scale=sd)

        return integrate.quad(density, -6 * sd, 6 * sd, epsabs=1e-12)[0]

    def loss(params):
        prior = sum(b / 2 - np.logaddexp(0, b) for b in params[:2]) - params[2] ** 2 / 12.5
        return -prior - sum(math.log(integral(params, row)) for row in range(8))

    found = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    ours = (found.quality, found.length_effect, found.prompt_sd)
    theirs = optimize.minimize(
        loss, np.round(ours, 1), method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-6}
    ).x
    assert found.prompt_sd > 0.5
    assert ours == pytest.approx(theirs, abs=5e-3)
    win = [
        integral(ours, row, lambda u: expit(ours[0] + u)) / integral(ours, row) for row in range(8)
    ]
    assert found.win_rate == pytest.approx(np.mean(win), abs=1e-5)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 200), st.integers(1, 200), st.integers(0, 9)),
        min_size=5,
        max_size=40,
    ).filter(lambda rows: len({a - b for _, a, b, _ in rows}) > 1)
)
def test_swapping_policies_mirrors(rows):
    prob, lengths_a, lengths_b, prompts = zip(*rows, strict=True)
    ours = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    theirs = length_controlled_win_rate(1 - np.array(prob), lengths_b, lengths_a, prompts)
    assert ours.win_rate == pytest.approx(1 - theirs.win_rate, abs=1e-6)
    assert ours.standard_error == pytest.approx(theirs.standard_error, abs=1e-6, nan_ok=True)
    assert ours.length_effect == pytest.approx(theirs.length_effect, abs=1e-5)
    assert 0 < ours.win_rate < 1


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("num", [4, 20, 300])
def test_who_always_wins_is_not_certain_to(num, samples):
    """The interval ends near the exact binomial one, and neither end is 1."""
    rng = np.random.default_rng(num)
    _, lengths_a, lengths_b, prompts = judged(rng, num, samples=samples)
    found = length_controlled_win_rate(np.ones(num * samples), lengths_a, lengths_b, prompts)
    low, high = found.interval
    assert 1 - 1.5 / num < found.win_rate < high < 1
    assert low > 1 - 12 / num
    assert low < stats.binomtest(num * samples, num * samples).proportion_ci(0.95).low
    lost = length_controlled_win_rate(np.zeros(num * samples), lengths_b, lengths_a, prompts)
    assert lost.interval == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_rows_may_come_in_any_order():
    rng = np.random.default_rng(10)
    rows = judged(rng, 30, samples=4, quality=0.5, length=1.0, prompt_sd=2.0)
    order = rng.permutation(120)
    ours = length_controlled_win_rate(*rows)
    theirs = length_controlled_win_rate(*(np.array(column)[order] for column in rows))
    assert ours.prompt_sd > 1
    assert ours.interval == pytest.approx(theirs.interval, abs=1e-6)


def test_prompts_that_always_agree():
    """Every prompt is always won or always lost: u_x without bound but for its prior."""
    rng = np.random.default_rng(6)
    _, lengths_a, lengths_b, prompts = judged(rng, 40, samples=4)
    prob = np.repeat(np.arange(40) % 2, 4).astype(float)
    found = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    assert found.win_rate == pytest.approx(0.5, abs=0.02)
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(39), rel=0.05)


def test_what_has_no_verdict_is_counted():
    rng = np.random.default_rng(7)
    prob, *lengths, _ = judged(rng, 30)
    without = length_controlled_win_rate(prob, *lengths)
    longer = [np.append(each, [7.0, 900.0]) for each in lengths]
    found = length_controlled_win_rate(np.append(prob, [math.nan] * 2), *longer)
    assert (found.num_comparisons, found.num_missing) == (30, 2)
    assert (found.win_rate, found.interval) == (without.win_rate, without.interval)
    one = length_controlled_win_rate([1.0, 0.0], [3, 4], [5, 2], ["p", "p"])
    assert math.isnan(one.standard_error)
    assert all(map(math.isnan, one.interval))


@pytest.mark.parametrize(
    ("prob", "lengths_a", "lengths_b", "prompts", "message"),
    [
        ([0.5, 2.0], [1, 2], [2, 1], None, "prob_a: row 1 is 2.0"),
        ([0.5, 1.0], [1, 2, 3], [2, 1], None, "lengths_a has shape"),
        ([0.5, 1.0], [1, 2], [2, -1], None, "lengths_b: row 1 is -1.0, not a length"),
        ([0.5, 1.0], [1, math.nan], [2, 1], None, "lengths_a: row 1 is nan"),
        ([0.5, 1.0], [1, 2], [2, 1], ["p"], "1 prompts for 2 comparisons"),
        ([math.nan] * 2, [1, 2], [2, 1], None, "none of 2 comparisons"),
        ([0.5, 1.0], [11, 12], [1, 2], None, "longer by 10 than B's"),
        ([0.5, 1.0], [1, 2], [4, 5], None, "shorter by 3 than B's"),
    ],
)
def test_mistakes_are_named(prob, lengths_a, lengths_b, prompts, message):
    with pytest.raises(TokenRatioError, match=message):
        length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)


# --- AlpacaEval 2's leaderboard


def cross_validated(features, wins, weights):
    """scikit-learn's LogisticRegressionCV with the same folds and loss, as published."""
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer

    def loss(y, chance, wins, weights):
        wins = np.where(y == 1, wins, 1 - wins)
        return -np.mean(weights * (wins * np.log(chance) + (1 - wins) * np.log1p(-chance)))

    fold = np.tile(np.arange(len(wins)) % 5, 2)
    with sklearn.config_context(enable_metadata_routing=True):
        score = make_scorer(loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            Cs=10,
            l1_ratios=(1,),
            cv=[(np.flatnonzero(fold != held), np.flatnonzero(fold == held)) for held in range(5)],
            solver="liblinear",
            fit_intercept=False,
            random_state=123,
            use_legacy_attributes=False,
            scoring=score.set_score_request(wins=True, weights=True),
        ).set_fit_request(sample_weight=True)
        wins, weights = np.concatenate([wins, 1 - wins]), np.tile(weights, 2)
        model.fit(
            np.tile(features, (2, 1)),
            np.repeat([1, 0], len(features)),
            sample_weight=wins * weights,
            wins=wins,
            weights=weights,
        )
    return model.coef_[0], model.C_


def test_selection_is_scikit_learns():
    rng, num = np.random.default_rng(8), 100
    features = np.column_stack([rng.uniform(-1, 1, num), rng.normal(size=num), np.ones(num)])
    weights = np.where(np.arange(num) < 40, 0.1, 1.0)
    chosen = set()
    for slope in (0.0, 0.3, 0.6, 1.2, 2.4):
        wins = expit(features @ [-slope, slope / 3, 0.1] + 2 * rng.normal(size=num))
        coefficients, penalty = cross_validated(features, wins, weights)
        assert _select_and_fit(features, wins, weights) == pytest.approx(coefficients, abs=1e-9)
        chosen.add(penalty)
    assert len(chosen) > 2


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def small(tmp_path):
    """Two models: one better and longer than the baseline, one that never wins and lacks a row."""
    rng = np.random.default_rng(9)
    eval_set = tmp_path / "eval_set.jsonl"
    lines = [{"instruction": "a\u2028b", "instruction_difficulty": x} for x in rng.normal(size=40)]
    eval_set.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    rows = [
        {
            "model": model,
            "file_pos": position,
            "len_baseline": rng.integers(100, 500),
            "len_model": rng.integers(300, 900),
            "preference": 1 + (rng.random() < 0.8) if model == "good" else 1,
        }
        for model in ("bad", "good")
        for position in range(39 if model == "bad" else 40)
    ]
    return rows, eval_set


def test_a_small_leaderboard(small, tmp_path, capfd):
    rows, eval_set = small
    good, bad = alpaca_eval_leaderboard(write_csv(tmp_path / "judgements.csv", rows), eval_set)
    wins = [row["preference"] - 1 for row in rows if row["model"] == "good"]
    assert list(good) == ["model", "win_rate", "standard_error", "length_controlled_win_rate"]
    assert good["model"] == "good"
    assert good["win_rate"] == pytest.approx(100 * np.mean(wins))
    assert good["standard_error"] == pytest.approx(100 * stats.sem(wins))
    # Never winning is no reason for a complaint, nor for half a chance.
    assert (bad["win_rate"], bad["standard_error"]) == (0.0, 0.0)
    assert bad["length_controlled_win_rate"] < 1
    assert "".join(capfd.readouterr()) == ""
    # 0 is a draw.
    drawn = [{**row, "preference": 0} for row in rows]
    draws = alpaca_eval_leaderboard(write_csv(tmp_path / "drawn.csv", drawn), eval_set)
    assert {entry["win_rate"] for entry in draws} == {50.0}
    assert all(abs(entry["length_controlled_win_rate"] - 50) < 1e-6 for entry in draws)


def rows_of(model, lengths, preferences):
    """A model's judgements; `lengths` are (the baseline's, the model's)."""
    columns = ("model", "file_pos", "len_baseline", "len_model", "preference")
    return [
        dict(zip(columns, (model, position, *length, preference), strict=True))
        for position, (length, preference) in enumerate(zip(lengths, preferences, strict=True))
    ]


LIKE = [(100 + i, 100 + i) for i in range(40)]


@pytest.mark.parametrize(
    ("lengths", "preferences", "figure"),
    [
        (LIKE, [1.5] * 40, 50),  # the baseline itself, as AlpacaEval annotates it
        (LIKE, [0] * 40, 50),  # the same, the draws as zeros
        (LIKE, [1, 2] * 20, 50),  # and judged by the position alone
        (LIKE, [2, 2, 2, 1] * 10, 75),
        (LIKE[:3], [1.5] * 3, 50),  # too few to fit, and nothing to fit
        (LIKE[:1], [2], 100),
        ([(0, 0)] * 40, [1.5] * 40, 50),
    ],
)
@pytest.mark.parametrize("with_extra", [True, False])
def test_at_equal_lengths_the_figure_is_the_raw_one(
    small, tmp_path, lengths, preferences, figure, with_extra
):
    """Also with the published extra rows, whose own difficulty effect is not the model's."""
    rows, eval_set = small
    extra = None
    if with_extra:
        names = ("preference", "std_delta_len", "instruction_difficulty")
        given = [(0.9, 1.5, -1.0), (0.2, -1.0, 2.0), (0.7, 0.3, 1.0), (0.4, -0.2, -2.0)]
        lines = [dict(zip(names, each, strict=True)) for each in given]
        extra = write_csv(tmp_path / "extra.csv", lines)
    alone = alpaca_eval_leaderboard(write_csv(tmp_path / "alone.csv", rows), eval_set, extra)
    path = write_csv(tmp_path / "with.csv", rows + rows_of("itself", lengths, preferences))
    table = alpaca_eval_leaderboard(path, eval_set, extra)
    itself = next(entry for entry in table if entry["model"] == "itself")
    assert itself["length_controlled_win_rate"] == itself["win_rate"] == figure
    assert math.isnan(itself["standard_error"]) == (len(lengths) == 1)
    assert [entry for entry in table if entry is not itself] == alone
    figures = [entry["length_controlled_win_rate"] for entry in table]
    assert figures == sorted(figures, reverse=True)


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([(100, 130)] * 40, "every response is longer by 30 than the baseline's"),
        ([(100 + i, 95 + i) for i in range(40)], "every response is shorter by 5 than"),
        ([(100, 130), (200, 90), (50, 60), (70, 20)], "4 judgements; .* at least 5"),
        ([(100, 130)], "1 judgements"),
    ],
)
def test_a_model_that_cannot_be_fitted_leaves_the_others_alone(small, tmp_path, lengths, reason):
    rows, eval_set = small
    alone = alpaca_eval_leaderboard(write_csv(tmp_path / "alone.csv", rows), eval_set)
    odd = rows_of("odd", lengths, [2.0] * len(lengths))
    worse = rows_of("worse", lengths, [1.0] * len(lengths))
    table = alpaca_eval_leaderboard(write_csv(tmp_path / "with.csv", worse + rows + odd), eval_set)
    assert table[:-2] == alone
    assert [entry["model"] for entry in table[-2:]] == ["odd", "worse"]
    for entry, win_rate in zip(table[-2:], (100, 0), strict=True):
        assert entry["length_controlled_win_rate"] is None
        assert entry["win_rate"] == win_rate
        assert re.search(reason, entry["reason"])
    with pytest.raises(TokenRatioError, match=f"no model can be fitted: odd: {reason}"):
        alpaca_eval_leaderboard(write_csv(tmp_path / "odd.csv", odd), eval_set)


@pytest.mark.parametrize("prompts", [None, [i // 2 for i in range(40)]])
@pytest.mark.parametrize(
    ("prob", "expected"), [([0.5] * 40, 0.5), ([0, 1] * 20, 0.5), ([1] * 40, 1), ([0] * 40, 0)]
)
def test_against_itself_our_own_fit_is_the_raw_rate_up_to_the_prior(prob, prompts, expected):
    lengths = [100 + i for i in range(40)]
    found = length_controlled_win_rate(prob, lengths, lengths, prompts)
    assert found.length_effect == pytest.approx(0, abs=1e-9)
    assert found.win_rate == pytest.approx(expected, abs=0.5 / 40)
    low, high = found.interval
    assert 0 < low < found.win_rate < high < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": "0.5"}, "judgements.csv:3: preference 0.5"),
        ({"preference": ""}, "judgements.csv:3: preference is ''"),
        ({"file_pos": "40"}, "judgements.csv:3: file_pos is '40', not a number between 0 and 39"),
        ({"file_pos": "0"}, "judgements.csv:3: preference .* at file_pos 0; a model has one row"),
        ({"len_model": "x"}, "judgements.csv:3: len_model is 'x'"),
    ],
)
def test_broken_judgements_are_named(small, tmp_path, change, message):
    rows, eval_set = small
    rows[1] = {**rows[1], **change}
    with pytest.raises(TokenRatioError, match=message):
        alpaca_eval_leaderboard(write_csv(tmp_path / "judgements.csv", rows), eval_set)


def test_broken_files_are_named(small, tmp_path):
    rows, eval_set = small
    without = [{key: row[key] for key in row if key != "file_pos"} for row in rows]
    with pytest.raises(TokenRatioError, match=r"judgements.csv:2: it has no column file_pos"):
        alpaca_eval_leaderboard(write_csv(tmp_path / "judgements.csv", without), eval_set)
    few = write_csv(tmp_path / "judgements.csv", rows[:4])
    with pytest.raises(TokenRatioError, match="bad: 4 judgements"):
        alpaca_eval_leaderboard(few, eval_set)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TokenRatioError, match=r"empty.jsonl: it has no rows"):
        alpaca_eval_leaderboard(few, tmp_path / "empty.jsonl")


@pytest.fixture(scope="module")
def published():
    if not ALPACA_EVAL.is_dir():
        pytest.skip(f"AlpacaEval's judgements are not at {ALPACA_EVAL}")
    with (ALPACA_EVAL / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_published_leaderboard(published):
    table = alpaca_eval_leaderboard(
        ALPACA_EVAL / "judgements.csv.gz",
        ALPACA_EVAL / "eval_set.jsonl",
        ALPACA_EVAL / "df_gamed_reconstructed.csv",
    )
    assert len(table) == 28
    # One model was judged but not published.
    assert {entry["model"] for entry in table} - set(published) == {"text_davinci_003"}
    distances = []
    for entry in table:
        if entry["model"] in published:
            row = published[entry["model"]]
            assert entry["win_rate"] == pytest.approx(float(row["win_rate"]), abs=1e-3)
            assert entry["standard_error"] == pytest.approx(float(row["standard_error"]), abs=1e-3)
            theirs = float(row["length_controlled_winrate"])
            distances.append(abs(entry["length_controlled_win_rate"] - theirs))
    assert sum(distance <= 0.2 for distance in distances) >= 24
    assert sum(distance <= 0.001 for distance in distances) >= 16  # the same penalty was chosen
    assert max(distances) <= 0.2


def test_difficulty_goes_by_position(published, tmp_path):
    """The one model that lacks a row, by the row's own instruction: further from the published."""
    data = gzip.decompress((ALPACA_EVAL / "judgements.csv.gz").read_bytes()).decode("utf-8")
    rows = [row for row in csv.DictReader(io.StringIO(data)) if row["model"] == "alpaca-7b_concise"]
    shifted = [{**row, "file_pos": row["index"]} for row in rows]
    theirs = float(published["alpaca-7b_concise"]["length_controlled_winrate"])
    distances = []
    for number, each in enumerate((rows, shifted)):
        (entry,) = alpaca_eval_leaderboard(
            write_csv(tmp_path / f"{number}.csv", each),
            ALPACA_EVAL / "eval_set.jsonl",
            ALPACA_EVAL / "df_gamed_reconstructed.csv",
        )
        distances.append(abs(entry["length_controlled_win_rate"] - theirs))
    assert distances[0] < 0.15 < distances[1]
