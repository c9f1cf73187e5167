"""Feeds damaged and hostile files, recipes, flags and replies to every public reader.

    python tests/fuzz.py [CASES] [FIRST]

A case is a number: it decides the reader, the real file that is damaged, and how. A case is right
if the reader returns, or refuses with a `TokenRatioError`; if it ends within `SECONDS`; if every
row is read or counted as skipped; and if nothing is written outside the case's folder. Every other
case is printed with its number, which repeats it alone: `python tests/fuzz.py 1 NUMBER`.
"""

import collections
import contextlib
import io
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from fuzz_mutations import mutated
from fuzz_readers import READERS, Seeds
from tokenratio.errors import TokenRatioError

SECONDS = 10.0


class _HangError(BaseException):
    """A reader took longer than `SECONDS`."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        kind: `read`, `refused`, or a fault: `traceback`, `hang`, `outside`.
        place: of a fault, the line of ours that it passed last.
    """

    number: int
    reader: str
    kind: str
    detail: str = ""
    place: str = ""
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("read", "refused")


class Fuzzer:
    """Runs cases in a folder of its own; an audit hook, which stays, sees what they write."""

    def __init__(self, folder: Path) -> None:
        self._seeds = Seeds(folder / "seeds")
        self._work = folder / "work"
        self._written: list[str] = []
        self._is_on = False
        sys.addaudithook(self._watch)

    def run(self, number: int) -> Outcome:
        """One case."""
        rng = random.Random(number)
        name = rng.choice(sorted(READERS))
        reader = READERS[name]
        shutil.rmtree(self._work, ignore_errors=True)
        out = self._work / "out"
        out.mkdir(parents=True)
        seed = self._seeds.pick(reader, rng)
        path = self._work / seed.name
        if isinstance(seed.content, bytes):
            path.write_bytes(mutated(seed.content, rng))
        else:  # a folder, one file of which is damaged
            shutil.copytree(seed.content, path)
            files = sorted(each for each in path.rglob("*") if each.is_file())
            each = rng.choice(files)
            each.write_bytes(mutated(each.read_bytes(), rng))
        began, here = time.perf_counter(), os.getcwd()
        self._written.clear()
        os.chdir(out)
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self._is_on = True
        logging.disable()
        try:
            kind, detail, place = self._outcome(lambda: reader.read(path, out, rng, self._seeds))
        finally:
            self._is_on = False
            logging.disable(logging.NOTSET)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.chdir(here)
        outside = [each for each in self._written if not self._is_inside(each)]
        if outside:
            kind, detail = "outside", f"{name} wrote {outside[0]}"
        return Outcome(number, name, kind, detail, place, time.perf_counter() - began)

    def _outcome(self, work):
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                work()
            except TokenRatioError as error:
                text = str(error)
                if "\n" in text.strip():
                    return "traceback", f"a message of several lines: {text[:200]!r}", "message"
                return "refused", text, ""
            except _HangError as error:
                return "hang", f"more than {SECONDS:g} s", _place(error)
            except Exception as error:
                return "traceback", f"{type(error).__name__}: {str(error)[:200]}", _place(error)
            return "read", "", ""

    def _watch(self, event: str, arguments) -> None:
        if not self._is_on:
            return
        if event == "open" and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(arguments[0], str | bytes | os.PathLike):
                self._written.append(os.path.abspath(os.fsdecode(arguments[0])))
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.rmdir", "os.link"):
            self._written += [
                os.path.abspath(os.fsdecode(each))
                for each in arguments[:2]
                if isinstance(each, str | bytes | os.PathLike)
            ]

    def _is_inside(self, path: str) -> bool:
        allowed = (str(self._work), tempfile.gettempdir() + "/tmp", "/dev/null", "/dev/shm")
        return path.startswith(allowed)


def _stop(*_):
    raise _HangError


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/tokenratio/" in frame.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})"


def run(cases: int, first: int = 0, report=print) -> list[Outcome]:
    """All faults of cases `first`, `first + 1`, …; prints each kind once and the counts."""
    faults, counts, slowest = [], collections.Counter(), (0.0, 0)
    seen = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        fuzzer = Fuzzer(Path(folder).resolve())
        for number in range(first, first + cases):
            outcome = fuzzer.run(number)
            counts[outcome.kind] += 1
            slowest = max(slowest, (outcome.seconds, number))
            if outcome.is_fault:
                faults.append(outcome)
                signature = (outcome.reader, outcome.kind, outcome.place)
                seen[signature] += 1
                if seen[signature] == 1:
                    report(
                        f"{number} {outcome.reader}: {outcome.kind} {outcome.detail}"
                        f" at {outcome.place}"
                    )
    report(f"{cases:,} cases: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.most_common()))
    report(f"{len(seen)} kinds of fault; the slowest case, {slowest[1]}, took {slowest[0]:.1f} s")
    return faults


if __name__ == "__main__":
    NUM, FIRST = (int(each) for each in (*sys.argv[1:], *("20000", "0")[len(sys.argv) - 1 :]))
    sys.exit(1 if run(NUM, FIRST, lambda line: print(line, flush=True)) else 0)
