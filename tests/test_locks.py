"""A folder in use is refused to a second process; what a killed one leaves is no obstacle."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenratio import locks
from tokenratio.errors import TokenRatioError
from tokenratio.locks import LOCK_FILE, Holder, held

HOLD = """
import sys, time
from tokenratio.locks import held
with held(sys.argv[1]):
    {inside}
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the folder."""
    started = []

    def start(inside="pass"):
        code = HOLD.format(inside=inside)
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def record(tmp_path, **changes):
    """A lock that another process has left."""
    (tmp_path / "run").mkdir(exist_ok=True)
    document = {"pid": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00", **changes}
    (tmp_path / "run" / LOCK_FILE).write_text(json.dumps(document))


def test_the_second_process_is_refused_while_the_first_lives(holder, tmp_path):
    process = holder()
    with (
        pytest.raises(TokenRatioError, match=f"in use by process {process.pid} on .* since 20"),
        held(tmp_path / "run"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK_FILE).is_file()
    with held(tmp_path / "run"):
        assert Holder.read(tmp_path / "run" / LOCK_FILE).pid == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_worker_that_outlives_the_killed_process_does_not_hold_the_folder(holder, tmp_path):
    # The worker lets go of the lock when it first runs, which a busy machine may put off.
    inside = (
        "import os\n    read, write = os.pipe()\n"
        "    if os.fork() == 0: os.write(write, b'.'); time.sleep(5); os._exit(0)\n"
        "    os.read(read, 1)"
    )
    process = holder(inside)
    process.kill()
    process.wait()
    with held(tmp_path / "run"):
        pass


def test_a_process_may_hold_a_folder_several_times(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with held(tmp_path / "run"):
        with held(tmp_path / "link"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).is_file()
        (tmp_path / "run" / "result").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_nothing_is_left_of_a_folder_in_which_nothing_was_written(tmp_path):
    with pytest.raises(KeyError), held(tmp_path / "run"):
        raise KeyError
    assert not (tmp_path / "run").exists()


def test_a_holder_on_another_host_is_named_with_the_way_out(tmp_path):
    record(tmp_path)
    path = tmp_path / "run" / LOCK_FILE
    with pytest.raises(TokenRatioError, match="process 1 on elsewhere since 2026") as refusal:
        held(tmp_path / "run").__enter__()
    assert f"if that process has ended, delete {path}" in str(refusal.value)
    path.unlink()
    with held(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("before", "now", "is_free"),
    [("7:0", ("7", "1"), True), ("7:0", ("7", "0"), False), ("7:0", ("8", "1"), False)],
)
def test_a_restarted_job_takes_over_from_its_earlier_host(
    before, now, is_free, tmp_path, monkeypatch
):
    for name, value in zip(("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), now, strict=True):
        monkeypatch.setenv(name, value)
    record(tmp_path, job=before)
    if is_free:
        with held(tmp_path / "run"):
            pass
        return
    with pytest.raises(TokenRatioError, match="elsewhere"), held(tmp_path / "run"):
        pass


def test_a_container_of_this_machine_has_ended_if_its_lock_is_free(tmp_path):
    if not locks._machine():
        pytest.skip("this machine does not tell when it was started")
    record(tmp_path, machine=locks._machine())
    with held(tmp_path / "run"):
        pass


def test_a_disk_without_locks_goes_by_the_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = Holder.this_process().host
    record(tmp_path, host=here, pid=os.getppid())
    with pytest.raises(TokenRatioError, match=f"process {os.getppid()}"), held(tmp_path / "run"):
        pass
    for pid in (ended.pid, os.getpid()):
        record(tmp_path, host=here, pid=pid)
        with held(tmp_path / "run"):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 3}', "\x00" * 40])
def test_a_damaged_record_is_no_obstacle(content, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text(content)
    with held(tmp_path / "run"):
        pass


def test_an_error_is_not_hidden_by_a_lock_that_cannot_be_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda path: os.rmdir(tmp_path))
    with pytest.raises(KeyError), held(tmp_path / "run"):
        raise KeyError


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TokenRatioError, match="cannot write to"), held(tmp_path / "file" / "run"):
        pass
