"""Answers of paid judges, kept on disk by content, so that no answer is paid for twice."""

import sqlite3
from pathlib import Path

from tokenratio.errors import TokenRatioError

_SECONDS_TO_WAIT = 60.0  # for another process's write, which takes milliseconds


class VerdictCache:
    """A SQLite file that any number of runs read and write at once.

    Each answer is a transaction of its own, on disk when `put` returns: a killed process loses at
    most the answer that it was writing. The file and its folder are created if needed.

    Raises:
        TokenRatioError: it cannot be opened, or is not a database.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self.path, timeout=_SECONDS_TO_WAIT, isolation_level=None
            )
            # A rollback journal rather than a write-ahead log: it also holds on network folders.
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT NOT NULL) "
                "WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def get(self, key: str) -> tuple[str, str] | None:
        """The answer's text and finish reason, or None."""
        query = "SELECT text, finish_reason FROM answers WHERE key = ?"
        try:
            answer: tuple[str, str] | None = self._database.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if answer is not None and not all(isinstance(each, str) for each in answer):
            raise self._unusable(TypeError("an answer is not text"))
        return answer

    def put(self, key: str, text: str, finish_reason: str) -> None:
        """Keep an answer, unless another run has already stored one."""
        try:
            # A server's escapes can hold lone surrogates, which UTF-8 cannot encode.
            whole = [each.encode("utf-8", "replace").decode() for each in (text, finish_reason)]
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, *whole))
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        self._database.close()

    def _unusable(self, error: Exception) -> TokenRatioError:
        return TokenRatioError(
            f"the verdict cache {self.path} cannot be used ({error}): use another file, or "
            "delete this one and pay for its answers again"
        )
