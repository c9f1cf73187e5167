"""Limits on what a chat template may take: time, memory, the length of what it writes.

A template comes with a model, so anyone may have written it. transformers runs it in Jinja's
sandbox, which keeps it from everything but its arguments; it does not keep it from running for
ever.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from tokenratio.errors import TokenRatioError

try:
    import resource
except ImportError:  # Windows: the memory of a template is then not limited
    resource = None  # type: ignore[assignment]

# Far above what any conversation needs. The time is counted in intervals of a thread that is awake,
# so that a process which was suspended does not exceed it.
MAX_SECONDS = 20.0
MAX_BYTES = 2**31
MAX_CHARACTERS = 2**26
_INTERVAL = 0.1
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of getrusage's ru_maxrss


def render_within_limits(name: str, template: str, render: Callable[[], str]) -> str:
    """What `render` returns; costs a few microseconds.

    Args:
        name: of the template's tokenizer, for the message.
        template: its text.
        render: renders one conversation; called in this thread, whichever it is.
    Raises:
        TokenRatioError: it exceeds a limit.
    """
    if _has_power(template):
        raise _refusal(
            name, "uses the power operator (**), which may never finish and cannot be interrupted"
        )
    running = _Running(threading.get_ident())
    _watch.begin(running)
    try:
        try:
            text = render()
        finally:
            _watch.end(running)
        if running.reason:  # at the very end, so that the exception has not arrived
            raise _OverLimitError
    except _OverLimitError:
        _raise_in(running.thread, None)
        _watch.end(running)
        raise _refusal(name, running.reason) from None
    except MemoryError:
        raise _refusal(name, "takes more memory than there is") from None
    if len(text) > MAX_CHARACTERS:
        raise _refusal(name, f"writes {len(text):,} characters for one conversation")
    return text


def _refusal(name: str, why: str) -> TokenRatioError:
    return TokenRatioError(
        f"the chat template of {name or 'the tokenizer'} {why}: set chat_template to another one"
    )


@lru_cache(maxsize=16)
def _has_power(template: str) -> bool:
    """Whether an expression has `**`; before arguments, as in `f(**options)`, it is no power."""
    from jinja2 import Environment, TemplateSyntaxError

    before = ""
    try:
        for _, kind, value in Environment().lex(template):
            if value == "**" and kind == "operator" and before not in ("(", ","):
                return True
            before = before if kind == "whitespace" else value
    except TemplateSyntaxError:  # rendering reports it
        pass
    return False


class _OverLimitError(BaseException):
    """Raised in the thread that renders; no `except Exception` on the way stops it."""


class _Running:
    """A conversation being rendered.

    Attributes:
        thread: the thread that renders it.
        ticks: intervals since it began.
        peak: the process's peak of memory at the first interval.
        reason: why it was stopped.
    """

    def __init__(self, thread: int) -> None:
        self.thread, self.ticks, self.peak, self.reason = thread, 0, 0, ""
        self.is_over = False
        self.lock = threading.Lock()

    def tick(self) -> None:
        """Stop it if it has exceeded a limit."""
        self.ticks += 1
        peak = _peak_of_memory()
        if self.ticks == 1:
            self.peak = peak
        reason = ""
        if self.ticks * _INTERVAL > MAX_SECONDS:
            reason = f"takes more than {MAX_SECONDS:g} s for one conversation"
        elif peak - self.peak > MAX_BYTES:
            reason = f"takes more than {MAX_BYTES / 2**30:g} GiB of memory for one conversation"
        if reason:
            with self.lock:
                if not self.is_over:
                    self.is_over, self.reason = True, reason
                    _raise_in(self.thread, _OverLimitError)


class _Watch:
    """A thread that looks at what is being rendered, and sleeps while nothing is."""

    def __init__(self) -> None:
        self._running: dict[int, _Running] = {}
        self._awake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="template-limits", daemon=True)

    def begin(self, running: _Running) -> None:
        self._running[running.thread] = running
        if not self._awake.is_set():
            self._awake.set()
        if not self._thread.is_alive():
            self._start()

    def end(self, running: _Running) -> None:
        """No exception is sent afterwards."""
        with running.lock:
            running.is_over = True
        self._running.pop(running.thread, None)

    def _start(self) -> None:
        # Another thread may have started it, or the interpreter may be ending.
        with suppress(RuntimeError):
            self._thread.start()

    def _run(self) -> None:
        while True:
            if not self._running:
                self._awake.clear()
                if not self._running:  # none has begun in between
                    self._awake.wait()
            time.sleep(_INTERVAL)
            for running in list(self._running.values()):
                running.tick()


def _start_afresh() -> None:
    """In a forked process, which has none of its parent's threads."""
    global _watch
    _watch = _Watch()


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def _peak_of_memory() -> int:
    if resource is None:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * _PEAK_UNIT


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread before its next bytecode; None takes one back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
