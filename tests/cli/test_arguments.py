"""One conversion for YAML values and flags, and errors that name the right key."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import pytest

from tokenratio.cli.command import describe_flags, read_flags
from tokenratio.errors import TokenRatioError
from tokenratio.settings import build, convert, fields_of
from tokenratio.yaml_text import read_yaml


class Level(Enum):
    LOW = "low"
    HIGH = "high"


@dataclass
class Settings:
    rate: float = 0.1
    steps: int = 3
    name: str = "x"
    fast: bool = field(default=False, metadata={"help": "Go fast."})
    limit: int | None = None
    extra: dict[str, int] | str | None = None
    names: list[str] | None = None
    kind: Literal["a", "b"] = "a"
    level: Level | str = "low"


FIELDS = fields_of(Settings)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rate", "5e-7", 5e-7),
        ("rate", 1, 1.0),
        ("steps", "7", 7),
        ("steps", 7.0, 7),
        ("name", 3, "3"),
        ("fast", "true", True),
        ("fast", False, False),
        ("limit", "null", None),
        ("limit", None, None),
        ("limit", "5", 5),
        ("extra", "{a: 1}", {"a": 1}),
        ("extra", "plain", "plain"),
        ("names", "[a, b]", ["a", "b"]),
    ],
)
def test_values_of_either_source_become_the_fields_type(name, value, expected):
    converted = convert(name, value, FIELDS[name])
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rate", "fast", "a number"),
        ("rate", "nan", "a number"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("fast", "maybe", "true or false"),
        ("limit", "few", "a whole number or null"),
        ("extra", [1], "a mapping such as {key: value} or text or null"),
        ("names", "a", "a list or null"),
        ("kind", "c", "one of a, b"),
        ("level", "hihg", "one of low, high"),
    ],
)
def test_values_that_do_not_fit_name_the_key_and_what_it_may_be(name, value, expected):
    with pytest.raises(TokenRatioError, match=f"{name} must be {re.escape(expected)}, not"):
        convert(name, value, FIELDS[name])


def test_choices_are_suggested():
    with pytest.raises(TokenRatioError, match=r"not 'hihg'; did you mean 'high'\?"):
        convert("level", "hihg", FIELDS["level"])
    assert convert("level", "high", FIELDS["level"]) == "high"
    assert convert("kind", "a", FIELDS["kind"]) == "a"


def test_flags_of_all_forms():
    argv = ["a.yaml", "--rate", "-0.5", "--fast", "--name=b", "--steps", "2"]
    assert read_flags(argv, FIELDS) == (
        ["a.yaml"],
        {"rate": "-0.5", "fast": True, "name": "b", "steps": "2"},
    )
    assert read_flags(["--fast", "a.yaml"], FIELDS) == (["a.yaml"], {"fast": True})
    assert read_flags(["--fast", "false"], FIELDS) == ([], {"fast": "false"})


def test_unknown_flag_names_the_nearest():
    with pytest.raises(TokenRatioError, match="unknown flag 'stpes'; did you mean 'steps'"):
        read_flags(["--stpes", "3"], FIELDS)


def test_flag_without_its_value():
    with pytest.raises(TokenRatioError, match="--rate needs a value"):
        read_flags(["--rate", "--fast"], FIELDS)


def test_build_names_where_and_what():
    with pytest.raises(TokenRatioError, match=r"unknown key in r.yaml 'nmae'; did you mean 'name'"):
        build(Settings, {"nmae": 1}, "r.yaml")
    assert build(Settings, {"rate": "1e-3"}, "r.yaml").rate == 1e-3


def test_yaml_is_safe_and_a_mapping(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in (
        ("- a\n", "key: value"),
        ("a: [", "r.yaml:1: not YAML"),
        ("a: 1\na: 2\n", "is given twice"),
        ("a: !!python/object/apply:os.getcwd []", "r.yaml:1: not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(TokenRatioError, match=message):
            read_yaml(path)
    with pytest.raises(TokenRatioError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")


def test_help_lists_every_setting():
    text = describe_flags(FIELDS, {})
    assert "--fast [False]\n      Go fast." in text
    assert all(f"--{name}" in text for name in FIELDS)
