"""JSON-lines files of results, all made with the same settings, that an interrupted run resumes.

Each line is written whole before the next one begins, so a killed process leaves at most a
truncated last line, which is dropped when the file is opened again. Every line has an `id` and,
under `settings`, the digest of settings that are stored in `NAME.settings.json` beside the file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tokenratio.errors import TokenRatioError
from tokenratio.locks import open_alone
from tokenratio.records import as_shape, parse_json
from tokenratio.run_folder import read_document, replace_bytes


class Record(Protocol):
    """The content of a line; `settings` is the digest of how it was made."""

    @property
    def settings(self) -> str: ...


Key = TypeVar("Key")
R = TypeVar("R", bound=Record)

_BEGINNING = b'{"id": "'  # of every line, whatever the order of its other keys


@dataclass(frozen=True)
class LineFormat(Generic[Key, R]):
    """How lines are read and written.

    Attributes:
        read: from an object and its origin ("FILE:LINE"); raises `TokenRatioError`.
        write: the object, with an `id`.
        key: identifies a record; unique in a file.
        matches: whether a record is about the item that has its key now.
        records, items, done: for messages: "generations", "prompts" that are "answered".
    """

    read: Callable[[Mapping[str, Any], str], R]
    write: Callable[[R], dict[str, Any]]
    key: Callable[[R], Key]
    matches: Callable[[R, Any], bool]
    records: str
    items: str
    done: str

    def read_file(self, path: str | Path) -> list[R]:
        """The records of a finished file, in its order; refuses an empty or unfinished one."""
        lines = enumerate(read_whole(Path(path)), start=1)
        found = [self.read(line, f"{path}:{number}") for number, line in lines]
        if not found:
            raise TokenRatioError(f"{path} holds no {self.records}")
        self.unique((self.key(record), record) for record in found)
        return found

    def unique(self, items: Iterable[tuple[Key, Any]]) -> dict[Key, Any]:
        """Items by key; refuses two with the same key."""
        found: dict[Key, Any] = {}
        for key, item in items:
            if key in found:
                raise TokenRatioError(f"two {self.items} have the id {_shown(key)}")
            found[key] = item
        return found


class Journal(Generic[Key, R]):
    """A file of records that this process alone appends to; close it at the end.

    Args:
        path: created if it does not exist, with its folder.
        settings: everything that decides what the records hold. JSON; the order of keys does not
            matter.
        lines: its format.
        items: what it will have records of, by key, in the order of the finished file.
        overwrite: drop its present content.
        report: receives lines on what was kept and dropped.

    Attributes:
        items: by key.
        records: those in the file, by key.
        digest: of the settings.
    Raises:
        TokenRatioError: another process is writing the file, it was made with other settings or
            from other items, a line is damaged, or tokenratio did not write it. The file is then
            unchanged.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        lines: LineFormat[Key, R],
        items: Iterable[tuple[Key, Any]],
        *,
        overwrite: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        self.path = path = Path(path)
        self.digest, self._lines = settings_digest(settings), lines
        self.items = lines.unique(items)
        self.records: dict[Key, R] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_alone(path)
        if descriptor is None:
            raise TokenRatioError(
                f"{path} is being written by another process: wait for it, or choose another file"
            )
        self._file = descriptor
        try:
            with open(self._file, "rb", closefd=False) as file:
                content = file.read()
            if not _is_ours(content.partition(b"\n")[0]):
                raise _not_ours(path)
            content = b"" if overwrite else content
            objects, whole = parse_lines(content, path)
            for number, line in enumerate(objects, start=1):
                self._keep(line, f"{path}:{number}", settings)
            torn = content[whole:].lstrip()
            if torn and not _is_ours(torn):
                raise TokenRatioError(
                    f"{path} ends in text that tokenratio did not write: choose another file"
                )
            if whole < os.fstat(self._file).st_size:
                os.ftruncate(self._file, whole)
            note = json.dumps({self.digest: settings}, indent=2) + "\n"
            replace_bytes(settings_path(path), note.encode())
        except BaseException:
            self.close()
            raise
        if torn:
            report(f"{path}: the last line was cut off and has been dropped")
        if self.records:
            report(f"{path}: {self._progress()} are already {lines.done}")

    def _keep(self, line: Mapping[str, Any], origin: str, settings: Mapping[str, Any]) -> None:
        record = self._lines.read(line, origin)
        if record.settings != self.digest:
            old = read_settings(self.path).get(record.settings)
            now = json.loads(json.dumps(settings))
            changed = "" if old is None else f" ({_differences(old, now)})"
            raise TokenRatioError(
                f"{self.path} was made with other settings{changed}: use those, overwrite or "
                "delete the file, or choose another"
            )
        key, items, problem = self._lines.key(record), self._lines.items, ""
        if key not in self.items:
            problem = f"is not among the {len(self.items)} {items}"
        elif not self._lines.matches(record, self.items[key]):
            problem = "has changed since"
        if problem:
            raise TokenRatioError(
                f"{origin}: {_shown(key)} {problem}: delete the file, or choose another"
            )
        if key in self.records:
            raise TokenRatioError(f"{origin}: duplicate line for {_shown(key)}")
        self.records[key] = record

    @property
    def missing(self) -> dict[Key, Any]:
        """The items without a record."""
        return {key: item for key, item in self.items.items() if key not in self.records}

    def _progress(self) -> str:
        return f"{len(self.records)} of {len(self.items)} {self._lines.items}"

    def add(self, record: R, *, sync: bool = True) -> None:
        """Write a record.

        Args:
            sync: wait until it is on disk, where it survives a power cut.
        """
        content = memoryview(self._line(record))
        while content:
            content = content[os.write(self._file, content) :]
        if sync:
            os.fsync(self._file)
        self.records[self._lines.key(record)] = record

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Add to a `TokenRatioError` raised inside how much is kept and how to resume."""
        try:
            yield
        except TokenRatioError as error:
            raise TokenRatioError(
                f"{str(error).removesuffix('.')}. {self.path} has {self._progress()} "
                f"{self._lines.done}: run the same command again to resume"
            ) from error

    def finish(self, changed: Mapping[Key, R] | None = None) -> list[R]:
        """Sort the file in the order of the items; returns its records.

        Args:
            changed: records that replace those there.
        """
        records = [{**self.records, **(changed or {})}[key] for key in self.items]
        if changed or list(self.records) != list(self.items):
            replace_bytes(self.path, b"".join(map(self._line, records)))
        return records

    def _line(self, record: R) -> bytes:
        line = self._lines.write(record)
        return to_line({"id": line["id"], **line})

    def close(self) -> None:
        """Release the file, with all lines on disk."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


