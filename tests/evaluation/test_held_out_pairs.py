import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data import read_rows
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.held_out_pairs import held_out_pairs

exact = settings(deadline=None, derandomize=True)
small = st.integers(-3, 3).map(float)
pairs = st.lists(st.tuples(small, small, st.integers(0, 5), st.integers(0, 5)), min_size=1)


def report_of(rows, **settings):
    return held_out_pairs(*map(list, zip(*rows, strict=True)), **settings)


def test_by_hand():
    report = held_out_pairs(
        [2.0, 1.0, 0.0, 5.0], [1.0, 2.0, 0.0, 1.0], [3, 4, 5, 2], [1, 9, 5, 1], subsets=list("abba")
    )
    overall = report.overall
    assert overall.accuracy.mean == pytest.approx(2.5 / 4)
    assert overall.margin.mean == pytest.approx((1 - 1 + 0 + 4) / 4)
    assert overall.longer_wins.mean == pytest.approx(2.5 / 4)
    assert overall.over_length.mean == pytest.approx(0.0)
    assert (overall.num_ties, overall.num_equal_length) == (1, 1)
    assert list(report.by_subset) == ["a", "b"]
    assert report.by_subset["a"].accuracy.mean == 1.0
    assert report.by_subset["b"].accuracy.mean == pytest.approx(0.25)
    assert report.by_subset["b"].better_rule == "shorter"
    assert report.by_subset["b"].over_length.mean == pytest.approx(0.25 - 0.75)


@exact
@given(pairs, st.integers(1, 6))
def test_every_pair_counts_once(rows, num_bins):
    report = report_of(rows, num_bins=num_bins, subsets=[str(row[2]) for row in rows])
    for parts in (report.by_subset.values(), [each.scores for each in report.by_length]):
        assert sum(each.accuracy.num for each in parts) == len(rows)
        total = sum(each.accuracy.mean * each.accuracy.num for each in parts)
        assert total / len(rows) == pytest.approx(report.overall.accuracy.mean)
        assert sum(each.num_ties for each in parts) == report.overall.num_ties
    assert all(each.shortest <= each.longest for each in report.by_length)
    for one, following in itertools.pairwise(report.by_length):
        assert one.longest < following.shortest  # equal differences together
    assert len(report.by_length) <= num_bins


@exact
@given(pairs)
def test_swapping_the_labels_turns_every_figure(rows):
    turned = [(b, a, n, m) for a, b, m, n in rows]
    one, other = report_of(rows).overall, report_of(turned).overall
    assert one.accuracy.mean == pytest.approx(1 - other.accuracy.mean)
    assert one.margin.mean == pytest.approx(-other.margin.mean)
    assert one.longer_wins.mean == pytest.approx(other.shorter_wins.mean)
    assert one.accuracy.standard_error == pytest.approx(other.accuracy.standard_error, nan_ok=True)


@exact
@given(pairs, st.floats(0.1, 10))
def test_a_rewards_scale_moves_the_margin_alone(rows, scale):
    scaled = report_of([(scale * a, scale * b, m, n) for a, b, m, n in rows]).overall
    plain = report_of(rows).overall
    assert scaled.accuracy == plain.accuracy
    assert scaled.margin.mean == pytest.approx(scale * plain.margin.mean)


@exact
@given(pairs)
def test_length_as_the_reward_scores_what_the_rule_scores(rows):
    by_length = report_of([(m, n, m, n) for _, _, m, n in rows]).overall
    assert by_length.accuracy == by_length.longer_wins
    assert by_length.num_ties == by_length.num_equal_length
    if by_length.better_rule == "longer":
        assert by_length.over_length.mean == 0.0


def test_bins_are_quantiles():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, size=(2, 400))
    report = held_out_pairs(rng.normal(size=400), rng.normal(size=400), *lengths, num_bins=5)
    sizes = [each.scores.accuracy.num for each in report.by_length]
    assert sizes == pytest.approx([80] * 5, abs=2)  # equal differences are not torn apart
    # in the outer bins length decides by itself
    assert report.by_length[0].scores.longer_wins.mean == 0.0
    assert report.by_length[-1].scores.longer_wins.mean == 1.0


def test_standard_errors():
    rng = np.random.default_rng(1)
    margins, lengths = rng.normal(size=60), rng.integers(1, 50, size=(2, 60))
    alone = held_out_pairs(margins, np.zeros(60), *lengths).overall
    assert alone.margin.standard_error == pytest.approx(statistics.stdev(margins) / math.sqrt(60))
    correct = (margins > 0).astype(float)
    longer = (np.sign(lengths[0] - lengths[1]) + 1) / 2
    rule = longer if alone.better_rule == "longer" else 1 - longer
    paired = statistics.stdev(correct - rule) / math.sqrt(60)
    assert alone.over_length.standard_error == pytest.approx(paired)
    # copies of a pair under its own prompt add nothing, wherever they stand
    prompts = [f"prompt {i}" for i in range(60)]
    thrice = held_out_pairs(
        np.tile(margins, 3), np.zeros(180), *np.tile(lengths, 3), prompts=prompts * 3
    ).overall
    assert thrice.accuracy.standard_error == pytest.approx(alone.accuracy.standard_error)
    assert thrice.accuracy.num == 180


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_rewards": [1.0]}, "1 rejected_rewards, 2 chosen_lengths"),
        ({"chosen_rewards": [1.0, math.nan]}, "pair 1: chosen_rewards is nan"),
        ({"chosen_lengths": [math.inf, 1.0]}, "pair 0: chosen_lengths is inf"),
        ({"chosen_rewards": [[1.0], [2.0]]}, r"chosen_rewards has shape \(2, 1\)"),
        ({"subsets": ["a"]}, "1 subsets"),
        ({"prompts": []}, "0 prompts"),
        ({"num_bins": 0}, "num_bins must be at least 1"),
    ],
)
def test_faults_are_named(change, message):
    columns = ["chosen_rewards", "rejected_rewards", "chosen_lengths", "rejected_lengths"]
    good = {name: [1.0, 2.0] for name in columns}
    with pytest.raises(TokenRatioError, match=message):
        held_out_pairs(**(good | change))
    with pytest.raises(TokenRatioError, match="no pairs"):
        held_out_pairs([], [], [], [])


def test_longer_wins_on_real_pairs(data_folder):
    """The data's README: the chosen reply has more words in 65 % of these pairs."""
    rows = [row.fields for row in read_rows(data_folder / "alpaca_pairs_small", split="train")]
    lengths = [[len(row[side].split()) for row in rows] for side in ("chosen", "rejected")]
    prompts = [row["prompt"] for row in rows]
    of_prompts = held_out_pairs(*lengths, *lengths, prompts=prompts).overall
    longer = of_prompts.longer_wins.mean - of_prompts.num_equal_length / len(rows) / 2
    assert longer == pytest.approx(0.65, abs=0.005)
    # 8000 pairs of some hundred prompts say less than as many of their own would
    alone = held_out_pairs(*lengths, *lengths).overall
    assert of_prompts.accuracy.standard_error > alone.accuracy.standard_error
