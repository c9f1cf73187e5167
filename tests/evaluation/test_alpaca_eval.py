import csv
import gzip
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.alpaca_eval import (
    _select_and_fit,
    alpaca_eval_leaderboard,
)

ALPACA_EVAL = Path(__file__).parents[2].parent / "shared" / "data" / "alpaca_eval"


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
