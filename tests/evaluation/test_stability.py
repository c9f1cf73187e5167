import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.stability import (
    SPIKE_HISTORY,
    SPIKE_MADS,
    loss_rises,
    read_metrics,
    stability,
)
from tokenratio.training.callbacks import MetricsWriter
from tokenratio.training.config import TokenRatioConfig


def write(folder, lines, *, end=""):
    text = "".join(json.dumps(line) + "\n" for line in lines) + end
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def run(num, *, seed=0, **metrics):
    """Lines of a calm run; a metric is a function of the step."""
    rng = np.random.default_rng(seed)
    return [
        {
            "step": step,
            "loss": 0.7 + 0.01 * rng.normal(),
            "grad_norm": 1.0,
            **{name.replace("__", "/"): float(of(step)) for name, of in metrics.items()},
        }
        for step in range(1, num + 1)
    ]


def test_gradient_tails(tmp_path):
    norms = [0.1 * step for step in range(1, 201)]
    lines = [{"step": i + 1, "loss": 0.5, "grad_norm": norm} for i, norm in enumerate(norms)]
    values = stability(read_metrics(write(tmp_path, lines))).values
    cuts = statistics.quantiles(norms, n=100, method="inclusive")
    assert values["grad_norm/median"] == pytest.approx(statistics.median(norms))
    assert values["grad_norm/p95"] == pytest.approx(cuts[94])
    assert values["grad_norm/p99"] == pytest.approx(cuts[98])
    assert values["grad_norm/max"] == pytest.approx(20)
    assert values["grad_norm/max_over_median"] == pytest.approx(20 / statistics.median(norms))
    assert all(type(value) is float for value in values.values())


def test_spikes_are_found_and_slow_change_is_none(tmp_path):
    lines = run(200)
    for step in (60, 150):
        lines[step - 1]["loss"] += 0.5
    measured = stability(read_metrics(write(tmp_path, lines)))
    assert measured.values["loss/spikes"] == 2
    assert measured.values["loss/spike_share"] == pytest.approx(2 / 180)
    assert any("at step 60" in line or "at step 150" in line for line in measured.sentences)

    slow = [{**line, "loss": line["loss"] + 0.002 * line["step"]} for line in run(200)]
    assert stability(read_metrics(write(tmp_path, slow))).values["loss/spikes"] == 0


def test_a_fall_and_a_flat_loss_are_no_spikes(tmp_path):
    lines = run(100)
    lines[60]["loss"] -= 0.5
    assert stability(read_metrics(write(tmp_path, lines))).values["loss/spikes"] == 0
    flat = [{"step": i, "loss": 0.25 + 1e-9 * (i % 7 == 0)} for i in range(1, 60)]
    assert stability(read_metrics(write(tmp_path, flat))).values["loss/spikes"] == 0


def test_rises_by_hand():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=120)
    rises = loss_rises(losses)
    assert len(rises) == 100
    for step in (20, 45, 119):
        before = losses[max(0, step - 50) : step]
        median = statistics.median(before)
        mad = statistics.median(abs(before - median))
        assert rises[step - SPIKE_HISTORY] == pytest.approx((losses[step] - median) / mad)


@pytest.mark.slow
def test_noise_alone_rarely_spikes():
    rng = np.random.default_rng(1)
    runs = [(loss_rises(rng.normal(size=300)) > SPIKE_MADS).any() for _ in range(100)]
    assert np.mean(runs) < 0.05


def test_drift_and_displacement(tmp_path):
    lines = run(
        100,
        kl_ref_policy=lambda step: 0.01 * step,
        log_ratio__mean=lambda step: -0.02 * step,
        log_ratio__chosen=lambda step: -0.01 * step,
        logps__chosen=lambda step: -20 - 0.1 * step,
        rewards__margins=lambda step: 0.003 * step,
    )
    measured = stability(read_metrics(write(tmp_path, lines)))
    values = measured.values
    assert values["kl_ref_policy/start"] == pytest.approx(0.055)  # the mean of steps 1 to 10
    assert values["kl_ref_policy/end"] == pytest.approx(0.955)
    assert values["kl_ref_policy/max"] == pytest.approx(1.0)
    assert values["log_ratio/mean/end"] == pytest.approx(-1.91)
    assert values["log_ratio/chosen/share_below_start"] == 1.0
    assert values["logps/chosen/start"] == pytest.approx(-20.55)
    assert values["chosen/alarm"] == 1.0
    assert measured.sentences[0].startswith("ALARM: the chosen responses became less likely")


