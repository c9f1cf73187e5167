"""Mapping a function over batches in several processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tokenratio.errors import TokenRatioError

_function: Callable[[Any], Any] | None = None


def map_in_processes(
    function: Callable[[Any], Any], batches: Sequence[Any], num_proc: int
) -> Iterator[Any]:
    """The results of `function` for each batch, in their order.

    Where the system can, processes are forked: they have the function without its being pickled,
    and a program without `if __name__ == "__main__"` is not run again.

    Args:
        function: sent to each process once; batches and results are pickled.
        num_proc: 1 to stay in this process; never more than there are batches.
    Raises:
        TokenRatioError: a process was killed.
    """
    num_proc = min(num_proc, len(batches))
    if num_proc <= 1:
        yield from map(function, batches)
        return
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    with _one_thread_each():
        pool = ProcessPoolExecutor(num_proc, context, _set_function, (function,))
        try:
            yield from pool.map(_call, batches)
        except BrokenProcessPool as error:
            raise TokenRatioError(
                f"one of {num_proc} data-preparation processes was killed, possibly out of "
                "memory: lower dataset_num_proc"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _set_function(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _call(batch: Any) -> Any:
    assert _function is not None
    return _function(batch)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep tokenizers from starting threads of their own in every process, and from warning."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
