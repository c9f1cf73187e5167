"""YAML of recipes and flags: what is read, and the line of every fault."""

import time

import pytest

from tokenratio.errors import TokenRatioError
from tokenratio.yaml_text import MAX_BYTES, parse_yaml, read_yaml

BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


def test_merge_keys_and_anchors():
    text = "base: &base {rate: 1, beta: 2}\nsft: {<<: *base, rate: 3}\nother: {<<: [*base]}\n"
    found = parse_yaml(text, "r.yaml")
    assert found["sft"] == {"rate": 3, "beta": 2}
    assert found["other"] == found["base"] == {"rate": 1, "beta": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [\n", r"r.yaml:3: not YAML"),
        ("a: 1\n  b: 2\n", r"r.yaml:2: not YAML"),
        ("a: 1\nb: 2\na: 3\n", r"r.yaml:3: .*'a' is given twice"),
        ("a: 1\nb: {<<: {x: 1}, y: 1, y: 2}\n", r"r.yaml:2: .*'y' is given twice"),
        ("a: 1\nb: !!python/name:os.system\n", r"r.yaml:2: .*python/name"),
        ("a: 1\nb: 2024-13-45\n", r"r.yaml:2: .*'2024-13-45' is not a date"),
        ("b: !!bool x\n", r"r.yaml:1: .*'x' is not true or false"),
        ("b: !!float abc\n", r"r.yaml:1: .*'abc' is not a number"),
        ("b: 0b_\n", r"r.yaml:1: .*'0b_' is not a whole number"),
        ("b: 1" + "0" * 400, r"r.yaml:1: .*more than 64 bits"),
        ("b: 0x" + "f" * 9000, r"r.yaml:1: .*more than 64 bits"),
        ("b: " + "[" * 3000, r"r.yaml:1: .*nested more than 100 levels deep"),
        ("b: &a {c: *a}\n", r"r.yaml:1: .*\*a contains itself"),
        ("b: &a [*a]\n", r"r.yaml:1: .*\*a contains itself"),
        ("b: *a\n", r"r.yaml:1: .*undefined alias"),
        (BOMB, r"r.yaml:6: .*more than 20,000 values"),
        ("a: 1\n1: 2\n", r"r.yaml:2: .*the key '1' is read as 1: put it in quotes"),
        ("on: 2\n", r"r.yaml:1: .*the key 'on' is read as True: put it in quotes"),
        ("? [a]\n: 2\n", r"r.yaml:1: .*a key must be a text"),
        ("a: {[b]: 2}\n", r"r.yaml:1: .*a key must be a text"),
        ("a: x\nb: y\0z\n", r"r.yaml:2: the character U\+0000"),
        ('a: "\\0"\n', r"r.yaml:1: .*a NUL"),
        ('a: "\\ud800"\n', r"r.yaml:1: .*half of a surrogate pair"),
        ("a: 1\n---\nb: 2\n", r"r.yaml:2: .*expected a single document"),
        ("a: {<<: 3}\n", r"r.yaml:1: .*merging"),
    ],
)
def test_faults_are_one_line_with_their_line(text, message):
    began = time.perf_counter()
    with pytest.raises(TokenRatioError, match=message) as caught:
        parse_yaml(text, "r.yaml")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 10  # an expansion without a limit takes minutes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n", "`key: value` lines"),
        ("a: ü".encode("utf-16"), "UTF-16"),
        ("a: ü".encode("utf-16-le"), "UTF-16"),
        (b"a: caf\xe9\n", r"not UTF-8: byte 0xe9 at offset 6, line 1"),
        (b"a: 1\n" * MAX_BYTES, "larger than 256 KiB"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(TokenRatioError, match=message) as caught:
        read_yaml(tmp_path / "r.yaml")
    assert "r.yaml" in str(caught.value)


def test_byte_order_mark(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "r.yaml") == {"a": 1}


def test_inner_keys_may_be_numbers():
    assert parse_yaml("a: {max_memory: {0: 20GiB}}", "r.yaml") == {
        "a": {"max_memory": {0: "20GiB"}}
    }
