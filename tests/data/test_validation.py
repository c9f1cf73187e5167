"""Refusals, oddities, and an account in which every row appears."""

import json

import pytest

from tokenratio.data import (
    DataReport,
    Defect,
    DefectKind,
    Truncation,
    WarningKind,
    check_text,
    read_rows,
)
from tokenratio.data.defects import DefectLog
from tokenratio.data.formats import DataParser, PreferenceExample
from tokenratio.data.validation import parse_rows
from tokenratio.errors import TokenRatioError


def pair(prompt="p", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def parse(rows, log):
    return parse_rows(rows, DataParser([rows], PreferenceExample), log)


def counts(*rows):
    report = check_text(read_rows(list(rows)))
    assert report.rows_read == len(rows)
    assert report.rows_kept + sum(report.defect_counts.values()) == len(rows)
    return report.defect_counts, report.warning_counts


def test_every_textual_defect_is_counted_once():
    bot = {"role": "assistant", "content": "a"}
    defects, warnings = counts(
        pair(),
        "no object",
        {"prompt": "p", "chosen": "a"},
        pair(chosen=None),
        pair(chosen=[bot]),
        pair(chosen=[{"role": "narrator", "content": "a"}], rejected=[bot]),
        pair(chosen="a\ud800"),
        pair(chosen=""),
        pair(rejected=" \n\u2003"),
        pair(chosen="\t", rejected="\t"),
        pair(prompt="p", chosen=[{**bot, "content": " "}], rejected=[bot]),
        pair(prompt="p", chosen=[], rejected=[bot]),
        pair(chosen="same", rejected="same"),
    )
    assert defects == {
        DefectKind.BLANK_RESPONSE: 5,
        DefectKind.MALFORMED_ROW: 1,
        DefectKind.MISSING_COLUMN: 1,
        DefectKind.NON_STRING_FIELD: 1,
        DefectKind.MIXED_FORMAT: 1,
        DefectKind.BAD_CONVERSATION: 1,
        DefectKind.UNENCODABLE_TEXT: 1,
        DefectKind.IDENTICAL_PAIR: 1,
    }
    assert warnings == {}


def test_duplicates_and_contradictions():
    # a>b three times, b>a twice: the repetitions are duplicates, the two that are left contradict.
    ab, ba = pair(chosen="a", rejected="b"), pair(chosen="b", rejected="a")
    _, warnings = counts(ab, ba, ab, {**ab, "id": 7}, ba, pair("q", "b", "a"), pair())
    assert warnings == {WarningKind.DUPLICATE_ROW: 3, WarningKind.CONTRADICTORY_PAIR: 2}


def test_a_refused_row_is_no_duplicate():
    defects, warnings = counts(pair(chosen=""), pair(chosen=""), pair())
    assert defects == {DefectKind.BLANK_RESPONSE: 2}
    assert warnings == {}


@pytest.mark.parametrize(
    ("prompt", "chosen", "odd"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", 0),
        ("\n\nHuman: a\n\nHuman: c\n\nAssistant:", " d", 1),
        ("Human: a\n\nHuman: c\n\nAssistant:", " d", 1),
        ("\n\nHuman: a\n\nAssistant:", " b\n\nAssistant: c", 1),
        ("A text", " that quotes\n\nHuman: a\n\nHuman: b", 0),
    ],
)
def test_same_role_turns_of_transcripts(prompt, chosen, odd):
    assert counts(pair(prompt, chosen))[1].get(WarningKind.SAME_ROLE_TURNS, 0) == odd


@pytest.mark.parametrize(
    ("roles", "odd"),
    [
        (["system", "user"], 0),
        (["user", "user"], 1),
        (["user", "assistant"], 1),
        (["user", "assistant", "tool", "tool"], 0),
        (["user", "assistant", "tool", "assistant"], 1),
        (["user", "assistant", "tool", "assistant", "tool"], 0),
        (["user", "user", "assistant", "tool"], 1),
        (["user", "assistant", "user", "tool", "tool"], 0),
    ],
)
def test_same_role_turns_of_conversations(roles, odd):
    prompt = [{"role": role, "content": "x"} for role in roles]
    sides = [[{"role": "assistant", "content": side}] for side in "ab"]
    assert counts(pair(prompt, *sides))[1].get(WarningKind.SAME_ROLE_TURNS, 0) == odd


def test_odd_characters_are_kept_and_counted():
    _, warnings = counts(
        pair(chosen="a\r\nb"),
        pair("q\ufffd"),
        pair("r\x1b[0m"),
        pair("s\0\r"),
        pair("\tt\u2028\n"),
    )
    assert warnings == {
        WarningKind.CARRIAGE_RETURN: 2,
        WarningKind.CONTROL_CHARACTER: 2,
        WarningKind.REPLACEMENT_CHARACTER: 1,
    }


def test_on_bad_row_error_names_row_reason_and_remedy():
    rows = read_rows([pair(), pair(chosen=" "), pair(chosen=3)])
    with pytest.raises(TokenRatioError) as caught:
        parse(rows, DefectLog("error"))
    assert str(caught.value) == (
        "train_dataset:1: blank response: chosen is only whitespace. "
        "Correct or remove the row, or set on_bad_row to 'skip'."
    )
    with pytest.raises(TokenRatioError, match="'error' or 'skip'"):
        DefectLog("warn")


def test_no_usable_row_is_an_error():
    log = DefectLog("skip")
    with pytest.raises(TokenRatioError, match="no rows"):
        log.require_kept(0, 0)
    parse(read_rows([pair(chosen=""), pair(chosen=3)]), log)
    with pytest.raises(TokenRatioError, match=r"None of the 2 rows .* first, train_dataset:0"):
        log.require_kept(2, 0)


def test_summary_and_dict():
    blanks = [
        Defect(f"a\x1b.jsonl:{n}", DefectKind.BLANK_RESPONSE, "chosen is empty") for n in range(5)
    ]
    report = DataReport(
        rows_read=1005,
        rows_kept=1000,
        defects=blanks,
        warnings=[Defect("a:9", WarningKind.CARRIAGE_RETURN, "in prompt")],
        lengths={"prompt": 5000, "chosen": 3000, "rejected": 1000},
        past_shorter=2000,
        truncated={"prompt": Truncation(2, 70), "chosen": Truncation(), "rejected": Truncation()},
    )
    assert report.summary().split("\n") == [
        "1,005 rows read, 1,000 kept, 5 refused",
        "  refused: blank response: 5 "
        r"(a\x1b.jsonl:0, a\x1b.jsonl:1, a\x1b.jsonl:2, …; the first: chosen is empty)",
        "  kept, but odd: carriage return: 1 (a:9; the first: in prompt)",
        "tokens: prompt 5,000, chosen 3,000, rejected 1,000",
        "past the shorter response: 2,000 response tokens (50.0%), "
        "which token-level losses do not see",
        "truncated: prompt 2 rows by 70 tokens",
    ]
    restored = json.loads(json.dumps(report.to_dict()))
    assert restored["refused"]["blank response"]["rows"] == 5
    assert len(restored["refused"]["blank response"]["examples"]) == 3
    assert restored["share_past_shorter"] == 0.5
    assert restored["truncated"]["prompt"] == {"rows": 2, "tokens": 70}
