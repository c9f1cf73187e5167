"""Where a prompt ends that only the responses hold."""

import json
from pathlib import Path

import pytest

from tokenratio.data import PreferenceExample, WarningKind, check_text, prepare_pairs, read_rows
from tokenratio.data.boundary import begins_with, common_length, divides_word, extract_prompt
from tokenratio.data.defects import RowDefectError
from tokenratio.data.formats import DataParser

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "hh" / "test.jsonl"

# What stands before the answer in texts that hold a whole dialogue.
OPENINGS = [
    "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: What is it?\n\nAssistant:",
    "### Instruction:\nWhat is it?\n\n### Response:\n",
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
    "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n",
    "<|user|>\nWhat is it?</s>\n<|assistant|>\n",
    "<s>[INST] What is it? [/INST]",
    "USER: What is it? ASSISTANT:",
    "Question: What is it?\n\nAnswer:",
]
ANSWERS = [
    ("I'm glad to help.", "I am not sure."),
    ("Gremolata is an Italian condiment.", "Gremolata is a classic sauce."),
    ("The river is long.", "The river is"),
    ("Yes.", "No."),
]


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize(("chosen", "rejected"), ANSWERS)
def test_a_transcripts_prompt_ends_behind_the_last_opening(opening, chosen, rejected, tokenizer):
    space = " " if opening[-1] in ":]" else ""
    sides = {"chosen": space + chosen, "rejected": space + rejected}
    whole = {side: opening + text for side, text in sides.items()}
    limits = {"max_length": None, "max_prompt_length": None}
    explicit = prepare_pairs([{"prompt": opening, **sides}], tokenizer, **limits)
    implicit = prepare_pairs([whole], tokenizer, **limits)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert implicit.dataset[0][name] == explicit.dataset[0][name]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("It is an owl.", "It is a crow.", "It is"),
        ("The sky is blue", "The sky is blue and green", "The sky is"),
        ("Well, don't go.", "Well, don stays.", "Well,"),
        ("Say: été.", "Say: étang.", "Say:"),
        ("Say: cafe\u0301.", "Say: cafe.", "Say:"),
        ("天空是蓝色的", "天空是绿色的", "天空是"),
        ("Two: 1234", "Two: 1299", "Two:"),
        ("A list:\n- oak", "A list:\n- elm", "A list:\n-"),
    ],
)
def test_no_word_is_divided(chosen, rejected, prompt):
    assert chosen[: extract_prompt(chosen, rejected)] == prompt


def test_divides_word():
    assert [i for i in range(12) if divides_word("ab 'c' d-e1_", i)] == [1, 10, 11]


def test_common_length():
    for first, second in [("", "a"), ("abc", "abd"), ("abc", "abc"), ("x" * 999 + "a", "x" * 1200)]:
        expected = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
        assert common_length(first, second) == common_length([*first], [*second]) == expected


def test_a_source_whose_responses_mostly_share_no_beginning_has_no_prompts():
    """One pair that begins alike by chance is not a pair with a prompt."""
    rows = [
        {"ask": f"Question {n}?", "chosen": chosen, "rejected": rejected}
        for n, (chosen, rejected) in enumerate(
            [("The sky.", "The sea."), ("Yes.", "No."), ("An oak.", "Elms.")]
        )
    ]
    report = check_text(read_rows(rows))
    assert report.rows_kept == 0
    assert "share no beginning in 2 of 3 rows; the column ask is not read" in report.summary()
    mapped = check_text(read_rows(rows), columns={"prompt": "ask"})
    assert mapped.rows_kept == 3


@pytest.mark.skipif(not DATA.is_file(), reason=f"no real preference data at {DATA}")
def test_the_real_transcripts():
    lines = DATA.read_text(encoding="utf-8").split("\n")
    explicit = [json.loads(line) for line in lines if line.strip()]
    whole = [{side: r["prompt"] + r[side] for side in ("chosen", "rejected")} for r in explicit]
    rows = read_rows(whole)
    parser = DataParser([rows], PreferenceExample)
    found = [parser.parse(row) for row in rows]
    assert len(found) == 2307
    for example, row in zip(found, explicit, strict=True):
        assert (example.prompt, example.chosen) == (row["prompt"], row["chosen"])


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def parsed(*rows):
    """The examples and what is said of the prompts that stand in them twice."""
    rows = read_rows(list(rows))
    parser = DataParser([rows], PreferenceExample)
    examples = [parser.parse(row) for row in rows]
    odd = [odd.detail for row in rows for odd in parser.oddities(row)]
    return [(e.prompt, e.chosen, e.rejected) for e in examples], odd


LONG = "What is the tallest tree?"


@pytest.mark.parametrize("between", [" ", "\n", "\n\n"])
def test_a_repeated_prompt_is_taken_off(between):
    row = {"prompt": LONG, "chosen": LONG + between + "A fir.", "rejected": LONG + between + "No."}
    assert parsed(row) == (
        [(LONG, between + "A fir.", between + "No.")],
        ["both responses begin with the prompt: removed"],
    )


def test_messages_that_repeat_the_prompt():
    prompt = [{"role": "system", "content": "Be brief."}, user("Hi")]
    for repeated in (prompt, prompt[1:]):
        row = {"prompt": prompt, "chosen": [*repeated, bot("a")], "rejected": [*repeated, bot("b")]}
        assert parsed(row)[0] == [(prompt, [bot("a")], [bot("b")])]
    row["rejected"] = [bot("b")]
    with pytest.raises(RowDefectError, match="one response begins with the prompt's messages"):
        parsed(row)


def test_a_short_prompt_is_taken_off_where_nearly_all_rows_repeat_it():
    repeated = [{"prompt": f"{n}", "chosen": f"{n} is", "rejected": f"{n} no"} for n in range(9)]
    examples, odd = parsed(*repeated)
    assert examples[3] == ("3", " is", " no")
    assert len(odd) == 9
    others = [{"prompt": "I", "chosen": "A", "rejected": "B"}] * 9
    examples, odd = parsed(*repeated, *others)
    assert examples[3] == ("3", "3 is", "3 no")
    assert odd == ["both responses begin with the prompt: kept"] * 9


def test_one_response_that_quotes_the_prompt_keeps_it():
    quoting = {"prompt": LONG, "chosen": f"{LONG} A fir.", "rejected": "An elm."}
    assert parsed(quoting) == (
        [(LONG, f"{LONG} A fir.", "An elm.")],
        ["only chosen begins with the prompt: kept"],
    )
    echo = {"prompt": LONG, "chosen": "A fir.", "rejected": LONG}
    assert parsed(echo)[1] == []
    assert begins_with("Whatever", "What") == 0


def test_transcripts_beside_their_prompt():
    whole = "\n\nHuman: Sky?\n\nAssistant:"
    row = {"prompt": "Sky?", "chosen": f"{whole} Blue.", "rejected": f"{whole} Green."}
    assert parsed(row) == (
        [(whole, " Blue.", " Green.")],
        ["both responses are transcripts with the prompt: removed"],
    )
    assert check_text(read_rows([row])).warning_counts == {WarningKind.PROMPT_REPEATED: 1}