def check_is_journal(path: Path) -> None:
    """Refuse an existing file that no `Journal` wrote."""
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
    """Whether a `Journal` wrote this line, which may be truncated."""
    value = _object(line)
    if value is not None:
        return {"id", "settings"} <= value.keys()
    return line.startswith(_BEGINNING) or _BEGINNING.startswith(line)


def _shown(key: Any) -> str:
    """A record's key in messages: the id of a prompt, and which of its samples."""
    return key if isinstance(key, str) else ", sample ".join(map(str, key))


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of settings as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def settings_path(path: Path) -> Path:
    """The file beside a journal that holds its settings."""
    return path.with_suffix(".settings.json")


def read_settings(path: str | Path) -> dict[str, dict[str, Any]]:
    """The settings of the journal at `path`, by digest; empty if they are unknown."""
    path = settings_path(Path(path))
    return as_shape(dict[str, dict[str, Any]], read_document(path) or {}, str(path))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def shown(settings: Mapping[str, Any], name: str) -> str:
        return repr(settings[name]) if name in settings else "not set"

    return "; ".join(
        f"{name} {shown(old, name)}, now {shown(new, name)}"
        for name in sorted({*old, *new})
        if (name in old, old.get(name)) != (name in new, new.get(name))
    )


def parse_lines(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many bytes they take; only the last may be cut."""
    lines: list[dict[str, Any]] = []
    begin = 0
    while begin < len(content):
        end = content.find(b"\n", begin) + 1
        value = _object(content[begin:end]) if end else None
        if value is None:
            if end and content[end:].strip():
                raise TokenRatioError(
                    f"{path}:{len(lines) + 1}: not a JSON object, and not the last line: the file "
                    "was edited or damaged; repair or delete the line"
                )
            return lines, begin
        lines.append(value)
        begin = end
    return lines, begin


def read_whole(path: Path) -> list[dict[str, Any]]:
    """The objects of a finished file; refuses one whose last line is truncated."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenRatioError(f"cannot read {path}: {error.strerror}") from None
    lines, whole = parse_lines(content, path)
    if whole < len(content):
        raise TokenRatioError(
            f"{path}:{len(lines) + 1}: the last line is cut off: the command that wrote the file "
            "was interrupted; run it again to resume"
        )
    return lines


def to_line(line: Mapping[str, Any]) -> bytes:
    """An object as UTF-8 JSON and a newline."""
    try:
        return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, which an escape can hold
        return (json.dumps(line, allow_nan=False) + "\n").encode()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
