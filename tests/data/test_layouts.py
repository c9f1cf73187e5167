"""Every layout of the registry, in rows as public data sets have them."""

import csv
import json
from pathlib import Path

import datasets
import pytest

from single_row import parse_completion, parse_preference
from tokenratio.data import (
    CompletionExample,
    PreferenceExample,
    check_text,
    inspect_source,
    prepare_completions,
    prepare_pairs,
    read_rows,
)
from tokenratio.data.columns import COLUMN_NAMES
from tokenratio.data.defects import DefectKind, DefectLog, RowDefectError, WarningKind
from tokenratio.data.formats import DataParser
from tokenratio.data.layouts import BENCHMARK_TURNS, COMPLETIONS, PAIRS, PROMPTS
from tokenratio.data.prompts import read_prompts
from tokenratio.data.validation import parse_rows
from tokenratio.errors import TokenRatioError

ROOT = Path(__file__).resolve().parents[2]


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def markdown_tables():
    """The tables of docs/data.md."""
    titles = {"prompt": "Prompt", "pair": "Pair", "completion": "Response (for `sft`)"}
    parts = []
    for layouts in ((*PROMPTS, BENCHMARK_TURNS), PAIRS, COMPLETIONS):
        lines = [f"| {titles[layouts[0].use]} | | seen in |", "|---|---|---|"]
        for layout in layouts:
            columns = ", ".join(f"`{name}`" for name in layout.needs)
            columns += "".join(f" (+ `{name}`)" for name in layout.also)
            lines.append(f"| {columns} | {layout.note} | {layout.seen_in} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def parse(rows, wanted, columns=None):
    rows = read_rows(list(rows))
    return parse_rows(rows, DataParser([rows], wanted, columns), DefectLog("skip"))


def asked_of(rows, columns=None):
    """The prompts that generation asks, tools left aside."""
    prompts = [prompt for _, prompt in read_prompts(rows, columns=columns)]
    return [p if isinstance(p, str) else p.messages for p in prompts]


def pairs_of(*rows, columns=None):
    """`(prompt, chosen, rejected)` of each row kept."""
    parsed = parse(rows, PreferenceExample, columns)
    return [(e.prompt, e.chosen, e.rejected) for e in parsed.examples]


def completions_of(*rows, columns=None):
    return [(e.prompt, e.completion) for e in parse(rows, CompletionExample, columns).examples]


def test_the_documented_tables_are_the_codes():
    """docs/data.md holds what `markdown_tables()` returns."""
    assert markdown_tables() in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


TEXT = ("Sky?", "Blue.", "Green.")
CHAT = ([user("Sky?")], [bot("Blue.")], [bot("Green.")])
BRIEF = ([system("Be brief."), user("Sky?")], *CHAT[1:])
EARLIER = [user("Hi"), bot("Hello")]
ANSWERS = {"chosen": "Blue.", "rejected": "Green."}

# One row or more for every layout of the registry, and what it holds.
PAIR_ROWS = {
    "TRL": ({"prompt": "Sky?", **ANSWERS}, TEXT),
    "orca": (
        {"system": "Be brief.", "question": "Sky?", "chosen": "Blue.", "rejected": "Green."},
        BRIEF,
    ),
    "orca without a system prompt": ({"system": "", "question": "Sky?", **ANSWERS}, CHAT),
    "Axolotl's prompt_pairs": ({"system": "Be brief.", "prompt": "Sky?", **ANSWERS}, BRIEF),
    "question alone": ({"question": "Sky?", **ANSWERS}, TEXT),
    "Alpaca": ({"instruction": "Sky?", "input": "", **ANSWERS}, TEXT),
    "Alpaca with an input": (
        {"instruction": "Which colour?", "input": "The sky.", **ANSWERS},
        ("Which colour?\nThe sky.", "Blue.", "Green."),
    ),
    "LLaMA-Factory, alpaca": (
        {
            "instruction": "Sky?",
            "input": "",
            **ANSWERS,
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        },
        ([system("Be brief."), *EARLIER, user("Sky?")], *CHAT[1:]),
    ),
    "LLaMA-Factory, sharegpt": (
        {
            "conversations": [human("Hi"), gpt("Hello"), human("Sky?")],
            "chosen": gpt("Blue."),
            "rejected": gpt("Green."),
            "system": "Be brief.",
        },
        ([system("Be brief."), *EARLIER, user("Sky?")], *CHAT[1:]),
    ),
    "Axolotl's chatml.ultra": (
        {
            "prompt": "Sky?",
            "chosen": [user("Sky?"), bot("Blue.")],
            "rejected": [user("Sky?"), bot("Green.")],
        },
        CHAT,
    ),
    "Axolotl's chat_template": (
        {"messages": [user("Sky?")], "chosen": bot("Blue."), "rejected": bot("Green.")},
        CHAT,
    ),
    "messages that end in the answer": (
        {
            "messages": [user("Sky?"), bot("Blue.")],
            "chosen": [bot("Blue.")],
            "rejected": bot("Green."),
        },
        CHAT,
    ),
    "argilla": (
        {"instruction": "Sky?", "chosen_response": "Blue.", "rejected_response": "Green."},
        TEXT,
    ),
    "distilabel, binarized": (
        {
            "system": "Be brief.",
            "input": "Sky?",
            **ANSWERS,
            "generations": ["Green.", "Blue."],
            "order": ["rejected", "chosen"],
            "rating": [1, 9],
        },
        BRIEF,
    ),
    "distilabel, ordered": (
        {"input": "Sky?", "generations": ["Green.", "Blue."], "order": ["rejected", "chosen"]},
        TEXT,
    ),
    "distilabel, ratings": (
        {"instruction": "Sky?", "generations": ["Grey.", "Blue.", "Green."], "ratings": [3, 5, 1]},
        TEXT,
    ),
    "distilabel, rating": (
        {"instruction": "Sky?", "generations": ["Green.", "Blue."], "rating": ["1", "4.5"]},
        TEXT,
    ),
    "scores": (
        {"query": "Sky?", "generations": ["Green.", None, "Blue."], "scores": [-2, 9, 0.5]},
        TEXT,
    ),
    "ms-swift, query": (
        {"query": "Sky?", "response": "Blue.", "rejected_response": "Green."},
        TEXT,
    ),
    "ms-swift, messages": (
        {"messages": [user("Sky?"), bot("Blue.")], "rejected_response": "Green."},
        CHAT,
    ),
    "ms-swift, two conversations": (
        {
            "messages": [system("Be brief."), user("Sky?"), bot("Blue.")],
            "rejected_messages": [system("Be brief."), user("Sky?"), bot("Green.")],
        },
        BRIEF,
    ),
    "OpenAI": (
        {
            "input": {"messages": [user("Sky?")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [bot("Blue.")],
            "non_preferred_output": [bot("Green.")],
        },
        CHAT,
    ),
    "stack exchange": ({"question": "Sky?", "response_j": "Blue.", "response_k": "Green."}, TEXT),
    "Nectar": (
        {
            "prompt": "Sky?",
            "answers": [
                {"answer": "Grey.", "rank": 2.0, "model": "a"},
                {"answer": "Green.", "rank": 7.0, "model": "b"},
                {"answer": "Blue.", "rank": 1.0, "model": "c"},
            ],
            "num_responses": 3,
        },
        TEXT,
    ),
    "UltraFeedback": (
        {
            "instruction": "Sky?",
            "completions": [
                {"response": "Green.", "overall_score": 2.5, "model": "a"},
                {"response": "Blue.", "overall_score": 8.0, "model": "b"},
                {"response": "Grey.", "overall_score": 4.0, "model": "c"},
            ],
        },
        TEXT,
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "Sky?",
            "response_0": "Green.",
            "response_1": "Blue.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        TEXT,
    ),
    "PKU-SafeRLHF, safety alone": (
        {"prompt": "Sky?", "response_0": "Blue.", "response_1": "Green.", "safer_response_id": 0},
        TEXT,
    ),
    "SHP": (
        {"history": "Sky?", "human_ref_A": "Green.", "human_ref_B": "Blue.", "labels": 0},
        TEXT,
    ),
    "HelpSteer2": (
        {
            "prompt": "Sky?",
            "response_1": "Blue.",
            "response_2": "Green.",
            "preference_strength": -2,
        },
        TEXT,
    ),
    "HelpSteer3": (
        {
            "context": [user("Sky?")],
            "response1": "Green.",
            "response2": "Blue.",
            "overall_preference": 3,
        },
        CHAT,
    ),
    "arena": (
        {
            "conversation_a": [user("Sky?"), bot("Green.")],
            "conversation_b": [user("Sky?"), bot("Blue.")],
            "winner": "model_b",
        },
        CHAT,
    ),
    "arena, texts": (
        {"prompt": "Sky?", "response_a": "Blue.", "response_b": "Green.", "winner": "model_a"},
        TEXT,
    ),
    "conversations alone": (
        {"chosen": [user("Sky?"), bot("Blue.")], "rejected": [user("Sky?"), bot("Green.")]},
        CHAT,
    ),
    "conversations beside what they hold": (
        {
            "question": "Sky?",
            "system": "Be brief.",
            "chosen": [system("Be brief."), user("Sky?"), bot("Blue.")],
            "rejected": [system("Be brief."), user("Sky?"), bot("Green.")],
        },
        BRIEF,
    ),
    "a conversation as prompt beside texts": ({"prompt": [user("Sky?")], **ANSWERS}, CHAT),
    "lmsys' column": ({"conversation": [user("Sky?")], **ANSWERS}, CHAT),
}


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_pairs(name):
    fields, expected = PAIR_ROWS[name]
    assert pairs_of(fields) == [expected]
    (example,) = [parse_preference(row) for row in read_rows([fields])]
    assert (example.prompt, example.chosen, example.rejected) == expected


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_generation_asks_the_prompt_of_training(name):
    fields, (prompt, *_) = PAIR_ROWS[name]
    assert asked_of([fields]) == [prompt]


def test_a_row_that_cannot_be_trained_on_has_a_prompt_like_the_others():
    def rows(answers):
        return [{"prompt": f"Sky {n}?", "chosen": a, "rejected": a} for n, a in enumerate(answers)]

    chats = rows([[bot("Blue.")], [bot("Blue.")]])
    chats[0]["rejected"] = [bot("Green.")]
    chats[1]["chosen"] = None
    assert asked_of(chats) == [[user("Sky 0?")], [user("Sky 1?")]]
    assert asked_of(rows(["", " "])) == ["Sky 0?", "Sky 1?"]
    kto = [{"prompt": f"Sky {n}?", "completion": "Blue.", "label": n == 0} for n in range(2)]
    assert asked_of(kto) == ["Sky 0?", "Sky 1?"]
    with pytest.raises(TokenRatioError, match="train_dataset:0: no prompt column; it has chosen"):
        read_prompts([{"chosen": "Yes.", "rejected": "No."}])


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_the_chosen_side_is_learnt_of_every_layout(name):
    fields, (prompt, chosen, _) = PAIR_ROWS[name]
    assert completions_of(fields) == [(prompt, chosen)]


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_the_same_layouts_in_parquet_and_json_text(name, tmp_path):
    fields, expected = PAIR_ROWS[name]
    path = tmp_path / "rows.parquet"
    other = {**fields, "more": {"a": 1}}
    datasets.Dataset.from_list([fields, other]).to_parquet(path)
    assert pairs_of(*[row.fields for row in read_rows(path)])[0] == expected
    as_text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, as_text)
        writer.writeheader()
        writer.writerow(as_text)
    rows = read_rows(tmp_path / "rows.csv")
    assert pairs_of(*[row.fields for row in rows]) == [expected]


def test_every_pair_and_prompt_of_the_registry_is_tried():
    there = [set(fields) for fields, _ in PAIR_ROWS.values()]
    for layout in (*PAIRS, *PROMPTS):
        assert any(layout.fits(columns) for columns in there), layout.needs
    tried = [set(fields) for fields, *_ in COMPLETION_ROWS.values()]
    for layout in COMPLETIONS:
        assert any(layout.fits(columns) for columns in tried), layout.needs


COMPLETION_ROWS = {
    "TRL": ({"prompt": "Sky?", "completion": "Blue."}, "Sky?", "Blue."),
    "messages": ({"messages": [user("Sky?"), bot("Blue.")]}, [user("Sky?")], [bot("Blue.")]),
    "text": ({"text": "All of it."}, "", "All of it."),
    "chosen": ({"prompt": "Sky?", "chosen": "Blue."}, "Sky?", "Blue."),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."}, human("Sky?"), gpt("Blue.")]},
        [system("Be brief."), user("Sky?")],
        [bot("Blue.")],
    ),
    "ShareGPT with a system column": (
        {"conversations": [human("Sky?"), gpt("Blue.")], "system": "Be brief."},
        [system("Be brief."), user("Sky?")],
        [bot("Blue.")],
    ),
    "Capybara": (
        {
            "conversation": [
                {"input": "Hi", "output": "Hello"},
                {"input": "Sky?", "output": "Blue."},
            ]
        },
        [*EARLIER, user("Sky?")],
        [bot("Blue.")],
    ),
    "Alpaca": (
        {"instruction": "Which?", "input": "The sky.", "output": "Blue."},
        "Which?\nThe sky.",
        "Blue.",
    ),
    "OpenOrca": (
        {"system_prompt": "Be brief.", "question": "Sky?", "response": "Blue."},
        [system("Be brief."), user("Sky?")],
        [bot("Blue.")],
    ),
    "question and answer": ({"question": "Sky?", "answer": "Blue."}, "Sky?", "Blue."),
    "ms-swift": (
        {"query": "Sky?", "response": "Blue.", "history": [["Hi", "Hello"]]},
        [*EARLIER, user("Sky?")],
        [bot("Blue.")],
    ),
}


@pytest.mark.parametrize("name", COMPLETION_ROWS)
def test_completions(name):
    fields, prompt, completion = COMPLETION_ROWS[name]
    assert completions_of(fields) == [(prompt, completion)]
    example = parse_completion(read_rows([fields])[0])
    assert (example.prompt, example.completion) == (prompt, completion)
    if prompt:
        assert asked_of([fields]) == [prompt]


def test_roles_and_calls_of_sharegpt():
    call = {"name": "weather", "arguments": {"town": "Oslo"}}
    turns = [
        human("Weather?"),
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "snow"},
    ]
    ((prompt, chosen, _),) = pairs_of(
        {"conversations": turns, "chosen": gpt("Snow."), "rejected": gpt("Sun."), "tools": "[]"}
    )
    calls = [{"type": "function", "function": call}]
    assert prompt[1:] == [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "snow"},
    ]
    assert chosen == [bot("Snow.")]
    turns[1]["value"] = "weather(Oslo)"
    with pytest.raises(RowDefectError, match="message 2 of prompt is a tool call, but not JSON"):
        parse_preference(read_rows([{"conversations": turns, **ANSWERS}])[0])


