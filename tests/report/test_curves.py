"""The curves: which figures a run has, and that thinning and smoothing keep what they should."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from report.made_files import make_run, wave
from tokenratio.report.artefacts import read_artefacts
from tokenratio.report.curves import (
    DASHES,
    PALETTE,
    PANELS,
    curve_figures,
    ends_table,
    evaluated_as,
    smoothed,
)
from tokenratio.training.metrics import GREATER_IS_BETTER


def figures_of(*folders):
    main, others = curve_figures(read_artefacts(folders).runs)
    return {figure.name: figure for figure in [*main, *others]}


def names_of(figure):
    return [trace["name"] for trace in figure.traces]


def test_a_run_has_the_figures_of_what_it_logged(tmp_path):
    found = figures_of(make_run(tmp_path))
    assert list(found) == ["loss", "margin", "accuracy", "log-ratio", "kl", "grad-norm"]
    assert names_of(found["loss"]) == ["training, each step", "training", "held out"]
    assert names_of(found["log-ratio"]) == ["chosen, each step", "chosen"]
    assert found["loss"].traces[2]["x"] == [20, 40, 60]


def test_every_metric_of_training_has_a_figure():
    drawn = {metric for panel in PANELS for metric in panel.metrics}
    assert set(GREATER_IS_BETTER) - drawn == {"rewards/ties", "tokens/past_shorter"}


def test_a_metric_that_nobody_knows_is_drawn_too(tmp_path):
    found = figures_of(make_run(tmp_path, mine__own=wave))
    assert found["other-0"].title == "mine/own"


def test_held_out_sets_keep_their_names(tmp_path):
    lines = [{"step": 1, "loss": 0.5, "rewards/margins": 0.1}]
    for name in ("", "easy_", "hard_"):
        lines.append({"step": 1, f"eval_{name}loss": 0.4, f"eval_{name}rewards/margins": 0.2})
    found = figures_of(make_run(tmp_path, lines=lines))
    assert names_of(found["loss"])[1:] == ["held out", "held out: easy", "held out: hard"]
    assert len({str(trace["marker"]) for trace in found["loss"].traces[1:]}) == 3


def test_metrics_with_equal_ends_are_not_confused():
    assert evaluated_as("eval_log_ratio/mean", "state_weight/mean") is None
    assert evaluated_as("eval_a_b_rewards/margins", "rewards/margins") == "a_b"
    assert evaluated_as("rewards/margins", "rewards/margins") is None


def test_several_runs_are_told_apart_without_colour(tmp_path):
    runs = [make_run(tmp_path / name, seed=i) for i, name in enumerate(("a", "b", "c"))]
    found = figures_of(*runs)
    smooth = [t for t in found["margin"].traces if t.get("meta") != "raw"]
    assert [trace["name"] for trace in smooth] == ["a", "b", "c"]
    assert [trace["line"]["dash"] for trace in smooth] == list(DASHES[:3])
    assert [trace["line"]["color"] for trace in smooth] == list(PALETTE[:3])
    assert all(len(panel.traces) > 0 for panel in found.values())
    assert "log-ratio-chosen" in found


def test_where_a_run_was_resumed_is_marked(tmp_path):
    folder = make_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["resumptions"] = [{"time": "2026-01-01", "checkpoint": "checkpoint-20", "step": 20}]
    (folder / "run.json").write_text(json.dumps(record))
    (shape,) = figures_of(folder)["loss"].layout["shapes"]
    assert shape["x0"] == shape["x1"] == 20


def test_the_gradient_norm_is_logarithmic_only_where_it_must_be(tmp_path):
    calm = figures_of(make_run(tmp_path / "calm"))["grad-norm"]
    wild = figures_of(make_run(tmp_path / "wild", grad_norm=lambda t: 10 ** (4 * t)))["grad-norm"]
    assert "type" not in calm.layout["yaxis"]
    assert wild.layout["yaxis"]["type"] == "log"


def test_what_is_thinned_keeps_its_extremes(tmp_path):
    steps = 30_000
    lines = [{"step": i, "loss": float(wave(i / 3000))} for i in range(1, steps + 1)]
    lines[12_344]["loss"], lines[20_000]["loss"] = 99.0, -99.0
    raw = figures_of(make_run(tmp_path, lines=lines))["loss"].traces[0]
    assert len(raw["x"]) <= 2000
    assert max(raw["y"]) == 99.0
    assert min(raw["y"]) == -99.0
    assert raw["x"][raw["y"].index(99.0)] == 12_345
    assert raw["x"][0] == 1
    assert raw["x"][-1] == steps
    assert raw["x"] == sorted(raw["x"])


def test_many_long_runs_fit_into_a_page(tmp_path):
    lines = [{"step": i, "loss": 0.123456 * i, "grad_norm": 1.5 + i} for i in range(1, 5000)]
    runs = [make_run(tmp_path / str(n), lines=lines) for n in range(12)]
    text = json.dumps([figure.to_dict() for figure in figures_of(*runs).values()])
    assert len(text) < 3_000_000


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80))
def test_the_smoothed_curve_is_a_mean_of_what_came_before(values):
    found = smoothed(np.array(values))
    assert found[0] == pytest.approx(values[0])
    for index, value in enumerate(found):
        seen = values[: index + 1]
        assert min(seen) - 1e-6 <= value <= max(seen) + 1e-6


def test_a_constant_is_smoothed_to_itself_and_a_step_is_followed():
    assert smoothed(np.full(500, 3.0)) == pytest.approx(3.0)
    step = smoothed(np.array([0.0] * 250 + [1.0] * 250))
    # After as many values as it remembers, 4 % of the run, it is at 1 − 1/e.
    assert step[250 + 19] == pytest.approx(1 - (1 - 1 / 20) ** 20)


def test_values_that_cannot_be_drawn_are_left_out(tmp_path):
    lines = [
        {"step": 1, "loss": 0.5, "odd": "text"},
        {"step": 2, "loss": float("nan"), "odd": None},
        {"step": 3, "loss": 0.25, "odd": [1]},
    ]
    found = figures_of(make_run(tmp_path, lines=lines))
    assert found["loss"].traces[0]["x"] == [1, 3]
    assert "other-0" not in found


def test_ends(tmp_path):
    lines = [{"step": i, "loss": float(i > 10)} for i in range(1, 21)]
    lines.append({"step": 20, "eval_loss": 0.75})
    table = ends_table(read_artefacts([make_run(tmp_path, lines=lines)]).runs)
    assert table.header == ("metric", "start", "end", "held out")
    assert table.rows == [("loss", "0", "1", "0.75")]
