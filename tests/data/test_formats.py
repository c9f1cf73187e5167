"""Each format against TRL's own reading of it."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from single_row import parse_completion, parse_preference
from tokenratio.data import SourceRow
from tokenratio.data.boundary import divides_word
from tokenratio.data.defects import DefectKind, RowDefectError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def row(**fields) -> SourceRow:
    return SourceRow("here:1", fields)


def as_dict(example) -> dict:
    return {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}


def trl_reading(fields: dict) -> dict:
    data_utils = pytest.importorskip("trl.data_utils")
    return data_utils.maybe_extract_prompt(fields)


SYSTEM = {"role": "system", "content": "be brief"}
TURNS = [SYSTEM, user("hi"), bot("hello"), user("sky?")]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is blue. And green"},
        {"prompt": TURNS, "chosen": [bot("blue")], "rejected": [bot("green")]},
        {"chosen": [*TURNS, bot("blue")], "rejected": [*TURNS, bot("green")]},
        {"prompt": "sky?", "chosen": [*TURNS, bot("blue")], "rejected": [*TURNS, bot("green")]},
    ],
)
def test_preference_formats_agree_with_trl(fields):
    assert as_dict(parse_preference(row(**fields))) == trl_reading(fields)


@given(prefix=st.text("a. ", min_size=1), chosen=st.text("a. "), rejected=st.text("a. "))
@settings(deadline=None, derandomize=True)
def test_implicit_prompts_agree_with_trl_outside_words(prefix, chosen, rejected):
    fields = {"chosen": prefix + chosen, "rejected": prefix + rejected}
    assume(chosen != rejected)
    expected = trl_reading(fields)
    end = len(expected["prompt"])
    assume(expected["prompt"].strip())
    assume(not any(divides_word(fields[side], end) for side in ("chosen", "rejected")))
    assert as_dict(parse_preference(row(**fields))) == expected


@given(prefix=st.text("ab ", min_size=1), chosen=st.text("ab "), rejected=st.text("ab "))
@settings(deadline=None, derandomize=True)
def test_an_implicit_prompt_ends_outside_words(prefix, chosen, rejected):
    fields = {"chosen": prefix + chosen, "rejected": prefix + rejected}
    try:
        found = as_dict(parse_preference(row(**fields)))
    except RowDefectError:
        return
    assert found["prompt"].strip()
    for side, text in fields.items():
        assert found["prompt"] + found[side] == text
        assert not divides_word(text, len(found["prompt"]))


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("yes ", "no "), ("Yes, it is.", "Yesterday."), (" a", " b")]
)
def test_responses_that_share_no_beginning_need_a_prompt(chosen, rejected):
    with pytest.raises(RowDefectError, match="share no beginning; the columns ask, id are not"):
        parse_preference(row(chosen=chosen, rejected=rejected, ask="Well?", id=3))


def test_a_prompt_string_beside_answers_alone():
    example = parse_preference(row(prompt="sky?", chosen=[bot("blue")], rejected=[bot("green")]))
    assert as_dict(example) == {
        "prompt": [user("sky?")],
        "chosen": [bot("blue")],
        "rejected": [bot("green")],
    }


def test_nulls_that_arrow_fills_in_are_dropped():
    chosen = [{**bot("blue"), "tool_calls": None}]
    example = parse_preference(row(prompt=[user("sky?")], chosen=chosen, rejected=[bot("green")]))
    assert example.chosen == [bot("blue")]


@pytest.mark.parametrize("tools", [[{"name": "f"}], json.dumps([{"name": "f"}])])
def test_tools(tools):
    fields = {"prompt": [user("?")], "chosen": [bot("a")], "rejected": [bot("b")]}
    assert parse_preference(row(**fields, tools=tools)).tools == [{"name": "f"}]
    assert parse_preference(row(**fields, tools="")).tools is None
    calls = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert parse_preference(row(**{**fields, "chosen": [calls]})).chosen == [calls]


K = DefectKind


@pytest.mark.parametrize(
    ("fields", "kind", "detail"),
    [
        ({"prompt": "p", "chosen": "a"}, K.MISSING_COLUMN, "no rejected"),
        ({"question": "p"}, K.MISSING_COLUMN, "no chosen and no rejected"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, K.NON_STRING_FIELD, "chosen is a number"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, K.NON_STRING_FIELD, "prompt is null"),
        (
            {"prompt": "p", "chosen": ["a"], "rejected": ["b"]},
            K.NON_STRING_FIELD,
            "message 1 of ch",
        ),
        (
            {"prompt": "p", "chosen": [bot(1)], "rejected": [bot("b")]},
            K.NON_STRING_FIELD,
            "content of",
        ),
        (
            {"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": []},
            K.NON_STRING_FIELD,
            "content of message 1 of chosen is null",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": [bot("b")]},
            K.MIXED_FORMAT,
            "must both be strings",
        ),
        (
            {"prompt": "other", "chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b")]},
            K.MIXED_FORMAT,
            "not a user turn of",
        ),
        (
            {"prompt": [user("p")], "chosen": [{"content": "a"}], "rejected": [bot("b")]},
            K.BAD_CONVERSATION,
            "role of message 1 of chosen is missing",
        ),
        (
            {
                "prompt": [user("p")],
                "chosen": [{"role": "narrator", "content": "a"}],
                "rejected": [bot("b")],
            },
            K.BAD_CONVERSATION,
            "'narrator'",
        ),
        (
            {"prompt": [], "chosen": [bot("a")], "rejected": [bot("b")]},
            K.BAD_CONVERSATION,
            "no message",
        ),
        (
            {"prompt": [user("p")], "chosen": [user("p"), bot("a")], "rejected": [bot("b")]},
            K.BAD_CONVERSATION,
            "turn of 'user'",
        ),
        ({"chosen": [bot("a")], "rejected": [bot("b")]}, K.BAD_CONVERSATION, "no message"),
        ({"chosen": "", "rejected": "b"}, K.BLANK_RESPONSE, "empty"),
        ({"chosen": "same", "rejected": "same"}, K.IDENTICAL_PAIR, "the same"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "tools": "{"},
            K.MALFORMED_ROW,
            "not JSON",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": 3}, K.MALFORMED_ROW, "number"),
    ],
)
def test_refused_preferences(fields, kind, detail):
    with pytest.raises(RowDefectError, match=detail) as caught:
        parse_preference(row(**fields))
    assert caught.value.kind == kind


def test_unreadable_rows_are_malformed():
    with pytest.raises(RowDefectError, match="not JSON") as caught:
        parse_preference(SourceRow("a:1", {}, "not JSON"))
    assert caught.value.kind == K.MALFORMED_ROW


@pytest.mark.parametrize(
    ("fields", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": [user("p")], "completion": [bot("c")]}, [user("p")], [bot("c")]),
        ({"prompt": "p", "completion": [bot("c")]}, [user("p")], [bot("c")]),
        ({"prompt": "p", "completion": [user("p"), bot("c")]}, [user("p")], [bot("c")]),
        ({"text": "all of it"}, "", "all of it"),
        ({"messages": [*TURNS, bot("c")]}, TURNS, [bot("c")]),
        ({"prompt": "p", "chosen": "c", "rejected": 3}, "p", "c"),
        ({"chosen": "The sky is blue", "rejected": "The sky is green"}, "The sky is", " blue"),
        (
            {"prompt": "p", "chosen": [user("p"), bot("c")], "rejected": [user("p"), bot("d")]},
            [user("p")],
            [bot("c")],
        ),
        ({"prompt": "p", "chosen": [user("p"), bot("c")]}, [user("p")], [bot("c")]),
    ],
)
def test_completion_formats(fields, prompt, completion):
    example = parse_completion(row(**fields))
    assert (example.prompt, example.completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"question": "p"}, K.MISSING_COLUMN),
        ({"completion": "c"}, K.MISSING_COLUMN),
        ({"messages": "text"}, K.MIXED_FORMAT),
        ({"messages": [user("p")]}, K.BAD_CONVERSATION),
        ({"messages": []}, K.BAD_CONVERSATION),
        ({"messages": [bot("a"), user("p")]}, K.BAD_CONVERSATION),
        ({"text": [user("p")]}, K.NON_STRING_FIELD),
        ({"text": None}, K.NON_STRING_FIELD),
    ],
)
def test_refused_completions(fields, kind):
    with pytest.raises(RowDefectError) as caught:
        parse_completion(row(**fields))
    assert caught.value.kind == kind
