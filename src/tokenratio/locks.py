"""Locks on what a process writes: a second process is refused, and told who holds it.

The kernel releases a lock with the process that holds it, so what a killed process leaves behind
is no obstacle. Where a lock may not reach, as between hosts that share a disk, the record in
`_run.lock` decides.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokenratio.errors import TokenRatioError
from tokenratio.records import as_shape
from tokenratio.run_folder import read_document

try:
    import fcntl
except ImportError:  # Windows: two runs that write the same file are then not detected
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "_run.lock"  # what begins with _ is not pushed to the hub
# The open locks of the folders that this process holds.
_held: dict[Path, int] = {}


def open_alone(path: Path) -> int | None:
    """A descriptor of a file, created if it is missing, that no other process has opened so.

    Returns:
        None if another process has. Closing the descriptor releases the file.
    Raises:
        TokenRatioError: the file cannot be written.
    """
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise TokenRatioError(f"cannot write {path}: {error.strerror}") from None
        if _lock(file) is False:
            os.close(file)
            return None
        # Before it was locked, another process may have replaced or removed the file.
        if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
            return file
        os.close(file)


def _lock(file: int) -> bool | None:
    """Whether the file could be locked: not if another process holds it; None without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


@contextmanager
def held(folder: str | Path, *, instead: str = "choose another --output_dir") -> Iterator[None]:
    """Keep every other process out of a folder; a process may hold the same one several times.

    The folder is created if it is missing. `_run.lock` in it names the process, its host and when
    it began, and is removed at the end.

    Args:
        instead: what a user may do who does not want to wait, for the message.
    Raises:
        TokenRatioError: another process holds the folder, or one on another host may.
    """
    path = Path(os.path.realpath(folder)) / LOCK_FILE
    if path in _held:
        yield
        return
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenRatioError(f"cannot write to {folder}: {error.strerror}") from None
    file = open_alone(path)
    holder = Holder.read(path)
    if file is None:
        raise TokenRatioError(
            f"{folder} is in use by {holder or 'another process'}: wait until it has ended, or "
            f"{instead}"
        )
    if holder is not None and not holder.has_ended(locks_work=bool(_lock(file))):
        os.close(file)
        raise TokenRatioError(
            f"{folder} is in use by {holder}: {instead}; or if that process has ended, delete "
            f"{path}"
        )
    _held[path] = file
    try:
        with suppress(OSError):  # a full disk: the lock holds without its record
            os.ftruncate(file, 0)
            os.write(file, json.dumps(asdict(Holder.this_process())).encode() + b"\n")
        yield
    finally:
        if _held.pop(path, None) is not None:
            # Before it is released: a process that has opened it will open the next one.
            with suppress(OSError):
                path.unlink()
            os.close(file)
            if is_new:
                with suppress(OSError):
                    path.parent.rmdir()  # only if nothing was written


def _forget() -> None:
    """Close in a forked child what its parent holds; the child would keep it locked."""
    for file in _held.values():
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        since: UTC, ISO 8601.
        machine: differs between machines and after a restart; containers of one share it.
        job: of Slurm, `ID:RESTARTS`.
    """

    pid: int
    host: str
    since: str
    machine: str = ""
    job: str = ""

    @classmethod
    def this_process(cls) -> "Holder":
        """This process, from now on."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), now, _machine(), _job())

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """What `held` has written; None if that is missing, cut off or something else."""
        try:
            return as_shape(cls, read_document(path) or {}, str(path))
        except TokenRatioError:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def has_ended(self, *, locks_work: bool) -> bool:
        """Whether a holder whose lock this process could take has ended, as far as can be known.

        It has if it was on this machine, or in this Slurm job before the job was restarted.
        """
        if self.host == socket.gethostname() or self.machine == _machine() != "":
            return locks_work or not _is_alive(self.pid)
        before, _, restarts_before = self.job.partition(":")
        job, _, restarts = _job().partition(":")
        return job == before != "" and restarts != restarts_before


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}:{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def _is_alive(pid: int) -> bool:
    if fcntl is None or pid == os.getpid():  # os.kill ends a process on Windows
        return False
    if not 0 < pid < 2**31:  # of no process, but of groups of them to os.kill
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True