@pytest.mark.parametrize(
    "as_value", [dict, json.dumps, lambda value: json.dumps(json.dumps(value))]
)
def test_messages_with_tools_in_one_object(as_value):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    sides = {
        side: as_value({"messages": [user("Sky?"), bot(answer)], "tools": tools})
        for side, answer in (("chosen", "Blue."), ("rejected", "Green."))
    }
    pair = parse_preference(read_rows([sides])[0])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.tools) == (
        [user("Sky?")],
        [bot("Blue.")],
        [bot("Green.")],
        tools,
    )
    learnt = parse_completion(read_rows([{"messages": sides["chosen"]}])[0])
    assert (learnt.completion, learnt.tools) == ([bot("Blue.")], tools)


@pytest.mark.parametrize(
    "names",
    [
        ("role", "content", "System", "User", "Assistant"),
        ("from", "value", "SYSTEM", "Human", "GPT"),
        ("role", "value", "system", "user", "assistant"),
        ("from", "content", "system", "user", "Model"),
    ],
)
def test_names_of_roles_and_keys(names):
    role, content, *roles = names
    chosen, rejected = (
        [
            {role: name, content: text}
            for name, text in zip(roles, ("Be brief.", "Sky?", answer), strict=True)
        ]
        for answer in ("Blue.", "Green.")
    )
    pair = parse_preference(read_rows([{"chosen": chosen, "rejected": rejected}])[0])
    assert pair.prompt == [system("Be brief."), user("Sky?")]
    assert (pair.chosen, pair.rejected) == ([bot("Blue.")], [bot("Green.")])


