"""A process that stands still or is late: the others end in time and say which one it is."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenratio.errors import LostError, TokenRatioError
from tokenratio.models import heartbeat
from tokenratio.models.heartbeat import explain_lost, said_once

TIMEOUT = 4.0
PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from tokenratio.errors import LostError
from tokenratio.models import heartbeat
from tokenratio.models.heartbeat import advance, explain_lost, leave, meet, watch_processes

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

def fail():
    leave()
    os._exit(2)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

timeout = float(sys.argv[2])
if sys.argv[1] == "kill":
    heartbeat.SILENCE, timeout = timeout, 600
patience = timeout if sys.argv[1] == "sleep" else 600
dist.init_process_group("gloo", timeout=timedelta(seconds=patience))
watch_processes(timeout, "Run it again")
dist.barrier()
if dist.get_rank() == 1:
    globals()[sys.argv[1]]()
try:
    if sys.argv[1] in ("work", "fail", "kill"):
        meet(range(2))
    dist.all_reduce(torch.ones(1))
except LostError as error:
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_late_process_is_named_with_where_it_stands(start):
    first, second = start("sleep")
    _, printed = first.communicate(timeout=60)
    assert first.returncode == 2
    assert "the processes have lost each other" in printed
    assert f"process {second.pid} in sleep (program.py:" in printed


@pytest.mark.slow
def test_a_process_that_gets_nowhere_is_named_by_those_that_wait(start):
    """It is waited for as long as it finishes batches, here for twice the timeout."""
    first, second = start("work")
    begin = time.monotonic()
    _, printed = first.communicate(timeout=60)
    assert time.monotonic() - begin > 2.9 * TIMEOUT
    assert first.returncode == 2
    assert f"rank 1 ({socket.gethostname()}, process {second.pid} in work (program.py:" in printed
    assert f"has finished no batch for {TIMEOUT:g} s" in printed


@pytest.mark.slow
def test_a_process_that_has_failed_is_not_waited_for(start):
    first, _ = start("fail")
    _, printed = first.communicate(timeout=60)
    assert first.returncode == 2
    assert "rank 1 has ended while others waited for it. Run it again" in printed


@pytest.mark.slow
def test_a_killed_process_is_noticed_long_before_a_late_one(start):
    """No launcher ends the others here: it was on another machine."""
    first, second = start("kill")
    _, printed = first.communicate(timeout=60)
    assert first.returncode == 1
    assert f", process {second.pid} in " in printed
    assert f"has not answered for {TIMEOUT:g} s" in printed


@pytest.mark.slow
def test_a_process_that_has_ended_is_not_missed(start):
    first, second = start("end")
    _, printed = first.communicate(timeout=60)
    assert second.wait() == 0
    assert "has not answered" not in printed
    assert "has ended" in printed


class Beats(heartbeat._Heartbeat):
    """The second of two processes, with a store of its own."""

    def __init__(self):
        self.rank, self.size, self.remedy = 1, 2, "Run it again"
        self._store = self
        self.values = {}

    def check(self, keys):
        return all(key in self.values for key in keys)

    def set(self, key, value):
        self.values[key] = value

    def add(self, key, amount):
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def places(self):
        return "rank 0 (in meet)"


def test_messages_name_their_process_once_and_the_cause_alone(monkeypatch):
    monkeypatch.setattr(heartbeat, "_beats", Beats())
    assert said_once("rank 0 has ended", is_consequence=True) == "rank 0 has ended"
    assert said_once("no such file") == "rank 1: no such file"
    assert said_once("no such file") is None
    assert said_once("rank 1 would write") == "rank 1 would write"
    assert said_once("rank 0 hangs", is_consequence=True) is None


def test_what_gloo_believes_is_left_out(monkeypatch):
    monkeypatch.setattr(heartbeat, "_beats", Beats())
    said = "[gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:2. This means. GLHF!"
    assert str(explain_lost(RuntimeError(said))) == (
        "the processes have lost each other ([gloo/transport/tcp/pair.cc:5] Connection closed by "
        "peer [::1]:2); rank 0 (in meet). Run it again"
    )


def test_a_lost_process_is_no_refusal():
    """What is left out of an evaluation when it is refused is not left out then."""
    assert not issubclass(LostError, TokenRatioError)


def test_other_errors_are_left_alone():
    assert explain_lost(RuntimeError("Timed out waiting")) is None
