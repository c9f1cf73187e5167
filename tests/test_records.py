"""JSON read into declared shapes: what is converted, and what every message names."""

import json
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from tokenratio.errors import TokenRatioError
from tokenratio.records import MAX_DEPTH, as_shape, parse_json, read_record


class Kind(StrEnum):
    GOOD = "good"


@dataclass(frozen=True)
class Part:
    name: str
    size: float = 1.0

    def __post_init__(self):
        if self.size < 0:
            raise TokenRatioError("size is below 0")


class Line(TypedDict):
    parts: tuple[Part, ...]
    pair: NotRequired[tuple[int, str]]
    kind: NotRequired[Kind | None]
    day: NotRequired[date]
    by_id: NotRequired[dict[int, str]]
    version: NotRequired[Literal[1, "a"]]
    any: NotRequired[Any]


def test_values_become_their_shape():
    line = {
        "parts": [{"name": "a", "size": 2, "unknown": 1}, {"name": "b"}],
        "pair": [1, "x"],
        "kind": "good",
        "day": "2024-02-29",
        "by_id": [[3, "c"]],
        "version": 1,
        "more": "kept",
    }
    found = as_shape(Line, json.loads(json.dumps(line)), "f.json")
    assert found == {
        **line,
        "parts": (Part("a", 2.0), Part("b")),
        "pair": (1, "x"),
        "kind": Kind.GOOD,
        "day": date(2024, 2, 29),
        "by_id": {3: "c"},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "f.json:2: it is a list, not an object; do this"),
        ({}, "f.json:2: no field 'parts'; do this"),
        ({"parts": [{}]}, r"parts\[0\] has no field 'name'"),
        ({"parts": {"a": 1}}, "parts is an object, not a list"),
        ({"parts": [{"name": 3}]}, r"parts\[0\].name is 3, not a string"),
        ({"parts": [{"name": "a", "size": True}]}, r"parts\[0\].size is true or false, not a num"),
        ({"parts": [{"name": "a", "size": 10**400}]}, r"parts\[0\].size is too large"),
        ({"parts": [{"name": "a", "size": -1}]}, r"parts\[0\]: size is below 0"),
        ({"parts": [], "pair": [1]}, "pair has 1 items, not 2"),
        ({"parts": [], "pair": [1.5, "a"]}, r"pair\[0\] is 1.5, not a whole number"),
        ({"parts": [], "pair": [10**400, "a"]}, r"pair\[0\] is a number, not a whole number"),
        ({"parts": [], "kind": "bad"}, "kind is 'bad', not one of good or null"),
        ({"parts": [], "day": "2024-13-01"}, "day is '2024-13-01', not a date"),
        ({"parts": [], "version": True}, "version is true or false, not one of 1, a"),
        ({"parts": [], "by_id": {"x": "y"}}, "by_id is 'x', not a whole number"),
    ],
)
def test_faults_name_file_and_field(change, message):
    with pytest.raises(TokenRatioError, match=message):
        as_shape(Line, change, "f.json:2", "do this")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "the key 'a' is given twice"),
        ("[" * 100_000, "more than 100 levels"),
        ("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1), "more than 100 levels"),
        ("9" * 5000, "Exceeds the limit"),
        (b'"\xff"', "invalid start byte"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_not_json(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    assert parse_json("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TokenRatioError, match=r"cannot read .*none\.json: No such file.*; run it"):
        read_record(Line, tmp_path / "none.json", "run it")
    (tmp_path / "cut.json").write_text('{"parts": [')
    with pytest.raises(TokenRatioError, match=r"cut\.json: not JSON: Expecting value"):
        read_record(Line, tmp_path / "cut.json")
