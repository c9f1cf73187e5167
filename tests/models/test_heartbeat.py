"""A process that stands still or is late: the others end in time and say which one it is."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenratio.models.heartbeat import explain_lost

pytestmark = pytest.mark.slow

TIMEOUT = 4.0
PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from tokenratio.errors import TokenRatioError
from tokenratio.models.heartbeat import advance, explain_lost, meet, watch_processes

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def sleep():
    time.sleep(600)

def work():
    for _ in range(8):
        time.sleep(timeout / 4)
        advance()
    time.sleep(600)

def end():
    sys.exit(0)

timeout = float(sys.argv[2])
patience = timeout if sys.argv[1] == "sleep" else 600
dist.init_process_group("gloo", timeout=timedelta(seconds=patience))
watch_processes(timeout, "Run it again")
dist.barrier()
if dist.get_rank() == 1:
    globals()[sys.argv[1]]()
try:
    if sys.argv[1] == "work":
        meet(range(2))
    dist.all_reduce(torch.ones(1))
except TokenRatioError as error:
    print(f"error: {error}", file=sys.stderr)
    os._exit(2)
except RuntimeError as error:
    print(f"error: {explain_lost(error)}", file=sys.stderr)
    os._exit(2)
"""


@pytest.fixture
def start(tmp_path):
    """Starts two processes, of which the second does something else; returns them."""
    begun = []

    def start_two(what):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            begun.append(
                subprocess.Popen(
                    [sys.executable, str(path), what, str(TIMEOUT)],
                    env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return begun

    yield start_two
    for process in begun:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def is_stopped(process):
    return " T " in Path(f"/proc/{process.pid}/stat").read_text()


def test_a_stopped_process_is_named(start):
    first, second = start("stop")
    while not is_stopped(second):
        assert first.poll() is second.poll() is None
        time.sleep(0.05)
    since = time.monotonic()
    _, printed = first.communicate(timeout=60)
    assert time.monotonic() - since < 3 * TIMEOUT
    assert first.returncode == 1
    assert f", process {second.pid} in " in printed
    assert f"has not answered for {TIMEOUT:g} s" in printed


def test_a_late_process_is_named_with_where_it_stands(start):
    first, second = start("sleep")
    _, printed = first.communicate(timeout=60)
    assert first.returncode == 2
    assert "the processes have lost each other" in printed
    assert f"process {second.pid} in sleep (program.py:" in printed


def test_a_process_that_gets_nowhere_is_named_by_those_that_wait(start):
    """It is waited for as long as it finishes batches, here for twice the timeout."""
    first, second = start("work")
    begin = time.monotonic()
    _, printed = first.communicate(timeout=60)
    assert time.monotonic() - begin > 2.9 * TIMEOUT
    assert first.returncode == 2
    assert f"rank 1 ({socket.gethostname()}, process {second.pid} in work (program.py:" in printed
    assert f"has finished no batch for {TIMEOUT:g} s" in printed


def test_a_process_that_has_ended_is_not_missed(start):
    first, second = start("end")
    _, printed = first.communicate(timeout=60)
    assert second.wait() == 0
    assert "has not answered" not in printed
    assert "has ended" in printed


def test_other_errors_are_left_alone():
    assert explain_lost(RuntimeError("Timed out waiting")) is None