@pytest.mark.parametrize(("chosen", "margins"), [(1, 1), (-1, -1), (0, 1)])
def test_no_alarm_unless_chosen_falls_and_margins_rise(tmp_path, chosen, margins):
    rng = np.random.default_rng(0)
    lines = run(
        100,
        log_ratio__chosen=lambda step: chosen * 0.01 * step + 0.05 * rng.normal(),
        rewards__margins=lambda step: margins * 0.01 * step,
    )
    measured = stability(read_metrics(write(tmp_path, lines)))
    assert measured.values["chosen/alarm"] == 0.0
    assert not any("ALARM" in line for line in measured.sentences)


def test_without_a_reference_log_probabilities_alone_are_looked_at(tmp_path):
    measured = stability(read_metrics(write(tmp_path, run(30, logps__chosen=lambda step: step))))
    assert measured.values["logps/chosen/share_below_start"] == 0.0
    assert not {"chosen/alarm", "kl_ref_policy/start", "log_ratio/chosen/start"} & {
        *measured.values
    }


def test_a_killed_run(tmp_path):
    whole = run(30)
    log = read_metrics(write(tmp_path, whole, end='{"step": 31, "loss": 0.'))
    assert (len(log.lines), log.num_truncated) == (30, 1)
    assert any("cut off" in line for line in stability(log).sentences)
    # cut within a letter of two bytes
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10] + '{"é'.encode()[:-1])
    assert read_metrics(path).num_truncated == 1


def test_a_resumed_run(tmp_path):
    lines = [*run(30), *[{**line, "loss": 9.0} for line in run(30)[20:]], *run(40)[30:]]
    log = read_metrics(write(tmp_path, lines))
    assert [line["step"] for line in log.lines] == list(range(1, 41))
    assert [line["loss"] for line in log.lines[20:30]] == [9.0] * 10
    assert log.num_duplicates == 10
    assert any("10 lines are left out" in line for line in stability(log).sentences)


def test_evaluations_are_no_steps(tmp_path):
    lines = run(10)
    lines.insert(5, {"step": 5, "eval_loss": 3.0, "eval_rewards/margins": 1.0})
    log = read_metrics(write(tmp_path, lines))
    assert (len(log.lines), log.num_duplicates) == (10, 0)
    assert [line["loss"] for line in log.lines] == [line["loss"] for line in run(10)]


def test_what_the_trainer_writes_is_read(tmp_path):
    """The writer's own lines, with a resumption: it drops what it will redo."""
    args = TokenRatioConfig(output_dir=str(tmp_path), report_to=[])
    writer, state = MetricsWriter(), TrainerState()
    state.is_world_process_zero = True
    writer.on_train_begin(args, state, None)
    for begin in (0, 10):
        state.global_step = begin
        state.log_history = state.log_history[:begin]  # as in the checkpoint
        writer.on_train_begin(args, state, None)
        for line in run(15 + begin)[begin:]:
            state.global_step = line.pop("step")
            state.log_history.append(line)
            writer.on_log(args, state, None, logs=line)
    log = read_metrics(tmp_path)
    assert [line["step"] for line in log.lines] == list(range(1, 26))
    assert (log.num_truncated, log.num_duplicates) == (0, 0)


def test_values_that_are_not_finite_are_counted(tmp_path):
    lines = run(30)
    lines[3]["loss"], lines[4]["grad_norm"] = math.nan, math.inf
    measured = stability(read_metrics(write(tmp_path, lines)))
    assert measured.values["not_finite"] == 2
    assert math.isfinite(measured.values["grad_norm/max"])
    assert "ALARM: 2 losses or gradient norms" in measured.sentences[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "loss": 1}\n{"step"\n{"step": 2, "loss": 1}\n', r"metrics.jsonl:2: not JSON"),
        ('{"step": 1, "loss": 1}\n[1]\n', r"metrics.jsonl:2: it is a list, not an object"),
        ('{"loss": 1}\n', "metrics.jsonl:1: no field 'step'"),
        ('{"step": 1, "loss": "1"}\n', r"metrics.jsonl:1: loss is '1', not a number"),
        ('{"step": 1, "eval_loss": 1}\n', r"holds no training step"),
        ("", r"holds no training step"),
        ('{"step": 1, "lo', r"holds no training step"),
    ],
)
def test_faults_are_named(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(TokenRatioError, match=message):
        read_metrics(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenRatioError, match=r"metrics.jsonl cannot be read \(No such file"):
        read_metrics(tmp_path)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_any_short_log_gives_finite_figures(tmp_path_factory, losses):
    """Nothing divides by zero, at any length."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"step": step, "loss": loss, "rewards/margins": loss, "log_ratio/chosen": -loss}
        for step, loss in enumerate(losses)
    ]
    values = stability(read_metrics(write(folder, lines))).values
    assert all(math.isfinite(value) for value in values.values())
