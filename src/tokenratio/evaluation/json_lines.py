"""JSON-lines files: one object in each line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.records import parse_json


def parse_lines(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many bytes they take; only the last may be cut."""
    lines: list[dict[str, Any]] = []
    begin = 0
    while begin < len(content):
        end = content.find(b"\n", begin) + 1
        value = parse_line(content[begin:end]) if end else None
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


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None if it holds something else, or only a part of one."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
