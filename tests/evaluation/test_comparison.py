"""`compare` from Python; the command's tests are in tests/cli/test_compare.py."""

import random

import pytest

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.comparison import compare
from tokenratio.evaluation.paired_comparison import PolicyValues, holm, paired_comparison
from tokenratio.evaluation.results import PolicyMeasures, measure_of

NUM = 20


def measured(name, seed, *, shift=0.0, **settings):
    draw = random.Random(seed)
    reward = [(f"p:{i}", 0, draw.gauss(shift, 1)) for i in range(NUM)]
    wins = [(f"p:{i}", 0, float(draw.random() < 0.5)) for i in range(NUM)]
    lengths = [(f"p:{i}", 0, draw.gauss(30, 3)) for i in range(NUM)]
    measures = (
        measure_of("gold_reward", reward, better="higher"),
        measure_of("wins", wins, unit="share", better="higher"),
        measure_of("length", lengths, unit="words"),
    )
    return PolicyMeasures(name, name, settings, measures)


def values(policy, runs, measure):
    rows = [
        (value, prompt, seed)
        for seed, run in enumerate(runs)
        for prompt, _, value in run.named(measure).values
    ]
    found, prompts, seeds = zip(*rows, strict=True)
    return PolicyValues(policy, found, prompts, seeds if len(runs) > 1 else None)


def test_measures_and_folders_are_compared_alike(tmp_path):
    a, b = measured("a", 0, shift=3.0), measured("b", 1)
    found = compare([a, b], num_resamples=200, seed=4)
    expected = holm(
        [
            paired_comparison(
                values("a", [a], name), values("b", [b], name), num_resamples=200, seed=4
            )
            for name in ("gold_reward", "wins")
        ]
    )
    assert [(c.measure, c.unit, c.better) for c in found] == [
        ("gold_reward", "", "higher"),
        ("wins", "share", "higher"),
    ]
    for one, other in zip(found, expected, strict=True):
        assert (one.difference, one.adjusted_p) == (other.difference, other.adjusted_p)
    assert found[0].a_is_better
    assert found[0].line().startswith("a wins by 2.82 ± 0.33 (95 % interval")
    assert " points (95 % interval " in found[1].line()
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    assert compare([tmp_path / "a", str(tmp_path / "b")], num_resamples=200, seed=4) == found
    renamed = compare({"a": a, "b": [tmp_path / "b"]}, num_resamples=200, seed=4)
    assert renamed == found


def test_training_seeds_are_paired():
    a = [measured("a", seed, shift=0.5) for seed in range(3)]
    b = [measured("b", seed + 10) for seed in range(3)]
    (found,) = compare({"ours": a, "theirs": b}, measures=["gold_reward"], num_resamples=200)
    expected = paired_comparison(
        values("ours", a, "gold_reward"), values("theirs", b, "gold_reward"), num_resamples=200
    )
    assert (found.name_a, found.num_seeds) == ("ours", 3)
    assert (found.difference, found.interval) == (expected.difference, expected.interval)


def test_all_pairs_and_what_lower_means():
    policies = [measured(name, seed) for seed, name in enumerate("abc")]
    options = {"measures": ["length"], "num_resamples": 100}
    assert [c.name_b for c in compare(policies, **options)] == ["b", "c"]
    found = compare(policies, all_pairs=True, **options)
    assert [(c.name_a, c.name_b) for c in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {c.num_comparisons for c in found} == {3}


def test_notes_and_mistakes():
    a, b = measured("a", 0, temperature=1.0), measured("b", 1, temperature=0.5)
    notes = []
    compare([a, b], num_resamples=100, report=notes.append)
    assert notes == ["note: the evaluations differ in temperature: 1.0, 0.5"]
    for policies, options, message in (
        ([a], {}, "at least two policies, not 1"),
        ([a, a], {}, "two policies have the same name"),
        ([a, b], {"measures": ["golden"]}, "'golden'; all have: gold_reward, wins, length"),
        ([a, b], {"require": "length"}, "neither direction of length is better"),
        ([a, "nowhere"], {}, "nowhere cannot be read"),
    ):
        with pytest.raises(TokenRatioError, match=message):
            compare(policies, **options)
