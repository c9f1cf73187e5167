"""Two gloo processes with half the batch each are one process with the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from training import distributed_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of every run on two processes, of one launch: imports take most of its time."""
    folder, script = tmp_path_factory.mktemp("two"), distributed_run.__file__
    # accelerate's launcher for several CPU processes is the one for several GPUs.
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *(script, str(folder), *distributed_run.RUNS),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(script).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the runs in this process that the others are compared with."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("whole", "baseline"):
        distributed_run.run(name, folder)
    return folder


def results(folder, *, processes):
    """Weights, lines of metrics and the evaluation of a run."""
    run = json.loads((folder / "run.json").read_text())
    assert run["processes"] == processes
    weights = load_file(folder / "model.safetensors")
    if run["config"]["loss"] == "tbpo_q":
        weights |= load_file(folder / "state_baseline.safetensors")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, lines, json.loads((folder / "eval.json").read_text())


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", ["whole", "baseline"])
def test_two_processes_are_one(name, one, two):
    weights, metrics, evaluated = results(one / name, processes=1)
    both_weights, both_metrics, both_evaluated = results(two / name, processes=2)
    assert len(metrics) == len(both_metrics) >= 10
    assert largest_difference(weights, both_weights) < 1e-6
    for alone, both in [*zip(metrics, both_metrics, strict=True), (evaluated, both_evaluated)]:
        for key in alone:
            if not any(part in key for part in ("per_second", "runtime", "preparation")):
                assert alone[key] == pytest.approx(both[key], rel=1e-3, abs=1e-5), key


def test_two_processes_without_a_gpu_compute_in_bfloat16(two):
    run = json.loads((two / "bf16" / "run.json").read_text())
    assert run["processes"] == 2
    assert (run["config"]["bf16"], run["config"]["use_cpu"]) == (True, True)
    weights, lines, _ = results(two / "bf16", processes=2)
    exact, exact_lines, _ = results(two / "whole", processes=2)
    assert 0 < largest_difference(exact, weights) < 0.1
    assert lines[1]["loss"] == pytest.approx(exact_lines[1]["loss"], rel=0.02)


def test_two_processes_resume_within_an_epoch(two):
    """The order of the rows continues too; accelerate alone would restart it as epoch 0's."""
    whole, _, _ = results(two / "whole", processes=2)
    resumed, _, _ = results(two / "resume", processes=2)
    assert largest_difference(whole, resumed) == 0
    astray, _, _ = results(two / "epoch", processes=2)
    assert largest_difference(whole, astray) > 1e-5


def test_the_comparison_notices_missing_synchronisation(one, two):
    weights, _, _ = results(one / "whole", processes=1)
    broken, _, _ = results(two / "sync", processes=2)
    assert largest_difference(weights, broken) > 1e-5
