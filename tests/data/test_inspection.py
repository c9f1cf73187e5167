"""What is printed is what training gets, and cannot garble the terminal."""

import json

import pytest

from tokenratio.data import (
    inspect_rows,
    inspect_source,
    prepare_completions,
    prepare_pairs,
)
from tokenratio.data.display import printable, quoted
from tokenratio.errors import TokenRatioError

ROWS = [
    {"prompt": "the sky is", "chosen": "so blue", "rejected": "bad"},
    {"prompt": "a b c d e", "chosen": "a b c d e f", "rejected": "b"},
    {"prompt": "a", "chosen": "", "rejected": "b"},
]


def test_encoded_pairs(make_tokenizer):
    tokenizer = make_tokenizer("words", bos=True)
    prepared = prepare_pairs(ROWS, tokenizer, max_length=8, max_prompt_length=4)
    shown = inspect_rows(prepared, tokenizer, num_rows=5).split("\n")
    assert shown == [
        "── row 0 · train_dataset:0",
        "  prompt     4 tokens: '<s> the sky is'",
        "  chosen     3 tokens, EOS once: 'so blue </s>'",
        "             boundary 'the' 'sky' 'is' ‖ 'so' 'blue' '</s>'; mask 4–6 of 0–6",
        "  rejected   2 tokens, EOS once: 'bad </s>'",
        "             boundary 'the' 'sky' 'is' ‖ 'bad' '</s>'; mask 4–5 of 0–5",
        "  T          2 tokens; 1 of 5 past it (20.0%)",
        "",
        "── row 1 · train_dataset:1",
        "  prompt     4 tokens, 2 cut on the left: '<s> c d e'",
        "  chosen     4 tokens, no EOS (3 cut on the right): 'a b c d'",
        "             boundary 'c' 'd' 'e' ‖ 'a' 'b' 'c'; mask 4–7 of 0–7",
        "  rejected   2 tokens, EOS once: 'b </s>'",
        "             boundary 'c' 'd' 'e' ‖ 'b' '</s>'; mask 4–5 of 0–5",
        "  T          2 tokens; 2 of 6 past it (33.3%)",
        "",
        "3 rows read, 2 kept, 1 refused",
        "  layout: prompt; pair from chosen, rejected",
        "  refused: blank response: 1 (train_dataset:2; the first: chosen is empty)",
        "tokens: prompt 8, chosen 7, rejected 4",
        "past the shorter response: 3 response tokens (27.3%), which token-level losses do not see",
        "truncated: prompt 1 row by 2 tokens, chosen 1 row by 3 tokens",
    ]
    assert inspect_rows(prepared, tokenizer, num_rows=0).split("\n") == shown[16:]


def test_encoded_completions(make_tokenizer):
    tokenizer = make_tokenizer("words")
    prepared = prepare_completions([{"text": "a b </s> c"}], tokenizer, max_length=None)
    shown = inspect_rows(prepared, tokenizer, num_rows=1)
    assert "completion 5 tokens, EOS 2 times: 'a b </s> c </s>'" in shown
    assert "boundary '<s>' ‖ 'a' 'b' '</s>'; mask 1–5 of 0–5" in shown
    assert "kept, but odd: EOS inside a response: 1" in shown


def test_text_alone():
    bot = {"role": "assistant", "content": "blue sky"}
    rows = [
        *ROWS[:1],
        {"prompt": [{"role": "user", "content": "?"}], "chosen": [bot], "rejected": []},
    ]
    chat = {**rows[1], "rejected": [{**bot, "content": "green"}]}
    shown = inspect_source([*rows, chat], num_rows=2)
    assert "  chosen     2 words, 7 characters: 'so blue'" in shown
    assert "  chosen     2 words, 8 characters: [assistant] 'blue sky'" in shown
    assert "  T          1 words; 1 of 3 past it (33.3%)" in shown
    assert "3 rows read, 2 kept, 1 refused" in shown
    assert "past the shorter response: 2 response words (33.3%)" in shown


def test_a_source_of_which_nothing_is_left_is_still_explained(tokenizer):
    for given in (None, tokenizer):
        shown = inspect_source([{"prompt": "p", "chosen": ""}, {"prompt": "p"}], given)
        assert shown.startswith("2 rows read, 0 kept, 2 refused\n  refused: missing column: 2")
    with pytest.raises(TokenRatioError, match="no rows"):
        inspect_source([])


def test_inspect_source_finds_the_shape(make_tokenizer):
    tokenizer = make_tokenizer("words")
    assert "rejected   2 tokens" in inspect_source(ROWS, tokenizer, max_length=5)
    assert "completion 2 tokens" in inspect_source([{"prompt": "a", "completion": "b"}], tokenizer)
    assert "completion 1 words" in inspect_source([{"prompt": "a", "completion": "b"}])


def test_tables(tmp_path, tokenizer):
    rows = [{"model": "ab"[n % 2], "output": "x" * n, "size": n} for n in range(6)]
    path = tmp_path / "a.jsonl"
    text = "\n".join(json.dumps(row) for row in [*rows, rows[1], {"model": "c\r\x1b"}])
    path.write_text(text + "\n{", encoding="utf-8")
    shown = inspect_source(tmp_path, tokenizer).split("\n")
    assert shown[0] == "a.jsonl: 9 rows"
    assert shown[1].startswith("  malformed row: 1 (a.jsonl:9; not JSON")
    assert shown[2:] == [
        "  duplicate row: 1",
        "  model: str, 1 with a carriage return, 3 values of 1 to 4 rows",
        "  output: str, 1 empty (a.jsonl:1), missing in 1",
        "  size: int, missing in 1, 0 to 5 (1 zero)",
    ]


def test_control_characters_of_data_never_reach_the_terminal(tmp_path, tokenizer):
    nasty = "a\x1b[2J\r\x9b\u202e\u2028\x07b"
    rows = [
        {"prompt": nasty, "chosen": nasty, "rejected": "c", nasty: 1},
        {"prompt": nasty, "chosen": nasty + "d", "rejected": {}},
        {"prompt": "p", "chosen": [{"role": nasty, "content": nasty}], "rejected": []},
        {nasty: nasty},
    ]
    path = tmp_path / "a\x1b.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    for shown in (
        inspect_source(path),
        inspect_source(path, tokenizer),
        inspect_source([rows[-1]]),
    ):
        assert [c for c in shown if not c.isprintable() and c != "\n"] == []
    assert r"a\x1b[2J\r\x9b\u202e\u2028\x07b" in inspect_source(path)
    with pytest.raises(TokenRatioError) as caught:
        prepare_pairs(path, tokenizer, max_length=None, max_prompt_length=None, on_bad_row="error")
    assert str(caught.value).isprintable()


def test_display():
    assert printable("plain ü 😊") == "plain ü 😊"
    assert printable("\ud800") == r"\ud800"
    assert quoted("ab'c", 4) == repr("ab'c")
    assert quoted("x" * 100, 30) == f"'{'x' * 20}' …70 characters… '{'x' * 10}'"