@pytest.mark.parametrize("prompt", ["More?", "Sky? More?", "user: Sky?\nbot: Yes.\nuser: More?"])
def test_a_prompt_that_is_the_conversation_as_text(prompt):
    turns = [user("Sky?"), bot("Yes."), user("More?")]
    row = {"prompt": prompt, "chosen": [*turns, bot("Blue.")], "rejected": [*turns, bot("Green.")]}
    assert parse_preference(read_rows([row])[0]).prompt == turns
    row = {"prompt": prompt, "chosen": [system("s"), bot("a")], "rejected": [system("s"), bot("b")]}
    with pytest.raises(RowDefectError, match="not a user turn of"):
        parse_preference(read_rows([row])[0])


@pytest.mark.parametrize("empty", [None, float("nan"), ""])
def test_an_optional_column_without_a_value(empty):
    rows = [
        {"instruction": "Sky?", "chosen": f"Blue {n}.", "rejected": "Green.", **more}
        for n, more in enumerate(
            (
                {"input": "Now.", "system": "Be brief.", "history": [["a", "b"]]},
                {"input": empty, "system": empty, "history": empty},
            )
        )
    ]
    found = pairs_of(*rows)
    assert found[0][0] == [system("Be brief."), user("a"), bot("b"), user("Sky?\nNow.")]
    assert found[1][0] == [user("Sky?")]
    labels = [True, False, empty, False, True]
    rows = [{"prompt": "p", "completion": f"{n}", "label": x} for n, x in enumerate(labels)]
    assert [found.completion for found in parse(rows, CompletionExample).examples] == ["0", "4"]


