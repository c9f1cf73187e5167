"""The displacement alarm: when it speaks, that it speaks once, also over an interruption."""

import json
import logging
import random

import pytest

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.training.displacement import DISPLACEMENT_ALARM, DisplacementAlarm, is_displaced

NUM_STEPS = 60


def noise(mean, sd, num=20, seed=0):
    rng = random.Random(seed)
    return [rng.gauss(mean, sd) for _ in range(num)]


@pytest.mark.parametrize(
    ("log_ratios", "margins", "expected"),
    [
        (noise(-0.05, 0.01), noise(0.5, 0.2), True),
        (noise(-0.05, 0.01, num=5), noise(0.5, 0.1, num=5), True),
        (noise(-2.0, 0.5), noise(0.1, 0.1), True),
        (noise(-0.05, 0.01, num=4), noise(0.5, 0.1, num=4), False),  # too early to tell
        (noise(-0.005, 0.001), noise(0.5, 0.2), False),  # a loss too small to matter
        (noise(-0.05, 0.2), noise(0.5, 0.2), False),  # or not seen for noise
        (noise(0.05, 0.01), noise(0.5, 0.2), False),
        (noise(-0.05, 0.01), noise(0.0, 0.2), False),  # the margins do not rise
        (noise(-0.05, 0.01), noise(-0.5, 0.2), False),
        ([0.0] * 20, [0.0] * 20, False),
    ],
)
def test_what_counts_as_displaced(log_ratios, margins, expected):
    assert is_displaced(log_ratios, margins) is expected


@pytest.mark.parametrize("sd", [0.001, 0.02, 0.5])
def test_noise_around_the_reference_is_no_alarm(sd):
    """Looked at after each of 3,000 steps."""
    config = TokenRatioConfig(output_dir="x", use_cpu=True)
    alarm = DisplacementAlarm(config)
    pairs = zip(noise(0.0, sd, 3000), noise(0.3, 0.1, 3000, seed=1), strict=True)
    for step, (log_ratio, margin) in enumerate(pairs):
        line = {"log_ratio/chosen": log_ratio, "rewards/margins": margin}
        assert alarm.update(line, step) is None


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"loss": "dpo", "beta": 0.3}, "Set sft_weight (such as 0.1), lower learning_rate"),
        ({"sft_weight": 0.2}, "Raise sft_weight (now 0.2), lower learning_rate (now 5e-07)"),
        ({"loss": "ipo", "learning_rate": 1e-3}, "learning_rate (now 0.001) or raise beta"),
    ],
)
def test_it_says_what_to_do(settings, advice):
    alarm = DisplacementAlarm(TokenRatioConfig(output_dir="x", use_cpu=True, **settings))
    lines = [{"log_ratio/chosen": -0.1, "rewards/margins": 0.2}] * 9
    said = [alarm.update(line, step) for step, line in enumerate(lines)]
    (text,) = filter(None, said)
    assert said.index(text) == 4
    assert "\n" not in text
    assert text.startswith("ALARM at step 4: the chosen responses lose probability")
    assert "-0.100 nats per token over the last 5 logged lines" in text
    assert advice in text


def run(folder, loss="dpo", resume=None, **settings):
    args = TokenRatioConfig(
        **{
            "output_dir": str(folder),
            "loss": loss,
            "use_cpu": True,
            "disable_tqdm": True,
            "max_length": 32,
            "max_steps": NUM_STEPS,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "save_steps": 20,
            **settings,
        }
    )
    trainer = TokenRatioTrainer(
        tiny_model(), args=args, train_dataset=word_pairs(48), processing_class=tiny_tokenizer()
    )
    trainer.train(resume)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def alarms(caplog):
    return [record.getMessage() for record in caplog.records if "ALARM" in record.getMessage()]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "tbpo_a", "ipo"])
def test_it_speaks_once_in_a_run_and_is_recorded(loss, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        lines = run(tmp_path / "whole", loss)
        (said,) = alarms(caplog)
        (step,) = [line["step"] for line in lines if line.get(DISPLACEMENT_ALARM) == 1.0]
        assert said.startswith(f"ALARM at step {step}: ")
        # resumed behind it: not again; resumed before it: at the same step
        for checkpoint in (20, 40):
            caplog.clear()
            again = run(tmp_path / "whole", loss, tmp_path / "whole" / f"checkpoint-{checkpoint}")
            assert [line["step"] for line in again if DISPLACEMENT_ALARM in line] == [step]
            assert len(alarms(caplog)) == (checkpoint < step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"learning_rate": 1e-5}, {"loss": "simpo"}, {"loss": "sft"}, {"logging_steps": 20}]
)
def test_it_is_silent_where_there_is_nothing_to_tell(settings, tmp_path, caplog):
    lines = run(tmp_path, **settings)
    assert alarms(caplog) == []
    assert not any(DISPLACEMENT_ALARM in line for line in lines)
