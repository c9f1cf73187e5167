"""JSON-lines files that grow a line at a time and outlive a killed process.

A line is handed to the operating system whole before the next begins, so a process killed at any
moment leaves at most a torn last line. It is dropped when the file is opened again.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenratio.errors import TokenRatioError

try:
    import fcntl
except ImportError:  # Windows: two runs writing one file are then not told apart
    fcntl = None  # type: ignore[assignment]


# Of every line: what is cut off the end of a file must have begun so, or the file is another's.
_BEGINNING = b'{"id": '


class Journal:
    """A file open for appending, by this process alone.

    Args:
        path: made if it does not exist, with its folder.

    Attributes:
        lines: the objects that were in the file when it was opened.
        dropped: whether a torn last line was cut off it.

    Raises:
        TokenRatioError: another process writes the file, a line that is not its last is no JSON
            object, or what is cut off at its end is no beginning of a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(path)
        try:
            with open(self._file, "rb", closefd=False) as file:
                content = file.read()
            self.lines, whole = parse_lines(content, path)
            self.dropped = whole < len(content)
            torn = content[whole:].lstrip()
            if torn and not (torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)):
                raise TokenRatioError(
                    f"{path} ends in something tokenratio did not write: choose another file"
                )
            if self.dropped:
                os.ftruncate(self._file, whole)
        except BaseException:
            self.close()
            raise

    def append(self, line: Mapping[str, Any], *, sync: bool = True) -> None:
        """Write a line.

        Args:
            sync: wait until it is on the disk, so that not even a power cut loses it.
        """
        content = memoryview(to_line(line))
        while content:
            content = content[os.write(self._file, content) :]
        if sync:
            os.fsync(self._file)

    def finish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace the content, all at once or not at all."""
        replace_durably(self.path, b"".join(map(to_line, lines)))

    def close(self) -> None:
        """Let go of the file; its lines are on the disk."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def parse_lines(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many bytes they take.

    What follows those bytes is a torn last line.

    Raises:
        TokenRatioError: another line than the last is no JSON object.
    """
    lines: list[dict[str, Any]] = []
    begin = 0
    while begin < len(content):
        end = content.find(b"\n", begin) + 1
        value = _object(content[begin:end]) if end else None
        if value is None:
            if end and content[end:].strip():
                raise TokenRatioError(
                    f"{path}:{len(lines) + 1}: no JSON object, and not the last line: the file was "
                    "changed by hand or damaged; mend or delete the line"
                )
            return lines, begin
        lines.append(value)
        begin = end
    return lines, begin


def read_whole(path: Path) -> list[dict[str, Any]]:
    """The objects of a finished file.

    Raises:
        TokenRatioError: there is none, or its last line is torn.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenRatioError(f"cannot read {path}: {error.strerror}") from None
    lines, whole = parse_lines(content, path)
    if whole < len(content):
        raise TokenRatioError(
            f"{path}:{len(lines) + 1}: the last line is cut off: the command that wrote the "
            "file was interrupted; run it again to resume"
        )
    return lines


def to_line(line: Mapping[str, Any]) -> bytes:
    """An object as UTF-8 JSON and a newline."""
    try:
        return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, which an escape can hold
        return (json.dumps(line, allow_nan=False) + "\n").encode()


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file so that a crash or a power cut leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _open_alone(path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise TokenRatioError(f"cannot write {path}: {error.strerror}") from None
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise TokenRatioError(
                f"{path} is being written by another process: wait for it, or choose another file"
            ) from None
        # Between opening and locking, the one who had it may have put another file in its place.
        if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
            return file
        os.close(file)
