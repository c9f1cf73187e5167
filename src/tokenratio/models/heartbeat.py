"""Notices a process that no longer answers or gets nowhere, and says which one it is.

A collective operation waits for all processes. A launcher ends the others when one dies, but not
when one is stopped or its machine is cut off. So each process writes a beat into the store that the
processes met in: the first one watches all others, and they watch the first. A beat also says how
much work its process has done, for those that wait for it.
"""

import atexit
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from tokenratio.errors import LostError, first_line

# The longest that a process may be silent, in seconds: its thread writes every five.
SILENCE = 120.0
_LEFT = "left"
_PACKAGE = str(Path(__file__).parents[1])
# What a collective operation says when another process is gone or late.
_SIGNS = ("gloo", "NCCL", "Timed out waiting", "Connection closed by peer", "Connection reset")
_beats: "_Heartbeat | None" = None


def watch_processes(timeout: float, remedy: str) -> None:
    """Watch the other processes from now on, in a thread; end this one if another is silent.

    Args:
        timeout: how long a process may finish no batch while another waits for it, in seconds; it
            may be silent as long, and no longer than `SILENCE`.
        remedy: what to do then, for the message.
    """
    global _beats
    if _beats is None:
        _beats = _Heartbeat(timeout)
    _beats.timeout, _beats.remedy = timeout, remedy


def advance() -> None:
    """Note that this process has finished a batch."""
    if _beats is not None:
        _beats.work += 1


def meet(ranks: Iterable[int], *, patiently: bool = False) -> None:
    """Wait until these processes have come here too; every process must call it.

    Args:
        patiently: wait without a limit for a process that answers; else no longer than the
            timeout for one that finishes no batch.
    Raises:
        LostError: a process has ended, or has finished no batch for too long, and which; or the one
            that holds the store has ended.
    """
    if _beats is None:
        return
    try:
        _beats.meet(list(ranks), patiently=patiently)
    except dist.DistError as error:
        raise LostError(
            f"the launcher or the first process has ended ({first_line(error)}). {_beats.remedy}"
        ) from None


def leave() -> None:
    """Say that this process ends, for those that wait for it."""
    if _beats is not None:
        _beats.leave()


def said_once(text: str, *, is_consequence: bool = False) -> str | None:
    """The text with the rank of this process; None if another process has said it already.

    Args:
        is_consequence: None too if another process has said anything, which is then the cause.
    """
    if _beats is None:
        return text
    with suppress(dist.DistError):  # whoever held the store has ended
        if not _beats.is_first_to_say(text, is_consequence=is_consequence):
            return None
    return f"rank {_beats.rank}: {text}" if _beats.rank and not text.startswith("rank ") else text


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


def explain_lost(error: Exception) -> LostError | None:
    """The error of a collective operation that failed, with where each process stood.

    None for an error of another kind.
    """
    if _beats is None or not any(sign in str(error) for sign in _SIGNS):
        return None
    said = first_line(error).partition(". ")[0]  # gloo goes on about what it may mean
    return LostError(
        f"the processes have lost each other ({said}); {_beats.places()}. {_beats.remedy}"
    )


class _Beat(NamedTuple):
    """What a process wrote last: a number that changes, its batches so far, where it stood."""

    number: str
    work: str
    place: str


class _Heartbeat:
    """Writes this process's beat and reads those of others."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.remedy, self.work = timeout, "", 0
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # A connection of its own: one that waits for a key lets no one else in.
        shared: Any = _get_default_store()
        self._store = shared.clone()
        self._store.set_timeout(timedelta(seconds=timeout))
        self._me = f"{socket.gethostname()}, process {os.getpid()}"
        self._count, self._meetings, self._end = 0, 0, threading.Event()
        self._writing = threading.Lock()
        self._beat()
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()
        atexit.register(self.leave)

    @property
    def _silence(self) -> float:
        return min(self.timeout, SILENCE)

    def places(self) -> str:
        """Where each process stood at its last beat."""
        self._beat()
        return "; ".join(f"rank {rank} ({self._read(rank).place})" for rank in range(self.size))

    def meet(self, ranks: list[int], *, patiently: bool) -> None:
        """See the function."""
        self._meetings += 1
        keys = {rank: f"{_key(rank)}/meeting {self._meetings}" for rank in ranks}
        pause, seen = 0.001, {rank: ("", time.monotonic()) for rank in ranks}
        self._store.set(f"{_key(self.rank)}/meeting {self._meetings}", "")
        while late := [rank for rank in ranks if not self._store.check([keys[rank]])]:
            for rank in late:
                number, work, place = self._read(rank)
                if number == _LEFT and not self._store.check([keys[rank]]):
                    raise LostError(
                        f"rank {rank} has ended while others waited for it. {self.remedy}"
                    )
                if work != seen[rank][0]:
                    seen[rank] = work, time.monotonic()
                elif not patiently and time.monotonic() - seen[rank][1] > self.timeout:
                    raise LostError(
                        f"rank {rank} ({place}) has finished no batch for {self.timeout:g} s: it "
                        f"hangs, or its batches take too long (batch_size). {self.remedy}"
                    )
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def is_first_to_say(self, text: str, *, is_consequence: bool) -> bool:
        """Whether no process has said this before, or anything if it is a consequence."""
        if is_consequence and self._store.check(["tokenratio/said"]):
            return False
        self._store.set("tokenratio/said", "")
        digest = hashlib.sha256(text.encode()).hexdigest()
        return int(self._store.add(f"tokenratio/said/{digest}", 1)) == 1

    def _beat(self) -> None:
        self._count += 1
        beat = _Beat(str(self._count), str(self.work), f"{self._me} in {_place()}")
        with self._writing:
            if not self._end.is_set():
                self._store.set(_key(self.rank), "|".join(beat))

    def _read(self, rank: int) -> _Beat:
        """A process's last beat."""
        key = _key(rank)
        text = self._store.get(key).decode() if self._store.check([key]) else "||never heard from"
        return _Beat(*text.split("|", 2))

    def _watch(self) -> None:
        watched = range(1, self.size) if self.rank == 0 else range(1)
        seen = dict.fromkeys(watched, ("", time.monotonic()))
        before = time.monotonic()
        while not self._end.wait(min(5.0, self._silence / 10)):
            try:
                self._beat()
                beats = {rank: self._read(rank) for rank in watched}
            except dist.DistError:
                return  # whoever held the store has ended, and the launcher ends the others
            now = time.monotonic()
            was_stopped = now - before > self._silence / 2  # this process itself
            before = now
            for rank, (number, _, place) in beats.items():
                if number != seen[rank][0] or number == _LEFT or was_stopped:
                    seen[rank] = (number, now)
                elif now - seen[rank][1] > self._silence:
                    self._stop(f"rank {rank} ({place})")

    def _stop(self, what: str) -> None:
        print(
            f"error: {what} has not answered for {self._silence:g} s: it is stopped, hung or cut "
            f"off. Rank {self.rank} ends. {self.remedy}",
            file=sys.stderr,
            flush=True,
        )
        with suppress(dist.DistError):
            self._store.set("tokenratio/said", "")
        self.leave()
        os._exit(1)

    def leave(self) -> None:
        """See the function."""
        with self._writing, suppress(dist.DistError):  # who held the store may have ended
            self._end.set()
            self._store.set(_key(self.rank), f"{_LEFT}||has ended")


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
