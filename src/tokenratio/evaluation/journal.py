"""JSON-lines files of results, all made with the same settings, that an interrupted run resumes.

Each line is written whole before the next one begins, so a killed process leaves at most a
truncated last line, which is dropped when the file is opened again. Every line has an `id` and,
under `settings`, the digest of settings that are stored in `NAME.settings.json` beside the file.

Of several processes (`processes.current`) the first one writes the file. Each other one writes
`NAME.process-INDEX.part` beside it, which the first moves into the file when all have finished or,
if they were interrupted, when the file is opened again, by any number of processes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tokenratio.errors import TokenRatioError, is_disk_full
from tokenratio.evaluation.json_lines import parse_line, parse_lines, read_whole, to_line
from tokenratio.locks import open_alone
from tokenratio.models.processes import current
from tokenratio.records import as_shape
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
        if parts := _parts_of(Path(path)):
            raise TokenRatioError(
                f"{path} is not finished, there is {parts[0].name} beside it: run the command that "
                "writes it again"
            )
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
    """A file of records that one command alone appends to; close it at the end.

    Every process of the command opens it, and has all its records.

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
        self.path, self._settings, self._lines = Path(path), dict(settings), lines
        self.digest, self._report = settings_digest(settings), report
        self.items = lines.unique(items)
        self.records: dict[Key, R] = {}
        self._file, group = -1, current()
        try:
            first, *others = group.gather(self._settings)
            for rank, other in enumerate(others, start=1):  # all refuse before a file is touched
                if other != first:
                    raise TokenRatioError(
                        f"rank {rank} would write {path} with other settings than rank 0 "
                        f"({_differences(first, other)}): all need the same models and files"
                    )
            self.records = group.on_first(lambda: self._begin(overwrite))
            if group.index:
                self._file = _open(Path(f"{path}.process-{group.index}.part"))
        except BaseException:
            self.close()
            raise

    def _begin(self, overwrite: bool) -> dict[Key, R]:
        """Open the file and read what it and its parts hold."""
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open(path)
        whole, torn = self._read(self._file, path, overwrite)
        with self._parts(overwrite) as part_torn:
            if whole < os.fstat(self._file).st_size:
                os.ftruncate(self._file, whole)
        note = json.dumps({self.digest: self._settings}, indent=2) + "\n"
        replace_bytes(settings_path(path), note.encode())
        if torn or part_torn:
            self._report(f"{path}: the last line was cut off and has been dropped")
        if self.records:
            self._report(f"{path}: {self._progress()} are already {self._lines.done}")
        return self.records

    def _read(self, descriptor: int, path: Path, overwrite: bool) -> tuple[int, bool]:
        """Keep the records of a file; the bytes that they take, and whether the last is cut off."""
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read()
        if not _is_ours(content.partition(b"\n")[0]):
            raise _not_ours(path)
        content = b"" if overwrite else content
        objects, whole = parse_lines(content, path)
        torn = content[whole:].lstrip()
        if torn and not _is_ours(torn):
            raise TokenRatioError(
                f"{path} ends in text that tokenratio did not write: choose another file"
            )
        for number, line in enumerate(objects, start=1):
            self._keep(line, path, number)
        return whole, bool(torn)

    @contextmanager
    def _parts(self, overwrite: bool = False) -> Iterator[bool]:
        """Read what other processes have written, and at the end move it into the file.

        Yields:
            Whether a part's last line is cut off.
        """
        parts = _parts_of(self.path)
        num, is_torn = len(self.records), False
        with ExitStack() as stack:
            for part in parts:
                descriptor = _open(part)
                stack.callback(os.close, descriptor)
                is_torn |= self._read(descriptor, part, overwrite)[1]
            yield is_torn
            for record in list(self.records.values())[num:]:
                self.add(record, sync=False)
            os.fsync(self._file)
            for part in parts:
                part.unlink()

    def _with_parts(self) -> dict[Key, R]:
        with self._parts():
            return self.records

    def _keep(self, line: Mapping[str, Any], path: Path, number: int) -> None:
        origin = f"{path}:{number}"
        record = self._lines.read(line, origin)
        if record.settings != self.digest:
            old = read_settings(self.path).get(record.settings)
            now = json.loads(json.dumps(self._settings))
            changed = "" if old is None else f" ({_differences(old, now)})"
            raise TokenRatioError(
                f"{path} was made with other settings{changed}: use those, overwrite or "
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
        if key in self.records and path == self.path:  # a part may have been moved halfway
            raise TokenRatioError(f"{origin}: duplicate line for {_shown(key)}")
        self.records.setdefault(key, record)

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
        """Add to a `TokenRatioError` raised inside how much is kept and how to resume.

        A full disk is one too.
        """
        try:
            yield
        except (TokenRatioError, OSError) as error:
            is_full = is_disk_full(error)
            if not isinstance(error, TokenRatioError) and not is_full:
                raise
            said = "the disk is full: free space" if is_full else str(error).removesuffix(".")
            kept = f"{self.path} has {self._progress()} {self._lines.done}"
            if current().count > 1:
                kept = f"What has been {self._lines.done} is kept"
            raise TokenRatioError(
                f"{said}. {kept}: run the same command again to resume"
            ) from error

    def merge(self) -> None:
        """Wait for the other processes; then each has all records."""
        group = current()
        if group.index:
            self.close()
        if group.count > 1:
            group.gather(None)
            self.records = group.on_first(self._with_parts)

    def finish(self, changed: Mapping[Key, R] | None = None) -> list[R]:
        """Sort the file in the order of the items; returns its records.

        Args:
            changed: records that replace those there.
        """
        records = [{**self.records, **(changed or {})}[key] for key in self.items]
        if not current().index and (changed or list(self.records) != list(self.items)):
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


def _open(path: Path) -> int:
    """A descriptor of a file that no other process has open; refuses one that another has."""
    descriptor = open_alone(path)
    if descriptor is None:
        raise TokenRatioError(
            f"{path} is being written by another process: wait for it, or choose another file"
        )
    return descriptor


def _parts_of(path: Path) -> list[Path]:
    """What other processes have written for a file and the first has not moved into it yet."""
    name = re.compile(re.escape(path.name) + r"\.process-[1-9]\d*\.part")
    return sorted(each for each in path.parent.glob("*.part") if name.fullmatch(each.name))


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
    value = parse_line(line)
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
