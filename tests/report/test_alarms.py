"""Every alarm sounds for its fault, says what to do, and is silent for a calm run."""

import math

import pytest

from report.made_files import make_evaluation, make_run
from tokenratio.evaluation.results import PolicyMeasures, measure_of
from tokenratio.report.alarms import alarms_of_policy, alarms_of_run
from tokenratio.report.artefacts import read_artefacts


def alarms(folder, config=(), **metrics):
    make_run(folder, config=config, **metrics)
    (run,) = read_artefacts([folder]).runs
    return alarms_of_run(run.log, run.config)


def test_a_calm_run_has_none(tmp_path):
    assert alarms(tmp_path) == []


FAULTS = {
    "Losses or gradients are not finite": (
        {"grad_norm": lambda t: math.nan if 0.5 < t < 0.55 else 1.0},
        "Lower learning_rate",
    ),
    "Chosen responses lose probability": (
        {"log_ratio__chosen": lambda t: -0.4 * t},
        "Set sft_weight (such as 0.1), lower learning_rate (now 0.0001) or raise beta (now 0.1)",
    ),
    "The KL runs away": ({"kl_ref_policy": lambda t: 2 * t * t}, "Raise beta"),
    "The policy is far from its reference": ({"kl_ref_policy": lambda t: 0.8}, "Raise beta"),
    "State weights are clamped": (
        {"state_weight__clamped": lambda t: 0.2 * t},
        "Lower baseline_learning_rate",
    ),
    "Most gradients are clipped": ({"grad_norm": lambda t: 12.0}, "raise max_grad_norm"),
    "The loss has spikes": (
        {"loss": lambda t: 3.0 if 0.8 < t <= 0.81 or 0.9 < t <= 0.91 else 0.7},
        "warm-up",
    ),
    "The pairs are not told apart": ({"rewards__margins": lambda t: 0.0}, "inspect-data"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_each_fault_is_told_alone_with_what_to_do(what, tmp_path):
    metrics, advice = FAULTS[what]
    found = alarms(tmp_path, steps=100, **metrics)
    assert [alarm.what for alarm in found] == [what]
    assert advice in found[0].advice
    assert found[0].level in ("alarm", "watch")


def test_what_the_run_itself_saw_counts(tmp_path):
    """Displacement in the middle of a run, which start and end do not show."""
    found = alarms(tmp_path, alarm__displacement=lambda t: float(0.48 < t <= 0.5))
    assert found[0].what == "Chosen responses lose probability"
    assert "first saw it at step 1" in found[0].text  # noise makes every line's value non-zero


def test_alarms_come_before_watches(tmp_path):
    found = alarms(tmp_path, grad_norm=lambda t: 12.0, kl_ref_policy=lambda t: 2 * t * t)
    assert [alarm.level for alarm in found] == ["alarm", "watch"]


def test_the_kl_of_evaluations_counts_where_training_logs_none(tmp_path):
    """As for DPO, whose loss has no KL."""
    lines = [{"step": step, "loss": 0.5} for step in range(1, 9)]
    lines += [{"step": step, "eval_loss": 0.5, "eval_kl_ref_policy": 0.3 * step} for step in (4, 8)]
    make_run(tmp_path, lines=lines)
    (run,) = read_artefacts([tmp_path]).runs
    (found,) = alarms_of_run(run.log, run.config)
    assert found.what == "The policy is far from its reference"
    assert "2.4 nats" in found.text


def test_few_steps_are_not_called_most(tmp_path):
    assert alarms(tmp_path, steps=6, grad_norm=lambda t: 12.0) == []


def test_a_run_without_a_limit_clips_nothing(tmp_path):
    assert alarms(tmp_path, config={"max_grad_norm": 0}, grad_norm=lambda t: 1e6) == []


def policies(folder, gain):
    make_evaluation(folder, {"p": ("run", gain)})
    reference, policy = (PolicyMeasures.load(folder / name) for name in ("reference", "p"))
    return policy, reference


def test_length_drift_is_told_in_both_directions(tmp_path):
    policy, reference = policies(tmp_path, 1.0)
    (found,) = alarms_of_policy(policy, reference)
    assert found.what == "Answers became longer"
    assert "lc_win_rate" in found.advice
    (found,) = alarms_of_policy(reference, policy)
    assert found.what == "Answers became shorter"


def test_lengths_that_hardly_differ_are_calm(tmp_path):
    policy, reference = policies(tmp_path, 0.1)
    assert alarms_of_policy(policy, reference) == []
    assert alarms_of_policy(policy, None) == []


def test_lengths_that_differ_by_chance_are_calm():
    def policy(*lengths):
        values = [(str(prompt), 0, length) for prompt, length in enumerate(lengths)]
        return PolicyMeasures("p", "dpo", {}, (measure_of("length/words", values),))

    assert alarms_of_policy(policy(1.0, 90.0, 2.0), policy(40.0, 2.0, 1.0)) == []
    assert alarms_of_policy(policy(61.0, 62.0, 63.0), policy(30.0, 31.0, 32.0)) != []


def cut_policy(*cut, limit=128):
    values = [(str(prompt), 0, float(each)) for prompt, each in enumerate(cut)]
    return PolicyMeasures(
        "p", "dpo", {"max_new_tokens": limit}, (measure_of("cut", values, unit="share"),)
    )


def test_answers_that_no_longer_end_are_told():
    """Although their length, at the limit before, can hardly grow."""
    before, after = cut_policy(*([1] * 14 + [0] * 6)), cut_policy(*[1] * 20)
    (found,) = alarms_of_policy(after, before)
    assert (found.level, found.what) == ("alarm", "Answers do not end")
    assert "100.0% of the answers are cut at max_new_tokens (128), 70.0% of the ref" in found.text
    assert "lower bounds" in found.text
    (found,) = alarms_of_policy(before, before)
    assert (found.level, found.what) == ("watch", "Most answers are cut")
    assert alarms_of_policy(after, None) != []


def test_a_few_cut_answers_are_calm():
    calm, little = cut_policy(*([0] * 20)), cut_policy(*([1] * 2 + [0] * 18))
    assert alarms_of_policy(little, calm) == []
    assert alarms_of_policy(cut_policy(1, 0, 0), cut_policy(0, 0, 0)) == []  # by chance


def test_held_out_pairs_at_or_below_chance_are_told():
    def found(low, high):
        return alarms_of_run(None, {}, {"held_out": {"accuracy": 0.4, "interval": [low, high]}})

    assert [(a.level, a.what) for a in found(0.31, 0.45)] == [
        ("alarm", "Held-out pairs are ordered the wrong way round")
    ]
    assert [a.level for a in found(0.45, 0.6)] == ["watch"]
    assert found(0.51, 0.6) == []
    assert alarms_of_run(None, {}, {"eval_loss": 0.5}) == []


def test_what_evaluate_noted_is_told_once(tmp_path):
    """Its notes on the run's log are the run's own alarms."""
    notes = (
        "ALARM: it was trained against another reference (org/other)",
        "ALARM: the chosen responses became less likely while the margins rose: both lose",
        "ALARM: 3 losses or gradient norms are not finite (left out).",
        "WATCH: the gold reward rose, but perplexity_ref went from 5 to 50",
        "60 steps are logged.",
    )
    length = measure_of("length/words", [("a", 0, 1.0), ("b", 0, 2.0)])
    policy = PolicyMeasures("p", "dpo", {}, (length,), notes)
    found = alarms_of_policy(policy, policy)
    assert [(alarm.level, alarm.text[:20]) for alarm in found] == [
        ("alarm", "It was trained again"),
        ("watch", "The gold reward rose"),
    ]
