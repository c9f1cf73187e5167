"""Damaged and hostile files, recipes, flags and replies: refused in one line, or read whole.

`make fuzz` runs many more cases than fit here.
"""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import Fuzzer
from fuzz_mutations import mutated
from fuzz_readers import READERS, VERDICTS
from tokenratio.data.files import row_of
from tokenratio.data.messages import structured
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.answer_parsing import parse_verdict
from tokenratio.evaluation.openai_api import ReplyError, read_reply, retry_after
from tokenratio.evaluation.verdict_files import Judgement
from tokenratio.records import as_shape, parse_json
from tokenratio.yaml_text import parse_yaml

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
def test_readers_refuse_in_one_line_or_read_whole(fuzzer):
    found = [fuzzer.run(number) for number in range(2000)]
    assert [outcome for outcome in found if outcome.is_fault] == []
    assert {outcome.reader for outcome in found} == set(READERS)
    kinds = [outcome.kind for outcome in found]
    assert min(kinds.count("read"), kinds.count("refused")) > 400  # damage does not stop all


def test_the_fuzzer_sees_faults(fuzzer, monkeypatch):
    """A reader that fails, hangs, writes elsewhere or speaks in several lines is reported."""
    import fuzz
    from fuzz_readers import Reader

    def hang(*_):
        while True:
            pass

    def write(path, *_):
        (path.parent.parent.parent / "elsewhere").write_text("x")

    def speak(*_):
        raise TokenRatioError("two\nlines")

    def fail(*_):
        return {}["x"]

    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    for read, kind in ((hang, "hang"), (write, "outside"), (speak, "traceback")):
        monkeypatch.setattr(fuzz, "READERS", {"broken": Reader(read, "recipe")})
        assert fuzzer.run(0).kind == kind
    monkeypatch.setattr(fuzz, "READERS", {"broken": Reader(fail, "recipe")})
    assert "KeyError" in fuzzer.run(1).detail


def test_a_case_is_repeated_by_its_number():
    content = json.dumps({"a": [1, "b"]}).encode()
    twice = [[mutated(content, random.Random(i)) for i in range(50)] for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(set(twice[0])) > 30


def refused_or(read, *arguments):
    """What a reader returns; None for a refusal, whose message is one line of Unicode."""
    try:
        return read(*arguments)
    except (TokenRatioError, ReplyError) as error:
        message = str(error)
    assert len(message.strip().split("\n")) == 1
    message.encode()
    return None


@quick
@given(st.text() | st.builds(lambda key, value: f"{key}: {json.dumps(value)}", st.text(), JSON))
def test_any_text_as_yaml(text):
    refused_or(parse_yaml, text, "r.yaml")


@quick
@given(JSON)
def test_any_value_as_a_record_or_a_row(value):
    judgement = refused_or(as_shape, Judgement, value, "j.jsonl:1")
    assert judgement is None
    row = row_of("a:1", value)
    assert (row.problem is None) == isinstance(value, dict)


@quick
@given(JSON)
def test_any_value_as_a_reply(value):
    text = json.dumps(value)
    parse_json(text)
    structured(text)
    refused_or(read_reply, text, 1)
    refused_or(read_reply, json.dumps({"choices": [value], "usage": value}), 1)


@quick
@given(st.text(), st.text() | st.integers().map(str) | st.datetimes().map(str))
def test_any_text_as_an_answer_or_a_wait(text, wait):
    parse_verdict(text, "stop", VERDICTS)
    parse_verdict(f"{text}\n[[A]]", "stop", VERDICTS)
    assert retry_after({"retry-after": wait}) >= 0