def test_contents_in_parts():
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    ((prompt, chosen, _),) = pairs_of(
        {
            "prompt": [{"role": "user", "content": parts("Sk", "y?")}],
            "chosen": [{"role": "assistant", "content": parts("Blue.")}],
            "rejected": [bot("Green.")],
        }
    )
    assert (prompt, chosen) == ([user("Sky?")], [bot("Blue.")])
    image = [{"role": "user", "content": [{"type": "image"}, *parts("Sky?")]}]
    with pytest.raises(RowDefectError, match="part of type 'image'; only text"):
        parse_preference(read_rows([{"prompt": image, **ANSWERS}])[0])


K = DefectKind


@pytest.mark.parametrize(
    ("fields", "kind", "detail"),
    [
        (
            {"question": "Sky?", "context": "It is day.", **ANSWERS},
            K.AMBIGUOUS_PROMPT,
            r"question and context could each hold the prompt; .*\{prompt: \[question, context\]\}",
        ),
        (
            {"query": "Sky?", "instruction": "Say.", **ANSWERS},
            K.AMBIGUOUS_PROMPT,
            "instruction and query",
        ),
        ({"question": None, **ANSWERS}, K.NON_STRING_FIELD, "prompt is null"),
        ({"prompt": "Sky?", "system": ["a"], **ANSWERS}, K.NON_STRING_FIELD, "system is a list"),
        ({"prompt": "Sky?", "history": "Hi", **ANSWERS}, K.NON_STRING_FIELD, "history is a string"),
        (
            {"prompt": "Sky?", "history": [["Hi"]], **ANSWERS},
            K.BAD_CONVERSATION,
            r"not \[question, answer\]",
        ),
        (
            {"prompt": [system("Sing."), user("Sky?")], "system": "Be brief.", **ANSWERS},
            K.BAD_CONVERSATION,
            "system turn of the conversation differ",
        ),
        (
            {"prompt": "Sky?", "completion": "Blue.", "label": True},
            K.MISSING_COLUMN,
            "unpaired rows with a label are only for loss: sft",
        ),
        (
            {"prompt": "p", "generations": ["a", "b"], "ratings": [2, 2]},
            K.NO_PREFERENCE,
            "all responses have the same ratings",
        ),
        (
            {"prompt": "p", "generations": ["a", "b"], "order": ["tie", "tie"]},
            K.NO_PREFERENCE,
            "order is tie, tie",
        ),
        (
            {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"},
            K.NO_PREFERENCE,
            "winner is 'tie'",
        ),
        (
            {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 0},
            K.NO_PREFERENCE,
            "preference_strength is 0",
        ),
        ({"prompt": "p", "answers": ["a", "b"]}, K.NON_STRING_FIELD, "a list of {answer, rank}"),
        (
            {"prompt": "p", "answers": [{"answer": "a", "rank": 1}]},
            K.NO_PREFERENCE,
            "fewer than two",
        ),
    ],
)
def test_refused(fields, kind, detail):
    with pytest.raises(RowDefectError, match=detail) as caught:
        parse_preference(read_rows([fields])[0])
    assert caught.value.kind == kind


def test_a_system_column_makes_a_conversation_of_every_row(chat_tokenizer, tokenizer):
    rows = [{"system": s, "question": "the sky", **ANSWERS} for s in ("be good", "", None)]
    prompts = [prompt for prompt, *_ in pairs_of(*rows)]
    assert prompts == [[system("be good"), user("the sky")], [user("the sky")], [user("the sky")]]
    assert asked_of(rows) == prompts
    limits = {"max_length": None, "max_prompt_length": None}
    data = prepare_pairs(rows, chat_tokenizer, **limits)
    assert "system\nbe good" in chat_tokenizer.decode(data.dataset[0]["prompt_ids"])
    with pytest.raises(TokenRatioError, match=r"no chat template: .*without system, history"):
        prepare_pairs(rows, tokenizer, **limits)
    plain = prepare_pairs(rows, tokenizer, **limits, columns={"system": None})
    assert tokenizer.decode(plain.dataset[0]["prompt_ids"]) == "the sky"
    assert plain.report.reading.unread == {"system": 2}


def test_rows_of_several_layouts_are_counted():
    rows = [{"question": "Sky?", **ANSWERS}] * 2 + [{"instruction": "Say.", **ANSWERS, "id": 7}]
    report = check_text(read_rows(rows))
    assert report.rows_kept == 3
    assert report.summary().split("\n")[1:4] == [
        "  layout: prompt from question; pair from chosen, rejected (2 rows)",
        "  layout: prompt from instruction (and input on a new line); pair from chosen, rejected "
        "(1 row)",
        "  columns not read: id (1 row)",
    ]
    record = json.loads(json.dumps(report.to_dict()))
    assert record["columns_not_read"] == {"id": 1}
    assert list(record["layouts"].values()) == [2, 1]


def test_what_is_not_read_is_listed(chat_tokenizer):
    rows = [
        {"prompt": "a", "chosen": "good", "rejected": "bad", "score_chosen": n, "source": s}
        for n, s in enumerate(["x", None, "z"])
    ]
    shown = inspect_source(rows, chat_tokenizer, num_rows=0)
    assert "  columns not read: score_chosen, source (2 rows)\n" in shown
    assert "not read" not in inspect_source([{**ANSWERS, "prompt": "a", "tools": None}])


def test_columns_map_any_other_layout():
    row = {"ask": "Sky?", "good": "Blue.", "bad": "Green.", "sys": "Be brief.", "prompt": "other"}
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "sys"}
    assert pairs_of(row, columns=columns) == [BRIEF]
    assert asked_of([row], columns) == [BRIEF[0]]
    report = check_text(read_rows([row]), columns=columns)
    assert report.reading.unread == {"prompt": 1}
    assert list(report.reading.layouts) == ["prompt from ask, with system; pair from good, bad"]
    assert completions_of(row, columns={"prompt": "ask", "completion": "good"}) == [
        ("Sky?", "Blue.")
    ]
    joined = {**row, "passage": "It is day."}
    assert pairs_of(joined, columns={**columns, "prompt": ["passage", "ask"], "system": None}) == [
        ("It is day.\n\nSky?", "Blue.", "Green.")
    ]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "asks"}, "train_dataset has no column 'asks' .for prompt.; it has ask, chosen"),
        ({"question": "ask"}, f"'question' cannot be mapped; known: {', '.join(COLUMN_NAMES)}"),
        ({"chosen": ["ask", "chosen"]}, "chosen must be the name of a column or null"),
        ({"prompt": 3}, "prompt must be the name of a column"),
    ],
)
def test_columns_that_are_not_there(columns, said):
    with pytest.raises(TokenRatioError, match=said):
        check_text(read_rows([{"ask": "Sky?", **ANSWERS}]), columns=columns)


