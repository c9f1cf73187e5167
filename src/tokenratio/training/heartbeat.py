"""Notices a process that no longer answers, and says which one it is.

A collective operation waits for all processes. A launcher ends the others when one dies, but not
when one is stopped or its machine is cut off. So each process writes a beat into the store that the
processes met in: the first one watches all others, and they watch the first.
"""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from tokenratio.errors import TokenRatioError, first_line

_LEFT = "left"
_PACKAGE = str(Path(__file__).parents[1])
# What a collective operation says when another process is gone or late.
_SIGNS = ("gloo", "NCCL", "Timed out waiting", "Connection closed by peer", "Connection reset")
_beats: "_Heartbeat | None" = None


def watch_processes(timeout: float) -> None:
    """Watch the other processes from now on, in a thread; end this one if another is silent.

    Args:
        timeout: how long a process may be silent, in seconds (`ddp_timeout`).
    """
    global _beats
    if _beats is None:
        _beats = _Heartbeat(timeout)
    _beats.timeout = timeout


@contextmanager
def naming_lost() -> Iterator[None]:
    """Turn the error of a collective operation into one that says where each process stands."""
    try:
        yield
    except RuntimeError as error:
        explained = explain_lost(error)
        if explained is None:
            raise
        raise explained from error


def explain_lost(error: Exception) -> TokenRatioError | None:
    """The error of a collective operation that failed, with where each process stood.

    None for an error of another kind.
    """
    if _beats is None or not any(sign in str(error) for sign in _SIGNS):
        return None
    return TokenRatioError(
        f"the processes have lost each other ({first_line(error)}); {_beats.places()}"
    )


class _Heartbeat:
    """Writes this process's beat and reads those of others."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # A connection of its own: one that waits for a key lets no one else in.
        shared: Any = _get_default_store()
        self._store = shared.clone()
        self._store.set_timeout(timedelta(seconds=timeout))
        self._me = f"{socket.gethostname()}, process {os.getpid()}"
        self._count, self._end = 0, threading.Event()
        self._beat()
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()
        atexit.register(self._leave)

    def places(self) -> str:
        """Where each process stood at its last beat."""
        self._beat()
        return "; ".join(f"rank {rank} ({self._read(rank)[1]})" for rank in range(self.size))

    def _beat(self) -> None:
        self._count += 1
        self._store.set(_key(self.rank), f"{self._count}|{self._me} in {_place()}")

    def _read(self, rank: int) -> tuple[str, str]:
        """A process's last beat and what it wrote of itself."""
        key = _key(rank)
        text = self._store.get(key).decode() if self._store.check([key]) else "|never heard from"
        count, _, what = text.partition("|")
        return count, what

    def _watch(self) -> None:
        watched = range(1, self.size) if self.rank == 0 else range(1)
        seen = dict.fromkeys(watched, ("", time.monotonic()))
        before = time.monotonic()
        while not self._end.wait(min(5.0, self.timeout / 10)):
            try:
                self._beat()
                beats = {rank: self._read(rank) for rank in watched}
            except dist.DistError:
                return  # whoever held the store has ended, and the launcher ends the others
            now = time.monotonic()
            was_stopped = now - before > self.timeout / 2  # this process itself
            before = now
            for rank, (count, what) in beats.items():
                if count != seen[rank][0] or count == _LEFT or was_stopped:
                    seen[rank] = (count, now)
                elif now - seen[rank][1] > self.timeout:
                    self._stop(f"rank {rank} ({what})")

    def _stop(self, what: str) -> None:
        print(
            f"error: {what} has not answered for {self.timeout:g} s (ddp_timeout): it is stopped, "
            f"hung or cut off. Rank {self.rank} ends; resume the run from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _leave(self) -> None:
        self._end.set()
        with suppress(dist.DistError):  # the process that held the store has ended
            self._store.set(_key(self.rank), f"{_LEFT}|has ended")


def _key(rank: int) -> str:
    return f"tokenratio/{rank}"


def _place() -> str:
    """Where the main thread stands: the innermost line of this package, else of any."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and name != __file__:
            break
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "no place"
    code = frame.f_code
    return f"{code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})"
