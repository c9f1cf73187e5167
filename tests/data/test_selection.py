"""Samples, held-out prompts and several sources with weights: what is used, and what is said."""

import json

import datasets
import pytest

from tokenratio.data import (
    DataSource,
    Selection,
    prepare_completions,
    prepare_pairs,
    read_rows,
    source_name,
)
from tokenratio.errors import TokenRatioError

LIMITS = {"max_length": 64, "max_prompt_length": None}


def pairs(num, offset=0, per_prompt=1):
    return [
        {
            "prompt": f"prompt {(offset + i) // per_prompt}",
            "chosen": f"good {offset + i}",
            "rejected": f"bad {offset + i}",
        }
        for i in range(num)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts_of(data, tokenizer):
    return {tokenizer.decode(ids) for ids in data.dataset["prompt_ids"]}


def halves(source, tokenizer, prepare=prepare_pairs, share=0.3, seed=0):
    return tuple(
        prepare(source, tokenizer, **LIMITS, selection=Selection(None, share, part, seed))
        for part in ("train", "held_out")
    )


def test_no_prompt_is_on_both_sides(tokenizer):
    rows = pairs(200, per_prompt=2)
    train, held_out = halves(rows, tokenizer)
    assert not prompts_of(train, tokenizer) & prompts_of(held_out, tokenizer)
    assert train.report.rows_kept + held_out.report.rows_kept == 200
    assert 15 <= held_out.report.rows_kept / 2 <= 45  # 30 of 100 prompts, give or take 3 sigma
    said = held_out.report.summary()
    num = held_out.report.rows_kept
    assert f"held out by prompt: {num // 2} of 100 prompts, {num} of 200 rows" in said
    assert f"{num} rows read, {num} kept, 0 refused" in said


def test_the_side_of_a_prompt_is_its_own(tokenizer):
    """More rows, another order, another layout or another stage move no prompt."""
    rows = pairs(120)
    train, held_out = halves(rows, tokenizer)
    more_train, more_held_out = halves([*pairs(80, 120), *rows[::-1]], tokenizer)
    assert prompts_of(train, tokenizer) < prompts_of(more_train, tokenizer)
    assert prompts_of(held_out, tokenizer) < prompts_of(more_held_out, tokenizer)
    completions = [{"prompt": r["prompt"] + " \n", "completion": "so"} for r in rows]
    sft, sft_held_out = halves(completions, tokenizer, prepare_completions)
    trimmed = [{p.strip() for p in prompts_of(d, tokenizer)} for d in (sft, sft_held_out)]
    assert trimmed == [prompts_of(train, tokenizer), prompts_of(held_out, tokenizer)]
    other_seed = halves(rows, tokenizer, seed=1)[1]
    assert prompts_of(other_seed, tokenizer) != prompts_of(held_out, tokenizer)


def test_messages_and_text_of_one_prompt_are_one_prompt(chat_tokenizer):
    texts = pairs(60)
    chats = [
        {
            "prompt": [
                {"role": "system", "content": "be good"},
                {"role": "user", "content": r["prompt"]},
            ],
            **{
                side: [{"role": "assistant", "content": r[side]}] for side in ("chosen", "rejected")
            },
        }
        for r in texts
    ]
    numbers = [
        [int(o.rpartition(":")[2]) for o in halves(rows, chat_tokenizer)[1].dataset["origin"]]
        for rows in (texts, chats)
    ]
    assert numbers[0] == numbers[1] != []


def test_refused_rows_are_the_training_sides(tokenizer):
    rows = [*pairs(50), {"prompt": "x"}, {"prompt": "y", "chosen": 3, "rejected": "b"}]
    train, held_out = halves(rows, tokenizer)
    assert len(train.report.defects) == 2
    assert not held_out.report.defects
    assert train.report.rows_read + held_out.report.rows_read == 52


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_share_that_leaves_a_side_empty_is_an_error(tokenizer, num):
    with pytest.raises(TokenRatioError, match=f"holds out 0 of {num} prompts"):
        halves(pairs(num), tokenizer, share=0.001)


def test_a_sample_is_drawn_by_content_and_seed(tokenizer):
    rows = pairs(100)

    def drawn(rows, num=10, seed=0):
        selection = Selection(max_samples=num, seed=seed)
        data = prepare_pairs(rows, tokenizer, **LIMITS, selection=selection)
        return data, {tokenizer.decode(ids) for ids in data.dataset["chosen_ids"]}

    data, chosen = drawn(rows)
    assert len(chosen) == 10
    assert chosen != {tokenizer.decode(ids) for ids in drawn(rows[:10])[0].dataset["chosen_ids"]}
    assert drawn(rows[::-1])[1] == chosen
    assert drawn(rows, seed=1)[1] != chosen
    assert chosen < drawn(rows, num=40)[1]
    assert "10 of 100 rows drawn (max_samples, seed 0)" in data.report.summary()
    origins = [int(origin.rpartition(":")[2]) for origin in data.dataset["origin"]]
    assert origins == sorted(origins)
    assert drawn(rows, num=100)[0].report.selection == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_samples": 0}, "max_samples must be at least 1"),
        ({"held_out_share": 0.0}, "between 0 and 1"),
        ({"held_out_share": 5}, "between 0 and 1"),
    ],
)
def test_selections_that_cannot_be(settings, message):
    with pytest.raises(TokenRatioError, match=message):
        Selection(**settings)