@pytest.mark.parametrize(
    ("good", "bad"),
    [(True, False), ("True", "False"), (1, 0), ("good", "bad"), ("desirable", "undesirable")],
)
def test_what_is_labelled_bad_is_not_learnt(good, bad):
    rows = [{"prompt": "Sky?", "completion": str(v), "label": v} for v in (good, bad, good)]
    report = check_text(read_rows(rows), preference=False)
    assert report.defect_counts == {K.LABELLED_BAD: 1}
    assert report.reading.unread == {}
    assert [completion for _, completion in completions_of(*rows)] == [str(good)] * 2
    kept = check_text(read_rows(rows), preference=False, columns={"label": None})
    assert (kept.rows_kept, kept.reading.unread) == (3, {"label": 3})
    turns = [{"messages": [user("Sky?"), bot(str(v))], "kto_tag": v} for v in (good, bad)]
    assert len(completions_of(*turns)) == 1


def test_a_label_that_is_neither_good_nor_bad_is_not_learnt():
    labels = [*["good"] * 6, *["bad"] * 6, "unsure"]
    rows = [{"prompt": "p", "completion": f"{n}", "label": x} for n, x in enumerate(labels)]
    report = check_text(read_rows(rows), preference=False)
    assert (report.rows_kept, report.defect_counts) == (6, {"labelled bad": 7})


