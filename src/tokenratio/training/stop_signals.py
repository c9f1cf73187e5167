"""SIGTERM and SIGINT during training: noted, so that the run can save a checkpoint and stop."""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_log = logging.getLogger(__name__)


class StopSignals:
    """Notes the first SIGTERM or SIGINT; a second one has its usual effect at once.

    A handler of the program's own is left in place, as is a signal that is ignored. The handlers
    from before are back in place at the end.

    Args:
        announce: say what happens next; on one process only.
    Attributes:
        received: the number of the signal, or 0.
    """

    def __init__(self, *, announce: bool = False) -> None:
        self.announce, self.received = announce, 0
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in _SIGNALS:
                if signal.getsignal(number) in _DEFAULTS:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, such as a pool's worker
            if number == signal.SIGTERM:  # its parent ends it; SIGINT reaches the parent too
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if self.received:
            self._restore()
            signal.raise_signal(number)
            return
        self.received = number
        if self.announce:
            _log.warning(
                "%s: a checkpoint is saved after this step, then the run stops; a second signal "
                "stops it at once",
                signal.Signals(number).name,
            )
