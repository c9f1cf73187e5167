"""Conversations as text, and what Arrow adds to them."""

import json

import datasets
import pandas as pd
import pytest

from single_row import parse_preference
from tokenratio.data import (
    PreferenceExample,
    WarningKind,
    check_text,
    prepare_pairs,
    read_rows,
)
from tokenratio.data.defects import DefectKind
from tokenratio.data.formats import DataParser
from tokenratio.data.prompts import read_prompts


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


PAIRS = [
    {
        "prompt": [user(f'It\'s "{n}"\nor {{not}}?')],
        "chosen": [bot("it's so\n}\n {")],
        "rejected": [bot('no "way"')],
    }
    for n in range(3)
]


def parsed(rows):
    parser = DataParser([rows], PreferenceExample)
    return [
        {side: getattr(parser.parse(row), side) for side in ("prompt", "chosen", "rejected")}
        for row in rows
    ]


def json_csv(path):
    pd.DataFrame([{k: json.dumps(v) for k, v in row.items()} for row in PAIRS]).to_csv(
        path, index=False
    )


def pandas_csv(path):
    pd.DataFrame(PAIRS).to_csv(path, index=False)


def datasets_csv(path):
    """Two turns, between which NumPy writes no comma."""
    rows = [{**row, "prompt": [user("Hi"), bot("Yes?"), *row["prompt"]]} for row in PAIRS]
    datasets.Dataset.from_list(rows).to_csv(path)


@pytest.mark.parametrize(("write", "earlier"), [(json_csv, 0), (pandas_csv, 0), (datasets_csv, 2)])
def test_messages_in_csv(write, earlier, tmp_path):
    path = tmp_path / "rows.csv"
    write(path)
    found = parsed(read_rows(path))
    assert [{**row, "prompt": row["prompt"][earlier:]} for row in found] == PAIRS
    assert [p.messages[earlier:] for _, p in read_prompts(path)] == [r["prompt"] for r in PAIRS]


def test_whole_conversations_as_json_text():
    rows = [
        {side: json.dumps(row["prompt"] + row[side]) for side in ("chosen", "rejected")}
        for row in PAIRS
    ]
    assert parsed(read_rows(rows)) == PAIRS


def test_messages_as_json_text_in_some_columns_only():
    rows = [{**row, "prompt": json.dumps(row["prompt"])} for row in PAIRS]
    assert parsed(read_rows(rows)) == PAIRS
    one = [{**row, "chosen": json.dumps(row["chosen"][0])} for row in PAIRS]
    assert parsed(read_rows(one)) == PAIRS


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "Ada"}]',
        '{"role": 3}',
        "[sic] no list",
        '["role", "content"]',
        "[]",
        "{'a': 1}",
        "[" * 10_000,
        "{'a': (",
    ],
)
def test_text_that_only_looks_like_data_stays_text(text):
    row = {"prompt": "p", "chosen": text, "rejected": "b"}
    assert parse_preference(read_rows([row])[0]).chosen == text


def test_a_few_answers_that_are_messages_stay_text_and_are_counted():
    text = json.dumps([user("a")])
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    rows[1]["chosen"] = text
    report = check_text(read_rows(rows))
    assert report.warning_counts == {WarningKind.MESSAGES_AS_TEXT: 1}
    assert parsed(read_rows(rows))[1]["chosen"] == text


def test_messages_that_are_cut_off_are_refused():
    rows = [{k: json.dumps(v) for k, v in row.items()} for row in PAIRS]
    rows[1]["chosen"] = rows[1]["chosen"][:-3]
    report = check_text(read_rows(rows))
    assert report.defect_counts == {DefectKind.MALFORMED_ROW: 1}
    assert "chosen holds messages as JSON text in most rows" in report.summary()


def tool(name, **types):
    properties = {key: {"type": kind} for key, kind in types.items()}
    function = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return [{"type": "function", "function": function}]


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


TOOL_ROWS = [
    {
        "prompt": [user("Weather in Oslo?")],
        "chosen": [call("weather", town="Oslo")],
        "rejected": [call("weather", town="Lima")],
        "tools": tool("weather", town="string"),
        "chat_template_kwargs": {"tone": "calm"},
    },
    {
        "prompt": [user("Add."), call("add", a=2, b=3), {"role": "tool", "content": "5"}],
        "chosen": [bot("It is 5.")],
        "rejected": [bot("6")],
        "tools": tool("add", a="number", b="number"),
        "chat_template_kwargs": {"deep": {"x": 1}},
    },
    {
        "prompt": [user("Now?")],
        "chosen": [call("clock")],
        "rejected": [bot("No.")],
        "tools": tool("clock"),
        "chat_template_kwargs": {"deep": {"y": [1, 2]}},
    },
]


def examples(rows):
    parser = DataParser([rows], PreferenceExample)
    return [
        (e.prompt, e.chosen, e.rejected, e.tools, e.template_kwargs)
        for e in map(parser.parse, rows)
    ]


def test_nulls_that_arrow_fills_in_go_at_every_depth(tmp_path, chat_tokenizer):
    data = datasets.Dataset.from_list(TOOL_ROWS)
    # Arrow did fill them in, or this tests nothing.
    assert data[0]["tools"][0]["function"]["parameters"]["properties"]["a"] is None
    data.to_parquet(tmp_path / "rows.parquet")
    lines = "\n".join(map(json.dumps, TOOL_ROWS))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    data.save_to_disk(tmp_path / "saved")
    expected = examples(read_rows(tmp_path / "rows.jsonl"))
    assert expected == [
        (r["prompt"], r["chosen"], r["rejected"], r["tools"], r["chat_template_kwargs"])
        for r in TOOL_ROWS
    ]
    for source in (tmp_path / "rows.parquet", data, tmp_path / "saved"):
        assert examples(read_rows(source)) == expected


def test_ids_from_arrow_are_those_from_json_lines(make_tokenizer):
    template = (
        "{{ tools | tojson }}\n{% for m in messages %}{{ m['role'] }}:{{ m.get('content') or '' }}"
        "{% for c in m.get('tool_calls') or [] %}{{ c | tojson }}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    limits = {"max_length": None, "max_prompt_length": None}
    data = datasets.Dataset.from_list(TOOL_ROWS)
    one, other = (prepare_pairs(s, tokenizer, **limits) for s in (data, TOOL_ROWS))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [one.dataset[n][:] for n in names] == [other.dataset[n][:] for n in names]
    assert "null" not in tokenizer.decode(one.dataset[0]["chosen_ids"])


def test_a_null_that_somebody_wrote_stays():
    arguments = {"town": None, "days": [1, None]}
    row = {**TOOL_ROWS[0], "chosen": [call("weather", **arguments)]}
    row["tools"][0]["function"]["parameters"]["properties"]["town"]["enum"] = ["Oslo", None]
    ((_, chosen, _, tools, _),) = examples(read_rows([row]))
    assert chosen[0]["tool_calls"][0]["function"]["arguments"] == arguments
    as_text = {**row, "tools": json.dumps(row["tools"]), "chosen": json.dumps(row["chosen"])}
    ((_, from_arrow, _, tools_from_arrow, _),) = examples(
        read_rows(datasets.Dataset.from_list([as_text]))
    )
    assert (from_arrow, tools_from_arrow) == (chosen, tools)
