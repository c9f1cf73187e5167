"""JSON-lines files of results, all made with the same settings, that an interrupted run resumes.

A line is handed to the operating system whole before the next begins, so a process killed at any
moment leaves at most a torn last line, which is dropped when the file is opened again. Every line
has an `id` and, under `settings`, a digest; the settings it stands for are in
`NAME.settings.json` beside the file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from tokenratio.errors import TokenRatioError

try:
    import fcntl
except ImportError:  # Windows: two runs that write one file are then not detected
    fcntl = None  # type: ignore[assignment]


class Record(Protocol):
    """What a line holds; `settings` is the digest of how it was made."""

    @property
    def settings(self) -> str: ...


Key = TypeVar("Key")
R = TypeVar("R", bound=Record)

_BEGINNING = b'{"id": "'  # of every line, whatever the order of its other keys


@dataclass(frozen=True)
class LineFormat(Generic[Key, R]):
    """How lines are read and written.

    Attributes:
        read: from an object and where it stands ("FILE:LINE"); raises `TokenRatioError`.
        write: the object, with an `id`.
        key: what the record is about; no two lines have the same.
        items, done: for messages: "prompts" that are "answered".
    """

    read: Callable[[Mapping[str, Any], str], R]
    write: Callable[[R], dict[str, Any]]
    key: Callable[[R], Key]
    items: str
    done: str

    def read_file(self, path: Path) -> list[R]:
        """The records of a finished file.

        Raises:
            TokenRatioError: it cannot be read or is unfinished, or a line is wrong; names the line.
        """
        lines = enumerate(read_whole(path), start=1)
        return [self.read(line, f"{path}:{number}") for number, line in lines]


class Journal(Generic[Key, R]):
    """A file of records open for appending, by this process alone.

    Args:
        path: made if it does not exist, with its folder.
        settings: everything that decides what the records hold. JSON; the order of keys does not
            matter.
        lines: its format.
        num: how many records it will have, for messages.
        check: refuses a record that is not wanted; called with it and where it stands.
        overwrite: begin anew.
        report: receives lines on what was kept and dropped.

    Attributes:
        records: those that the file has, by key.
        digest: of the settings.

    Raises:
        TokenRatioError: another process writes the file, it was made with other settings, a line
            is damaged or not wanted, or tokenratio did not write it. The file is then as it was.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        lines: LineFormat[Key, R],
        *,
        num: int,
        check: Callable[[R, str], None],
        overwrite: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        self.path, self.digest = path, settings_digest(settings)
        self.records: dict[Key, R] = {}
        self._lines, self._num = lines, num
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(path)
        try:
            with open(self._file, "rb", closefd=False) as file:
                content = file.read()
            if not _is_ours(content.partition(b"\n")[0]):
                raise _not_ours(path)
            content = b"" if overwrite else content
            objects, whole = parse_lines(content, path)
            for number, line in enumerate(objects, start=1):
                self._keep(line, f"{path}:{number}", settings, check)
            torn = content[whole:].lstrip()
            if torn and not _is_ours(torn):
                raise TokenRatioError(
                    f"{path} ends in something tokenratio did not write: choose another file"
                )
            if whole < os.fstat(self._file).st_size:
                os.ftruncate(self._file, whole)
            note = json.dumps({self.digest: settings}, indent=2) + "\n"
            replace_durably(settings_path(path), note.encode())
        except BaseException:
            self.close()
            raise
        if torn:
            report(f"{path}: the last line was cut off and is dropped")
        if self.records:
            report(f"{path}: {len(self.records)} of {num} {lines.items} are already {lines.done}")

    def _keep(
        self,
        line: Mapping[str, Any],
        origin: str,
        settings: Mapping[str, Any],
        check: Callable[[R, str], None],
    ) -> None:
        record = self._lines.read(line, origin)
        if record.settings != self.digest:
            old = read_settings(self.path).get(record.settings)
            now = json.loads(json.dumps(settings))
            changed = "" if old is None else f" ({_differences(old, now)})"
            raise TokenRatioError(
                f"{self.path} was made with other settings{changed}: use those, overwrite or "
                "delete the file, or choose another"
            )
        check(record, origin)
        key = self._lines.key(record)
        if key in self.records:
            raise TokenRatioError(f"{origin}: a second line for {key}")
        self.records[key] = record

    def add(self, record: R, *, sync: bool = True) -> None:
        """Write a record.

        Args:
            sync: wait until it is on the disk, so that not even a power cut loses it.
        """
        content = memoryview(self._line(record))
        while content:
            content = content[os.write(self._file, content) :]
        if sync:
            os.fsync(self._file)
        self.records[self._lines.key(record)] = record

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Add to a `TokenRatioError` raised inside how much is kept, and that it can be resumed."""
        try:
            yield
        except TokenRatioError as error:
            raise TokenRatioError(
                f"{error}\n{self.path} has {len(self.records)} of {self._num} {self._lines.items} "
                f"{self._lines.done}: run the same command again to resume"
            ) from error

    def finish(self, keys: Iterable[Key], changed: Mapping[Key, R] | None = None) -> list[R]:
        """The records in the order of `keys`, in which the file then has them too.

        Args:
            changed: records to put in the place of those there.
        """
        keys = list(keys)
        records = [{**self.records, **(changed or {})}[key] for key in keys]
        if changed or list(self.records) != keys:
            replace_durably(self.path, b"".join(map(self._line, records)))
        return records

    def _line(self, record: R) -> bytes:
        line = self._lines.write(record)
        return to_line({"id": line["id"], **line})

    def close(self) -> None:
        """Release the file; its lines are on the disk."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Journal[Key, R]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_is_journal(path: Path) -> None:
    """Refuse a file that no `Journal` wrote; there need not be one.

    Raises:
        TokenRatioError: it is something else, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            first = file.readline()
    except FileNotFoundError:
        return
    except OSError as error:
        raise TokenRatioError(f"cannot read {path}: {error.strerror}") from None
    if not _is_ours(first):
        raise _not_ours(path)


def _not_ours(path: Path) -> TokenRatioError:
    return TokenRatioError(
        f"{path} already exists and was not written by tokenratio: choose another file"
    )


def _is_ours(line: bytes) -> bool:
    """Whether a `Journal` wrote a line, which may be cut off anywhere."""
    value = _object(line)
    if value is not None:
        return {"id", "settings"} <= value.keys()
    return line.startswith(_BEGINNING) or _BEGINNING.startswith(line)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of settings as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def settings_path(path: Path) -> Path:
    """The file beside a journal that holds its settings."""
    return path.with_suffix(".settings.json")


def read_settings(path: str | Path) -> dict[str, dict[str, Any]]:
    """The settings of a journal by digest; empty where they are not known.

    Args:
        path: of the journal.
    """
    try:
        value = json.loads(settings_path(Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def shown(settings: Mapping[str, Any], name: str) -> str:
        return repr(settings[name]) if name in settings else "not set"

    return "; ".join(
        f"{name} {shown(old, name)}, now {shown(new, name)}"
        for name in sorted({*old, *new})
        if (name in old, old.get(name)) != (name in new, new.get(name))
    )


def parse_lines(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many bytes they take.

    What follows those bytes is a torn last line.

    Raises:
        TokenRatioError: a line other than the last is no JSON object.
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
                    "edited by hand or damaged; mend or delete the line"
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
        # Between opening and locking, another process may have put a new file in its place.
        if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
            return file
        os.close(file)
