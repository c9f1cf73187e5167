"""The defects that the real data's README lists are found, with its counts."""

from pathlib import Path

import pytest

from tokenratio.data import (
    DefectKind,
    WarningKind,
    check_text,
    inspect_source,
    prepare_pairs,
    read_rows,
)

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the real preference data is not at {DATA}"
)

BLANK, SAME = DefectKind.BLANK_RESPONSE, DefectKind.IDENTICAL_PAIR
DUPLICATE, CONTRADICTORY = WarningKind.DUPLICATE_ROW, WarningKind.CONTRADICTORY_PAIR
TURNS, CR = WarningKind.SAME_ROLE_TURNS, WarningKind.CARRIAGE_RETURN
REPEATED = WarningKind.PROMPT_REPEATED  # a model that goes on with the question
FFFD, CONTROL = WarningKind.REPLACEMENT_CHARACTER, WarningKind.CONTROL_CHARACTER

FOUND = [
    ("hh", {"test": 2307}, {BLANK: 4}, {TURNS: 4}),
    ("hh_small", {"train": 1518, "test": 228}, {}, {TURNS: 1}),
    ("tldr", {"train": 1601, "test": 175}, {}, {DUPLICATE: 191, CONTRADICTORY: 62}),
    (
        "alpaca_pairs_small",
        {"train": 8000, "test": 1000},
        {},
        {CR: 11, CONTRADICTORY: 6, REPEATED: 1},
    ),
    (
        "ultrafeedback_sample",
        {"train": 1000, "test": 200},
        {SAME: 5, BLANK: 2},
        {CR: 9, FFFD: 3, CONTROL: 1},
    ),
    ("llmbar", {None: 885}, {SAME: 1, BLANK: 1}, {DUPLICATE: 5}),
    ("rasbt_synthetic", {None: 1100}, {SAME: 6}, {}),
    # Five duplicates and two ASCII control characters that the README does not mention.
    ("llamafactory_dpo_en_demo", {None: 300}, {}, {DUPLICATE: 5, CONTROL: 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "sizes", "defects", "odd"), FOUND)
def test_listed_defects(folder, sizes, defects, odd):
    for split, size in sizes.items():
        assert len(read_rows(DATA / folder, split=split)) == size
    rows = read_rows(DATA / folder, split="all")
    report = check_text(rows)
    assert report.rows_read == len(rows) == sum(sizes.values())
    assert report.defect_counts == defects
    assert report.warning_counts == odd
    assert report.rows_kept == len(rows) - sum(defects.values())
    # The README: 14 to 42 % of the response lies past the shorter one.
    assert 0.13 < report.share_past_shorter < 0.43


@pytest.mark.slow
@pytest.mark.parametrize("folder", [found[0] for found in FOUND])
def test_inspect_data(folder):
    shown = inspect_source(DATA / folder, num_rows=1)
    assert "rows read" in shown
    assert shown.replace("\n", "").isprintable()


@pytest.mark.slow
def test_inspect_folders_that_hold_no_pairs():
    questions = inspect_source(DATA / "eval_prompts")
    assert "mt_bench_question.jsonl: 80 rows" in questions
    assert "category: str, 8 values of 10 rows each" in questions
    judgements = inspect_source(DATA / "alpaca_eval")
    # Empty outputs show as lengths of zero; one model (not six, as the README has it) lacks a row.
    assert "len_model: str, 0 to 12720 (2 zero)" in judgements
    assert (
        "model: str, 28 values, 27 of 805 rows; 1 with others: alpaca-7b_concise 804" in judgements
    )


@pytest.mark.slow
def test_conversations_are_encoded(chat_tokenizer):
    folder = DATA / "llamafactory_dpo_en_demo"
    prepared = prepare_pairs(folder, chat_tokenizer, max_length=512, max_prompt_length=256)
    assert prepared.report.rows_kept == 300
    ends = chat_tokenizer.eos_token_id
    for row in prepared.dataset:
        whole = row["chosen_ids"], row["rejected_ids"]
        for ids, cut in zip(whole, prepared.cuts.get(row["row"], (0, 0, 0))[1:], strict=True):
            assert (ids[-1] == ends) == (not cut)
            assert len(row["prompt_ids"]) + len(ids) <= 512


@pytest.mark.slow
def test_texts_are_encoded(tokenizer):
    prepared = prepare_pairs(DATA / "hh_small", tokenizer, max_length=None, max_prompt_length=None)
    assert prepared.report.rows_kept == 1518
    assert prepared.report.truncated["prompt"].rows == 0
    assert tokenizer.decode(prepared.dataset[0]["prompt_ids"]).endswith("\n\nAssistant:")
