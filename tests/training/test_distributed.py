"""Two gloo processes with half the batch each are one process with the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_run.py")
pytestmark = pytest.mark.slow


def launch(folder, loss, *, processes, fault=""):
    # accelerate's launcher for several CPU processes is the one for several GPUs.
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [
        sys.executable,
        *("-m", "accelerate.commands.launch", "--num_machines", "1", *several),
        *("--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(str(SCRIPT), str(folder), loss, str(4 // processes), fault),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = json.loads((folder / "run.json").read_text())
    assert run["processes"] == processes
    weights = load_file(folder / "model.safetensors")
    if loss == "tbpo_q":
        weights |= load_file(folder / "state_baseline.safetensors")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, lines, json.loads((folder / "eval.json").read_text())


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q"])
def test_two_processes_are_one(loss, tmp_path):
    weights, metrics, evaluated = launch(tmp_path / "one", loss, processes=1)
    both_weights, both_metrics, both_evaluated = launch(tmp_path / "two", loss, processes=2)
    assert len(metrics) == len(both_metrics) >= 10
    assert largest_difference(weights, both_weights) < 1e-6
    for one, two in [*zip(metrics, both_metrics, strict=True), (evaluated, both_evaluated)]:
        for name in one:
            if not any(part in name for part in ("per_second", "runtime", "preparation")):
                assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name


def test_two_processes_resume_within_an_epoch(tmp_path):
    """The order of the rows goes on too, which accelerate alone would begin anew as epoch 0's."""
    whole, _, _ = launch(tmp_path, "tbpo_a", processes=2, fault="save")
    resumed, _, _ = launch(tmp_path, "tbpo_a", processes=2, fault="resume")
    assert largest_difference(whole, resumed) == 0
    astray, _, _ = launch(tmp_path, "tbpo_a", processes=2, fault="epoch")
    assert largest_difference(whole, astray) > 1e-5


def test_the_comparison_notices_missing_synchronisation(tmp_path):
    weights, _, _ = launch(tmp_path / "one", "tbpo_a", processes=1)
    broken, _, _ = launch(tmp_path / "two", "tbpo_a", processes=2, fault="sync")
    assert largest_difference(weights, broken) > 1e-5