def test_several_sources_with_weights(tmp_path, tokenizer):
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "train.jsonl", [*pairs(8), {"prompt": "x"}])
    write(tmp_path / "b" / "train.jsonl", pairs(20, 100))
    sources = [first, {"path": f"{tmp_path}/b", "split": "train", "weight": 0.5}]
    sources.append(DataSource(pairs(3, 200), weight=2.5))
    data = prepare_pairs(sources, tokenizer, **LIMITS)
    origins = list(data.dataset["origin"])
    assert origins[0] == f"{first}:1"
    assert f"{tmp_path}/b/train.jsonl:" in origins[8]
    by_source = [
        sum(origin.startswith(start) for origin in origins)
        for start in (first, f"{tmp_path}/b/", "train_dataset 3:")
    ]
    assert by_source == [8, 10, 8]  # three rows twice, and two of them once more
    assert list(data.dataset["row"]) == list(range(26))
    said = data.report.summary()
    assert f"{first}: 9 rows, 8 kept\n" in said
    assert f"{tmp_path}/b: 20 rows of split train, 10 drawn, 10 kept (weight 0.5)\n" in said
    assert "train_dataset 3: 3 rows, 3 kept, used as 8 (weight 2.5)\n" in said
    assert "22 rows read, 21 kept, 1 refused" in said
    assert not data.report.warnings  # rows repeated on purpose are no duplicates
    assert source_name(sources) == f"{first}, {tmp_path}/b@train, a list"
    assert [s["uses"] for s in data.report.to_dict()["sources"]] == [8, 10, 8]


def test_weights_sample_and_held_out_share_go_together(tmp_path, tokenizer):
    first = write(tmp_path / "a.jsonl", pairs(60))
    sources = [{"path": first, "weight": 2}, write(tmp_path / "b.jsonl", pairs(60, 30))]
    selection = {"held_out_share": 0.3, "max_samples": 50}
    train = prepare_pairs(sources, tokenizer, **LIMITS, selection=Selection(**selection))
    held_out = prepare_pairs(
        sources, tokenizer, **LIMITS, selection=Selection(held_out_share=0.3, part="held_out")
    )
    assert len(train.dataset) == 50
    assert not prompts_of(train, tokenizer) & prompts_of(held_out, tokenizer)
    # Evaluation counts each row once.
    assert len(set(held_out.dataset["origin"])) == len(held_out.dataset)


def test_whole_sources_are_read_in_order(tmp_path):
    write(tmp_path / "a.jsonl", pairs(2))
    data = datasets.Dataset.from_list(pairs(2, 10))
    rows = read_rows([tmp_path / "a.jsonl", data, pairs(1, 20)])
    assert [row.fields["chosen"] for row in rows] == [
        "good 0",
        "good 1",
        "good 10",
        "good 11",
        "good 20",
    ]
    assert rows[-1].origin == "train_dataset 3:0"
    # A list of rows stays one, whatever its rows hold.
    assert read_rows([{"path": "a", "chosen": "b"}])[0].fields == {"path": "a", "chosen": "b"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a.jsonl", "a.jsonl"], "listed twice"),
        (["a.jsonl", "gone.jsonl"], r"gone\.jsonl: no such file"),
        ([{"path": "a.jsonl", "weight": 0}], "weight of a.jsonl must be a positive number"),
        ([{"path": "a.jsonl", "weight": "half"}], "positive number, not 'half'"),
        ({"path": "a.jsonl", "fraction": 0.5}, "it has fraction"),
        ({"split": "train"}, "it has no path"),
        ([{"path": "a.jsonl", "config": "b"}], "config 'b' applies only to a Hub name"),
        ([], "no rows"),
    ],
)
def test_lists_of_sources_that_cannot_be_read(tmp_path, monkeypatch, tokenizer, source, message):
    write(tmp_path / "a.jsonl", pairs(2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenRatioError, match=message):
        prepare_pairs(source, tokenizer, **LIMITS)