def test_labels_that_are_no_verdict_are_not_read():
    for rows in (
        [{"prompt": "p", "completion": f"{n}", "label": n} for n in range(4)],
        [{"prompt": "p", "completion": x, "label": x} for x in ("sports", "no", "yes")],
        [{"text": f"a film {n}", "label": n} for n in (0, 1)],
    ):
        report = check_text(read_rows(rows), preference=False)
        assert (report.rows_kept, report.reading.unread) == (len(rows), {"label": len(rows)})


def test_a_label_without_a_value_is_not_learnt():
    rows = [{"prompt": "p", "completion": f"{x}", "label": x} for x in (True, None, False)]
    assert check_text(read_rows(rows), preference=False).defect_counts == {K.LABELLED_BAD: 2}


def test_ids_are_those_of_the_plain_layout(chat_tokenizer):
    limits = {"max_length": None, "max_prompt_length": None}
    plain = {"prompt": [user("the sky")], "chosen": [bot("is blue")], "rejected": [bot("so bad")]}
    expected = prepare_pairs([plain], chat_tokenizer, **limits).dataset[0]
    for fields in (
        {"conversations": [human("the sky")], "chosen": gpt("is blue"), "rejected": gpt("so bad")},
        {"system": "", "question": "the sky", "chosen": "is blue", "rejected": "so bad"},
        {"messages": json.dumps([user("the sky"), bot("is blue")]), "rejected_response": "so bad"},
    ):
        found = prepare_pairs([fields], chat_tokenizer, **limits).dataset[0]
        assert [found[name] for name in found if name.endswith("_ids")] == [
            expected[name] for name in expected if name.endswith("_ids")
        ]


def test_completions_of_a_system_column(chat_tokenizer):
    rows = [{"system_prompt": "a", "question": "the sky", "response": "is blue"}]
    data = prepare_completions(rows, chat_tokenizer, max_length=None)
    assert "system\na" in chat_tokenizer.decode(data.dataset[0]["prompt_ids"])


def test_a_repeated_prompt_in_the_account():
    rows = [
        {"prompt": f"Number {n}?", "chosen": f"Number {n}?\nYes.", "rejected": f"Number {n}? No."}
        for n in range(3)
    ]
    report = check_text(read_rows(rows))
    assert report.warning_counts == {WarningKind.PROMPT_REPEATED: 3}
    assert "both responses begin with the prompt: removed" in report.summary()
    assert pairs_of(*rows)[1] == ("Number 1?", "\nYes.", " No.")
