"""Work that several processes share: who does what, and who decides.

`accelerate launch` and `torchrun` start a command several times. Inside `joined`, batches are those
of one process, dealt out in turn, so that results are the same to the bit on the same hardware. The
first process alone decides, judges, writes results and prints.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from tokenratio.errors import TokenRatioError
from tokenratio.locks import held

# How long a process may finish no batch while another waits for it, in seconds.
TIMEOUT = 1800.0
_REMEDY = "What is done is kept: run the same command again to go on"

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes that share some work, seen from one of them.

    Attributes:
        index: the number of this process, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """What this process does; may be empty."""
        return batches[self.index :: self.count]

    def gather(self, value: T) -> list[T]:
        """The value that each process gives, by index; every process must call it.

        Raises:
            LostError: a process has ended or finished no batch for too long; names it.
        """
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        from tokenratio.models.heartbeat import meet

        meet(range(self.count))
        gathered: list[T] = gather_object([value])
        return gathered

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first process, on all of them; every process must call it.

        The others wait as long as it takes. A refusal is raised on all, as is an error of the file
        system. `current` is a single process for what `work` calls.
        """
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        from tokenratio.models.heartbeat import meet

        outcome: list[T | TokenRatioError | OSError | None] = [None]
        if self.index == 0:
            try:
                with _working_as(Group()):
                    outcome = [work()]
            except (TokenRatioError, OSError) as error:
                outcome = [error]
        meet([0], patiently=True)
        found: Any = broadcast_object_list(outcome)[0]
        if isinstance(found, (TokenRatioError, OSError)):
            raise found
        return cast(T, found)

    @contextmanager
    def held(self, folder: str | Path, **how: str) -> Iterator[None]:
        """Keep other commands out of a folder; every process must call it (`locks.held`)."""
        with ExitStack() as stack:
            self.on_first(lambda: stack.enter_context(held(folder, **how)))
            yield


_current = Group()


def current() -> Group:
    """The group that shares the work of this moment; one process outside `joined`."""
    return _current


@contextmanager
def _working_as(group: Group) -> Iterator[None]:
    global _current
    before, _current = _current, group
    try:
        yield
    finally:
        _current = before


@contextmanager
def joined() -> Iterator[None]:
    """Share the work inside with the other processes that a launcher has started.

    They exchange what is on the CPU, so the backend is gloo. Only the first writes to standard
    output.

    Raises:
        LostError: another process was lost, or has finished no batch for `TIMEOUT`.
    """
    import torch.distributed as dist
    from accelerate import PartialState

    from tokenratio.models.device import default_device
    from tokenratio.models.heartbeat import meet, naming_lost, watch_processes

    for name in ("FSDP", "DEEPSPEED"):  # of accelerate's configuration; they wrap what is trained
        os.environ.pop(f"ACCELERATE_USE_{name}", None)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    state = PartialState(cpu=default_device().type == "cpu")
    watch_processes(TIMEOUT, _REMEDY)
    group = Group(state.process_index, state.num_processes)
    with ExitStack() as stack:
        if group.index:
            nowhere = stack.enter_context(
                open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
            )
            stack.enter_context(redirect_stdout(nowhere))
        with _working_as(group), naming_lost():
            yield
            sys.stdout.flush()
            meet(range(group.count))  # one that ends first may be aborted by gloo's threads
    dist.destroy_process_group()
