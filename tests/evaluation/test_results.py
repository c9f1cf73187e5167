"""Measures as they are kept: figures, the file, the table."""

import json
import math

import pytest

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.results import Measure, PolicyMeasures, measure_of, table

VALUES = (("a", 0, 1.0), ("b", 0, 4.0), ("a", 1, 2.0))


def policy(*measures, name="p", **changes):
    settings = {"top_p": 0.9, "judges": {"gold": {}}, "max_length": None}
    return PolicyMeasures(name, "dpo", settings, measures, **changes)


def test_the_mean_and_its_error_by_hand():
    """Two prompts with sums of residuals −5/3 and 5/3 around 7/3."""
    measure = measure_of("m", VALUES, unit="words", better="lower")
    assert measure.mean == pytest.approx(7 / 3)
    # √(2 / (2 − 1) · ((5/3)² + (5/3)²)) / 3
    assert measure.standard_error == pytest.approx(math.sqrt(2 * 2 * 25 / 9) / 3)
    assert (measure.num, measure.unit, measure.better) == (3, "words", "lower")
    assert measure.values == VALUES


def test_samples_of_a_prompt_need_not_stand_together():
    apart = measure_of("m", VALUES)
    together = measure_of("m", sorted(VALUES))
    assert apart.standard_error == together.standard_error
    as_if_independent = measure_of("m", [(str(i), 0, v) for i, (_, _, v) in enumerate(VALUES)])
    assert apart.standard_error != pytest.approx(as_if_independent.standard_error)


def test_nan_is_left_out_and_counted_out():
    measure = measure_of("m", [*VALUES, ("c", 0, math.nan)])
    assert (measure.mean, measure.num) == (pytest.approx(7 / 3), 3)
    nothing = measure_of("m", [("c", 0, math.nan)])
    assert math.isnan(nothing.mean)
    assert (nothing.num, nothing.values, nothing.text) == (0, (), "–")
    one = measure_of("m", VALUES[:1])
    assert one.mean == 1
    assert math.isnan(one.standard_error)


@pytest.mark.parametrize(
    ("mean", "error", "unit", "text"),
    [
        (0.5, 0.0125, "share", "50.0 ± 1.2%"),
        (0.5, math.nan, "share", "50.0%"),
        (-1.23456, 0.5, "nats", "-1.235 ± 0.500"),
        (3.0, math.nan, "", "3.000"),
        (math.nan, math.nan, "share", "–"),
    ],
)
def test_text(mean, error, unit, text):
    assert Measure("m", mean, error, 3, unit).text == text


def test_the_file_gives_back_what_was_saved(tmp_path):
    """Names of any script, nan and values included."""
    nan = measure_of("überraschend/ρ|x", [("c", 0, math.nan)], unit="share", better="higher")
    saved = policy(measure_of("m", VALUES, better="lower"), nan, notes=("ALARM: ½",))
    saved.save(tmp_path / "p")
    text = (tmp_path / "p" / "measures.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    for path in (tmp_path / "p", tmp_path / "p" / "measures.json"):
        loaded = PolicyMeasures.load(path)
        assert loaded.measures[0] == saved.measures[0]
        assert math.isnan(loaded.measures[1].mean)
        assert math.isnan(loaded.measures[1].standard_error)
        assert (loaded.policy, loaded.group, loaded.settings, loaded.notes) == (
            saved.policy,
            saved.group,
            saved.settings,
            saved.notes,
        )
    assert loaded.named("m") is loaded.measures[0]
    assert loaded.named("n") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a file of measures"),
        ("[]", "is not a file of measures"),
        ("{}", "no field 'format'; this is not a file of measures"),
        ('{"format": 2}', "format is 2, not 1"),
        ('{"format": 1, "measures": [{"name": "m"}]}', "not a file of measures"),
        (
            '{"format": 1, "measures": [], "notes": []}',
            "no field 'policy'; this is not a file of measures",
        ),
        (b"\xff", "not a file of measures"),
    ],
)
def test_a_file_that_is_none_is_refused(content, message, tmp_path):
    path = tmp_path / "measures.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenRatioError, match=message):
        PolicyMeasures.load(path)


def test_no_file(tmp_path):
    with pytest.raises(TokenRatioError, match=r"cannot be read \(No such file"):
        PolicyMeasures.load(tmp_path)


def test_table():
    one = policy(
        Measure("win_rate/gold", 0.5, 0.1, 9, "share", "higher"),
        Measure("insults", 0.25, math.nan, 9, "share", "lower"),
        name="a|b",
    )
    two = policy(
        Measure("length", 3.5, 0.25, 9, "words"),
        Measure("insults", 0.0, 0.0, 9, "share", "lower"),
        name="c\nd",
    )
    assert table([one, two]).splitlines() == [
        r"| measure | a\|b | c d |",
        "| --- | --- | --- |",
        "| win_rate/gold ↑ | 50.0 ± 10.0% | – |",
        "| insults ↓ | 25.0% | 0.0 ± 0.0% |",
        "| length (words) | – | 3.500 ± 0.250 |",
    ]
