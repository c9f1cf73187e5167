"""Two gloo processes with half the batch each are one process with the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenratio.errors import TokenRatioError
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
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-8000:]
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


@pytest.mark.parametrize(("name", "sharded"), [("whole", "fsdp2"), ("baseline", "fsdp2_baseline")])
def test_two_processes_that_share_the_weights_are_one(name, sharded, one, two):
    """FSDP2, which accelerate uses on GPUs only, with whole and with sharded checkpoints."""
    weights, metrics, evaluated = results(one / name, processes=1)
    both_weights, both_metrics, both_evaluated = results(two / sharded, processes=2)
    assert json.loads((two / sharded / "run.json").read_text())["wrapper"] == "fsdp2"
    assert largest_difference(weights, both_weights) < 1e-6
    for alone, both in [*zip(metrics, both_metrics, strict=True), (evaluated, both_evaluated)]:
        for key in alone:
            if not any(part in key for part in ("per_second", "runtime", "preparation")):
                assert alone[key] == pytest.approx(both[key], rel=1e-3, abs=1e-5), key
    checkpoint = two / sharded / "checkpoint-10"
    whole = [load_file(path / "model.safetensors") for path in (checkpoint, two / sharded)]
    assert largest_difference(*whole) == 0
    is_sharded = name == "baseline"
    assert (checkpoint / "optimizer_0").is_dir() == is_sharded
    assert (checkpoint / "optimizer.bin").is_file() != is_sharded


def test_sharded_runs_resume(two):
    whole, _, _ = results(two / "fsdp2_adam", processes=2)
    resumed, _, _ = results(two / "fsdp2_resume", processes=2)
    assert largest_difference(whole, resumed) == 0


def test_sharded_runs_compute_in_bfloat16_and_keep_float32(two):
    weights, lines, _ = results(two / "fsdp2_bf16", processes=2)
    exact, exact_lines, _ = results(two / "whole", processes=2)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert 0 < largest_difference(exact, weights) < 0.1
    assert lines[1]["loss"] == pytest.approx(exact_lines[1]["loss"], rel=0.02)


def test_a_sharded_gradient_that_is_not_finite_stops_every_process(two):
    for rank in range(2):
        error = (two / "fsdp2_broken" / f"error_{rank}.txt").read_text()
        assert error.startswith("the gradient is not finite at step 1")


def test_a_run_goes_on_with_another_number_of_processes(one, two):
    """Exactly, where the pairs of a step stay the same."""
    distributed_run.run("resume", one, goes_on=str(two / "whole"))
    whole, lines, _ = results(one / "whole", processes=1)
    resumed, others, _ = results(one / "resume", processes=2)  # as it began
    run = json.loads((one / "resume" / "run.json").read_text())
    assert run["resumptions"][-1]["processes"] == 1
    assert largest_difference(whole, resumed) < 1e-6
    losses = [[line["loss"] for line in each if "loss" in line] for each in (lines, others)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(TokenRatioError, match="began with processes 2, not 1"):
        distributed_run.run(
            "other", one, goes_on=str(two / "whole"), per_device_train_batch_size=2, loss="tbpo_a"
        )
    with pytest.raises(TokenRatioError, match="began with wrapper fsdp2, not none"):
        distributed_run.run("other", one, goes_on=str(two / "fsdp2"), loss="tbpo_a")


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
