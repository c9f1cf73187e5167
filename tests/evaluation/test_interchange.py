import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data.prompts import read_prompts
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.interchange import (
    AlpacaAnnotation,
    AlpacaOutput,
    MtBenchAnswer,
    MtBenchJudgement,
    MtBenchQuestion,
    read_alpaca_annotations,
    read_alpaca_outputs,
    read_mt_bench_answers,
    read_mt_bench_judgements,
    read_mt_bench_questions,
    write_alpaca,
    write_mt_bench,
)
from tokenratio.evaluation.response_files import dataset_responses

text = st.one_of(
    st.text(max_size=8), st.sampled_from(["\u2028", "a\r\nb", "\x85", '"\\', "\ud800"])
)
texts = st.lists(text, min_size=1, max_size=3).map(tuple)
maybe = st.none() | text
extra = st.dictionaries(
    st.sampled_from(["raw_completion", "price", "x"]),
    st.none() | text | st.integers() | st.lists(st.booleans()),
)
seconds = st.floats(0, 2e9)
winners = st.sampled_from(["model_1", "model_2", "tie", "error"])

FORMATS = {
    "outputs.json": (
        read_alpaca_outputs,
        write_alpaca,
        st.builds(AlpacaOutput, text, text, maybe, maybe, extra=extra),
    ),
    "annotations.json": (
        read_alpaca_annotations,
        write_alpaca,
        st.builds(
            AlpacaAnnotation,
            *[text] * 6,
            preference=st.none() | st.floats(1, 2),
            dataset=maybe,
            extra=extra,
        ),
    ),
    "answers.jsonl": (
        read_mt_bench_answers,
        write_mt_bench,
        st.builds(
            MtBenchAnswer,
            st.integers(),
            text,
            st.lists(texts, max_size=3).map(tuple),
            tstamp=seconds,
            extra=extra,
        ),
    ),
    "judgements.jsonl": (
        read_mt_bench_judgements,
        write_mt_bench,
        st.builds(
            MtBenchJudgement,
            st.integers(),
            text,
            text,
            winners,
            winners,
            st.tuples(text, text),
            turn=st.integers(1, 2),
            g1_judgment=text,
            g2_user_prompt=text,
            tstamp=seconds,
            extra=extra,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(name, tmp_path_factory):
    read, write, record = FORMATS[name]
    folder = tmp_path_factory.mktemp("files")

    @settings(deadline=None, derandomize=True)
    @given(st.lists(record, min_size=1, max_size=4))
    def check(records):
        write(folder / name, records)
        assert read(folder / name) == records

    check()


def test_an_alpaca_eval_file_as_published(tmp_path):
    """The shape of `results/*/weighted_alpaca_eval_gpt4_turbo/annotations.json`."""
    published = """[
  {
    "instruction":"How did US states get their names?",
    "output_1":"The names of \\/ U.S. states \\u00e9",
    "generator_1":"gpt4_1106_preview",
    "dataset":"helpful_base",
    "output_2":"US states got",
    "generator_2":"alpaca-7b",
    "annotator":"weighted_alpaca_eval_gpt4_turbo",
    "preference":1.000000399,
    "price_per_example":0.01102,
    "time_per_example":0.4406299141,
    "raw_completion":{"finish_reason":"length","index":0,"logprobs":null}
  },
  {
    "instruction":"a", "output_1":"b", "generator_1":"c", "dataset":null, "output_2":"d",
    "generator_2":"e", "annotator":"f", "preference":null
  },
  {
    "instruction":"a", "output_1":"b", "generator_1":"c", "output_2":"d",
    "generator_2":"e", "annotator":"f", "preference":0
  }
]"""
    path = tmp_path / "annotations.json"
    path.write_text(published, encoding="utf-8")
    first, failed, draw = read_alpaca_annotations(path)
    assert first.second_wins == pytest.approx(3.99e-7)
    assert first.output_1.endswith("/ U.S. states é")
    assert first.extra["raw_completion"] == {
        "finish_reason": "length",
        "index": 0,
        "logprobs": None,
    }
    assert (failed.preference, failed.second_wins) == (None, None)
    assert draw.preference == 1.5  # AlpacaEval's older files say 0
    write_alpaca(path, [first, failed, draw])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written[0] == json.loads(published)[0]
    assert written[1]["preference"] is None


def test_alpaca_outputs_are_what_its_loader_takes(tmp_path):
    """`alpaca_eval` loads a file by pandas and wants one generator, instruction and output."""
    outputs = [AlpacaOutput(f"question {i}", "answer\n", "ours", "koala") for i in range(3)]
    write_alpaca(tmp_path / "outputs.json", outputs)
    table = pd.read_json(tmp_path / "outputs.json")
    assert table["generator"].unique().tolist() == ["ours"]
    assert list(table.columns) == ["instruction", "output", "generator", "dataset"]
    assert len(table) == 3


def test_fastchat_reads_the_judgements(tmp_path):
    """The lines of FastChat's `load_pairwise_model_judgments` and `show_result.py`."""
    judgements = [
        MtBenchJudgement(81, "ours", "gpt-4", "model_1", "model_1", ("gpt-4", "pair-v2"), 1),
        MtBenchJudgement(81, "ours", "gpt-4", "model_1", "model_2", ("gpt-4", "pair-v2"), 2),
        MtBenchJudgement(82, "ours", "gpt-4", "tie", "error", ("gpt-4", "pair-v2"), 1),
        MtBenchJudgement(83, "ours", "gpt-4", "tie", "tie", ("gpt-4", "pair-v2"), 1),
    ]
    path = tmp_path / "gpt-4_pair.jsonl"
    write_mt_bench(path, judgements)
    for line, judgement in zip(path.read_text().splitlines(), judgements, strict=True):
        obj = json.loads(line)
        assert tuple(obj["judge"]) == ("gpt-4", "pair-v2")
        assert (obj["question_id"], obj["model_1"]) == (judgement.question_id, "ours")
        assert isinstance(obj["g1_judgment"], str)
    table = pd.read_json(path, lines=True)
    kept = table[(table["g1_winner"] != "error") & (table["g2_winner"] != "error")]
    assert len(kept) == 3
    assert [each.winner for each in judgements] == ["model_1", "inconsistent", "error", "tie"]


def test_one_winner_for_both_orders(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = {"question_id": 1, "model_1": "a", "model_2": "b", "winner": "model_2"}
    path.write_text(json.dumps(line | {"judge": ["human", "x"]}) + "\n", encoding="utf-8")
    (judgement,) = read_mt_bench_judgements(path)
    assert (judgement.g1_winner, judgement.g2_winner) == ("model_2", "model_2")
    assert judgement.winner == "model_2"
    assert judgement.turn == 1


def test_fastchat_answers(tmp_path):
    """What `gen_model_answer.py` writes, `generate_params` of forks included."""
    line = {
        "question_id": 81,
        "answer_id": "Y9GcTFqPXqyZ2UFxDkWJVb",
        "model_id": "vicuna-7b",
        "choices": [{"index": 0, "turns": ["Aloha!", "Again."]}],
        "tstamp": 1686286924.8,
        "generate_params": {"temperature": 0.7},
    }
    path = tmp_path / "vicuna-7b.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    (answer,) = read_mt_bench_answers(path)
    assert answer.choices == (("Aloha!", "Again."),)
    write_mt_bench(path, [answer])
    assert json.loads(path.read_text()) == line


def test_answer_ids_name_their_contents():
    ids = {
        MtBenchAnswer(1, "m", (("a",),)).answer_id,
        MtBenchAnswer(1, "m", (("a",),), tstamp=3.0).answer_id,
        MtBenchAnswer(1, "m", (("b",),)).answer_id,
        MtBenchAnswer(2, "m", (("a",),)).answer_id,
    }
    assert len(ids) == 3


def test_a_conversation_by_turns():
    question = MtBenchQuestion(81, "writing", ("Compose.", "Rewrite."))
    assert question.conversation() == [{"role": "user", "content": "Compose."}]
    assert [m["role"] for m in question.conversation(["Here."])] == ["user", "assistant", "user"]


OUTPUT = {"instruction": "a", "output": "b", "generator": "c"}
ANNOTATION = {
    **dict.fromkeys(("instruction", "output_1", "output_2", "annotator"), "x"),
    "generator_1": "m",
    "generator_2": "n",
    "preference": 1.2,
}
ANSWER = {"question_id": 1, "answer_id": "i", "model_id": "m", "tstamp": 1.0}
ANSWER |= {"choices": [{"index": 0, "turns": ["a"]}]}
GAME = {"question_id": 1, "model_1": "a", "model_2": "b", "judge": ["j", "p"], "turn": 1}
GAME |= {"g1_winner": "tie", "g2_winner": "tie"}


@pytest.mark.parametrize(
    ("read", "name", "good", "change", "message"),
    [
        (
            read_alpaca_outputs,
            "f.json",
            OUTPUT,
            {"output": None},
            "output is null, not a string",
        ),
        (read_alpaca_outputs, "f.json", OUTPUT, {"output": ...}, "no field 'output'"),
        (
            read_alpaca_outputs,
            "f.json",
            OUTPUT,
            {"dataset": 3},
            "dataset is 3, not a string or null",
        ),
        (read_alpaca_annotations, "f.json", ANNOTATION, {"preference": 2.5}, "between 1 and 2"),
        (
            read_alpaca_annotations,
            "f.json",
            ANNOTATION,
            {"preference": "2"},
            "is .2., not a number",
        ),
        (
            read_mt_bench_answers,
            "f.jsonl",
            ANSWER,
            {"question_id": "1"},
            "is .1., not a whole number",
        ),
        (read_mt_bench_answers, "f.jsonl", ANSWER, {"choices": ["a"]}, "is .a., not an object"),
        (read_mt_bench_answers, "f.jsonl", ANSWER, {"choices": [{"turns": "a"}]}, "not a list"),
        (read_mt_bench_judgements, "f.jsonl", GAME, {"g2_winner": "B"}, "g2_winner must be one of"),
        (read_mt_bench_judgements, "f.jsonl", GAME, {"judge": ["j"]}, "judge must be"),
        (read_mt_bench_judgements, "f.jsonl", GAME, {"g1_winner": ...}, "no field 'g1_winner'"),
    ],
)
def test_faults_are_named_by_file_and_line(tmp_path, read, name, good, change, message):
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    path = tmp_path / name
    lines = [json.dumps(good), json.dumps(bad)]
    content = f"[{', '.join(lines)}]" if name.endswith(".json") else "\n".join(lines)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokenRatioError, match=rf"{name}:2: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", b'{"question_id": 1,\n', r"f.jsonl:1: not JSON"),
        ("f.jsonl", b'{"a": 1}\n{"b": "\xff"}\n', r"f.jsonl:2: not UTF-8"),
        ("f.jsonl", b"[1]\n", r"f.jsonl:1: it holds a list"),
        ("f.json", b"[1,\n", r"f.json: not JSON.* line 2"),
        ("f.jsonl", b"\n", r"f.jsonl: no records"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenRatioError, match=message):
        read_mt_bench_answers(tmp_path / name)
    with pytest.raises(TokenRatioError, match=r"none.jsonl: cannot be read"):
        read_mt_bench_answers(tmp_path / "none.jsonl")


def test_what_json_cannot_hold_is_not_written(tmp_path):
    path = tmp_path / "outputs.json"
    write_alpaca(path, [AlpacaOutput("a", "b")])
    before = path.read_bytes()
    with pytest.raises(TokenRatioError, match=r"outputs.json was not written"):
        write_alpaca(path, [AlpacaOutput("a", "b", extra={"score": float("nan")})])
    assert path.read_bytes() == before


def test_the_mt_bench_questions(data_folder):
    path = data_folder / "eval_prompts" / "mt_bench_question.jsonl"
    questions = read_mt_bench_questions(path)
    assert [question.question_id for question in questions] == list(range(81, 161))
    assert all(len(question.turns) == 2 for question in questions)
    assert len({question.category for question in questions}) == 8
    # the same first turns as the source of prompts has
    assert [question.turns[0] for question in questions] == [p for _, p in read_prompts(path)]


def test_the_alpaca_eval_set(data_folder):
    path = data_folder / "alpaca_eval" / "eval_set.jsonl"
    references = dataset_responses(path, column="reference_output")
    assert len(references) == 805
    assert [each.prompt for each in references] == [p for _, p in read_prompts(path)]
    assert all(each.samples[0].text for each in references)
