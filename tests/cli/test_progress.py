"""What a run says while it trains: lines in a log file, a bar on a terminal, the alarm."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest
from scipy import stats
from tqdm import tqdm
from transformers import TrainerState

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli import progress
from tokenratio.cli.main import main
from tokenratio.cli.progress import (
    describe_briefly,
    describe_evaluations,
    describe_held_out,
    describe_step,
    held_out_figures,
)

STEP = re.compile(
    r"step (\d+)/(\d+) \(epoch \d\.\d\d\): loss \d+\.\d{4}, accuracy [01]\.\d{3}, margin \S+, "
    r"lr \S+, [\d,]+ tokens/s, \d+:\d\d:\d\d left"
)
EVALUATION = re.compile(
    r"evaluation at step (\d+): reward accuracy [01]\.\d{3} \(95 % [01]\.\d{3}–[01]\.\d{3}; "
    r"9 pairs, (no ties|\d ties?)\), margin \S+, loss \d\.\d{4}"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    for name, num in (("pairs.jsonl", 24), ("held_out.jsonl", 9)):
        rows = word_pairs(num, seed=num)
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(**changes):
    document = {
        "model": "model",
        "train_dataset": "pairs.jsonl",
        "eval_dataset": "held_out.jsonl",
        "output_dir": "run",
        "loss": "dpo",
        "use_cpu": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "num_train_epochs": 2,
        **changes,
    }
    Path("recipe.yaml").write_text(json.dumps(document))  # YAML holds JSON
    return "recipe.yaml"


def lines_of(text, pattern):
    return [found for line in text.splitlines() if (found := pattern.fullmatch(line))]


@pytest.mark.parametrize(
    ("loss", "logging_steps", "steps"),
    [("dpo", 1, range(1, 13)), ("tbpo_a", 5, (5, 10)), ("simpo", 4, (4, 8, 12))],
)
def test_a_log_file_has_a_line_for_each_step_and_evaluation(capsys, loss, logging_steps, steps):
    changes = {"logging_steps": logging_steps, "eval_strategy": "steps", "eval_steps": 6}
    assert main(["train", recipe(loss=loss, **changes)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = lines_of(printed.out, STEP)
    assert [(int(line[1]), int(line[2])) for line in found] == [(step, 12) for step in steps]
    assert [int(line[1]) for line in lines_of(printed.out, EVALUATION)] == [6, 12]
    assert "resumed" not in printed.out
    assert printed.out.count("held out: reward accuracy") == 1


def test_sft_and_reward_models_have_lines_too(capsys):
    assert main(["train", recipe(loss="sft")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 12
    assert all(re.search(r": loss \S+, lr \S+, [\d,]+ tokens/s, ", line) for line in lines)
    reward = json.loads(Path(recipe(output_dir="rm", eval_strategy="epoch")).read_text())
    del reward["loss"]
    Path("reward.yaml").write_text(json.dumps(reward))
    assert main(["train-reward", "reward.yaml"]) == 0
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 12
    assert all(re.search(r"accuracy \d\.\d{3}, margin", line) for line in steps)
    assert len(lines_of(out, EVALUATION)) == 2
    assert re.search(r"held out: accuracy \d\.\d+ \(95 % \d\.\d+–\d\.\d+; 9 pairs, no ties\)", out)
    written = json.loads(Path("rm/eval.json").read_text())["held_out"]
    low, high = written["interval"]
    assert low < written["accuracy"]["mean"] < high


@pytest.mark.parametrize(("step", "epoch"), [(3, "0.50"), (6, "1.00"), (10, "1.67")])
def test_resuming_says_from_which_step(capsys, step, epoch):
    path = recipe(save_strategy="steps", save_steps=step)
    assert main(["train", path]) == 0
    assert "resumed" not in capsys.readouterr().out
    assert main(["train", path, "--resume_from_checkpoint", f"run/checkpoint-{step}"]) == 0
    out = capsys.readouterr().out
    assert f"resumed from step {step} of 12 (epoch {epoch})" in out
    assert [int(line[1]) for line in lines_of(out, STEP)] == list(range(step + 1, 13))


def test_held_out_figures_count_ties_half():
    """Wilson's interval as scipy has it, for whole numbers of successes."""
    metrics = {"eval_loss": 0.5, "eval_rewards/margins": 0.125}
    plain = {**metrics, "eval_rewards/accuracies": 38 / 60, "eval_rewards/ties": 0.0}
    assert describe_held_out(plain, 60) == (
        "reward accuracy 0.633 (95 % 0.507–0.744; 60 pairs, no ties), margin 0.125, loss 0.5000"
    )
    tied = {**metrics, "eval_rewards/accuracies": 37 / 60, "eval_rewards/ties": 2 / 60}
    assert "accuracy 0.633 (95 % 0.507–0.744; 60 pairs, 2 ties)" in describe_held_out(tied, 60)
    for wins, ties, num in ((0, 4, 4), (10, 0, 10), (0, 0, 3), (3, 1000, 2000)):
        shares = {"eval_rewards/accuracies": wins / num, "eval_rewards/ties": ties / num}
        figures = held_out_figures({**metrics, **shares}, num)
        expected = stats.binomtest(wins + ties // 2, num).proportion_ci(method="wilson")
        assert figures["interval"] == pytest.approx(tuple(expected))
        assert (figures["num_pairs"], figures["num_ties"]) == (num, ties)
    assert describe_held_out({"eval_loss": 2.0}, 7) == "loss 2.0000 (7 rows)"


def test_an_untrained_policy_ties_with_its_reference(capsys):
    assert main(["train", recipe(learning_rate=1e-12, max_steps=1)]) == 0
    assert "accuracy 0.500 (95 % 0.227–0.773; 9 pairs, 9 ties)" in capsys.readouterr().out
    document = json.loads(Path("run/eval.json").read_text())
    assert document["eval_rewards/accuracies"] == 0.0  # TRL's, for which a tie is a miss
    assert document["eval_rewards/ties"] == 1.0
    assert document["held_out"]["accuracy"] == 0.5
    assert document["held_out"]["num_ties"] == 9
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert (line["rewards/accuracies"], line["rewards/ties"]) == (0.0, 1.0)


def test_a_line_says_what_there_is():
    state = TrainerState(global_step=3, max_steps=4000, epoch=0.25)
    logs = {"loss": 0.69317, "rewards/accuracies": 0.5, "rewards/ties": 0.25, "learning_rate": 5e-7}
    logs |= {"rewards/margins": 0.00123456, "tokens_per_second": 12345.6, "grad_norm": 1.0}
    assert describe_step(logs, state, 3725.4) == (
        "step 3/4000 (epoch 0.25): loss 0.6932, accuracy 0.625, margin 0.001235, lr 5e-07, "
        "12,346 tokens/s, 1:02:05 left"
    )
    assert describe_step({"loss": 2.0}, state, None) == "step 3/4000 (epoch 0.25): loss 2.0000"

    class Loader:
        dataset = range(5)

    named = {"eval_new_loss": 1.0, "eval_new_runtime": 2.0}
    assert describe_evaluations(named, Loader, 7) == [
        "evaluation at step 7, new: loss 1.0000 (5 rows)"
    ]
    assert describe_evaluations({"loss": 1.0, "train_loss": 2.0}, Loader, 7) == []


@pytest.mark.parametrize(
    ("step", "num_steps", "seconds", "speed"),
    [(30, 300, 62, 1234.5), (99_999, 100_000, 360_000, 123_456), (1, 7, 0.5, 9.9)],
)
def test_the_bar_fits_80_columns(step, num_steps, seconds, speed):
    logs = {"loss": 12.3456, "rewards/accuracies": 0.5, "tokens_per_second": speed}
    text = tqdm.format_meter(
        step,
        num_steps,
        seconds,
        ncols=80,
        bar_format=progress._BAR_FORMAT,
        postfix=describe_briefly(logs),
    )
    assert len(text) <= 80
    assert f"{step}/{num_steps} [" in text
    assert text.endswith(f", {describe_briefly(logs)}]")
    assert describe_briefly(logs).startswith("loss=12.346, acc=0.50, tok/s=")


def on_a_terminal(monkeypatch, argv):
    """The exit code, and what the command drew on standard error, a terminal of 80 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    drawn = []

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            while text := os.read(leader, 65536):
                drawn.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    with open(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        code = main(argv)
    reader.join()
    os.close(leader)
    return code, b"".join(drawn).decode()


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch, capsys):
    path = recipe(eval_strategy="steps", eval_steps=6, save_strategy="steps", save_steps=6)
    code, drawn = on_a_terminal(monkeypatch, ["train", path])
    assert code == 0
    out = capsys.readouterr().out
    assert lines_of(out, STEP) == []
    assert [int(line[1]) for line in lines_of(out, EVALUATION)] == [6, 12]
    bars = [bar for bar in re.split(r"[\r\n]|\x1b\[A", drawn) if "/12 [" in bar]
    assert re.search(r"12/12 \[\S+<\S+, loss=\d\.\d{3}, acc=\d\.\d\d, tok/s=\S+\]$", bars[-1])
    assert max(map(len, bars)) <= 80
