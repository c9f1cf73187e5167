"""`convert` between our generations and the files of AlpacaEval and MT-Bench, there and back."""

import json
from pathlib import Path

import pytest

from tokenratio.cli.main import main
from tokenratio.data.chat import prompt_of, prompt_value
from tokenratio.data.prompts import read_prompts
from tokenratio.evaluation.interchange import read_alpaca_outputs, read_mt_bench_answers
from tokenratio.evaluation.journal import read_settings
from tokenratio.evaluation.response_files import read_responses

QUESTIONS = [
    {"question_id": 80 + i, "category": "math", "turns": [f"What is {i}?", "Twice that?"]}
    for i in (1, 2, 3)
]
INSTRUCTIONS = [{"instruction": text} for text in ("Say é.", "Count.", "Say é.")]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines("question.jsonl", QUESTIONS)
    Path("eval.json").write_text(json.dumps(INSTRUCTIONS))


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_generations(path, prompts, *, samples=1, model=None):
    rows = [
        {
            "id": id,
            "prompt": prompt_value(prompt_of(prompt)),
            "samples": [
                {"text": f"answer {n} to {id} ½", "token_ids": [1, 2], "finish_reason": "eos"}
                for n in range(samples)
            ],
            "settings": "a" * 16,
        }
        for id, prompt in prompts
    ]
    write_lines(path, rows)
    if model is not None:
        settings = {"a" * 16: {"model": model}}
        Path(path).with_suffix(".settings.json").write_text(json.dumps(settings))
    return rows


def convert(capsys, *argv, code=0):
    found = main(["convert", *map(str, argv)])
    printed = capsys.readouterr()
    assert found == code, printed.err or printed.out
    if code:
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("tokenratio: ")
    return printed.err if code else printed.out


def texts(path):
    return {g.id: [sample.text for sample in g.samples] for g in read_responses(path)}


def test_alpaca_eval_there_and_back(capsys):
    rows = write_generations("ours.jsonl", read_prompts("eval.json"), model="tiny")
    printed = convert(capsys, "ours.jsonl", "--to", "alpaca-eval", "--output", "out.json")
    assert printed == "3 answers of tiny in out.json\n"
    outputs = read_alpaca_outputs("out.json")
    assert [(o.instruction, o.output, o.generator) for o in outputs] == [
        (row["prompt"], row["samples"][0]["text"], "tiny") for row in rows
    ]
    assert isinstance(json.loads(Path("out.json").read_text()), list)
    convert(capsys, "out.json", "--to", "generations", "--output", "back.jsonl")
    (settings,) = read_settings("back.jsonl").values()
    assert settings["model"] == "tiny"
    assert [(g.id, g.prompt) for g in read_responses("back.jsonl")] == read_prompts("eval.json")
    assert texts("back.jsonl") == texts("ours.jsonl")
    assert {s.token_ids for g in read_responses("back.jsonl") for s in g.samples} == {None}
    again = convert(capsys, "back.jsonl", "--to", "alpaca-eval", "--output", "again.json")
    assert "of tiny" in again
    assert Path("again.json").read_bytes() == Path("out.json").read_bytes()


def test_others_outputs_get_the_ids_of_the_prompts(capsys):
    """So that they pair with what is generated from the same file; an instruction stands twice."""
    outputs = [{**row, "output": f"out {i}"} for i, row in enumerate(INSTRUCTIONS)]
    Path("theirs.json").write_text(json.dumps(outputs[::-1]))
    argv = ["theirs.json", "--to", "generations", "--generator", "them"]
    printed = convert(capsys, *argv, "--output", "plain.jsonl")
    assert printed == "3 answers of them in plain.jsonl\n"
    assert list(texts("plain.jsonl")) == [f"theirs.json:{i}" for i in (1, 2, 3)]
    convert(capsys, *argv, "--output", "named.jsonl", "--questions", "eval.json")
    assert texts("named.jsonl") == {
        "eval.json:1": ["out 2"],
        "eval.json:2": ["out 1"],
        "eval.json:3": ["out 0"],
    }
    Path("eval.json").write_text(json.dumps(INSTRUCTIONS[:2]))
    argv += ["--output", "few.jsonl", "--questions", "eval.json"]
    assert "theirs.json:3: eval.json does not have this instruction" in convert(
        capsys, *argv, code=2
    )
    assert not Path("few.jsonl").exists()


def test_mt_bench_there_and_back(capsys):
    prompts = read_prompts("question.jsonl")
    rows = write_generations("ours.jsonl", prompts, samples=2, model="tiny")
    argv = ["ours.jsonl", "--to", "mt-bench", "--output", "answers.jsonl"]
    convert(capsys, *argv, "--questions", "question.jsonl")
    answers = read_mt_bench_answers("answers.jsonl")
    assert [(a.question_id, a.model_id) for a in answers] == [(n, "tiny") for n in (81, 82, 83)]
    assert [a.choices for a in answers] == [
        tuple((sample["text"],) for sample in row["samples"]) for row in rows
    ]
    first = json.loads(Path("answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [choice["index"] for choice in first["choices"]] == [0, 1]
    back = ["answers.jsonl", "--to", "generations", "--output", "back.jsonl"]
    assert "give MT-Bench's with --questions" in convert(capsys, *back, code=2)
    convert(capsys, *back, "--questions", "question.jsonl")
    assert [(g.id, g.prompt) for g in read_responses("back.jsonl")] == prompts
    assert texts("back.jsonl") == texts("ours.jsonl")

    # without the questions: the number at the end of each id, with a note
    printed = convert(capsys, *argv, "--overwrite")
    assert "question_id is the number at each id's end" in printed
    assert [a.question_id for a in read_mt_bench_answers("answers.jsonl")] == [1, 2, 3]


def test_a_second_turn_is_a_conversation(capsys):
    choices = [{"index": 0, "turns": ["1", "2"]}]
    answers = [
        {"question_id": n, "model_id": "m", "answer_id": "x", "choices": choices, "tstamp": 1.0}
        for n in (83, 81)
    ]
    write_lines("answers.jsonl", answers)
    argv = ["answers.jsonl", "--to", "generations", "--questions", "question.jsonl"]
    printed = convert(capsys, *argv, "--output", "one.jsonl")
    assert "2 answers to later turns left out" in printed
    assert texts("one.jsonl") == {"question.jsonl:3": ["1"], "question.jsonl:1": ["1"]}
    printed = convert(capsys, *argv, "--output", "two.jsonl", "--turn", "2")
    assert "left out" not in printed
    last = read_responses("two.jsonl")[0]
    assert [message["content"] for message in last.prompt.messages] == [
        "What is 3?",
        "1",
        "Twice that?",
    ]
    assert texts("two.jsonl")["question.jsonl:3"] == ["2"]
    back = ["two.jsonl", "--to", "mt-bench", "--questions", "question.jsonl"]
    convert(capsys, *back, "--output", "back.jsonl")
    assert [(a.question_id, a.choices) for a in read_mt_bench_answers("back.jsonl")] == [
        (83, (("1", "2"),)),
        (81, (("1", "2"),)),
    ]
    assert "no turn 3" in convert(capsys, *argv, "--output", "x.jsonl", "--turn", "3", code=2)
    argv = ["two.jsonl", "--to", "alpaca-eval", "--output", "x.json"]
    assert "prompt has several turns" in convert(capsys, *argv, code=2)


def test_choices_that_differ_before_the_turn_are_refused(capsys):
    choices = [{"index": i, "turns": [str(i), "2"]} for i in (0, 1)]
    write_lines("answers.jsonl", [{"question_id": 81, "model_id": "m", "choices": choices}])
    Path("answers.jsonl").write_text(
        Path("answers.jsonl").read_text().replace('"choices"', '"answer_id": "x", "choices"')
    )
    argv = ["answers.jsonl", "--to", "generations", "--questions", "question.jsonl"]
    convert(capsys, *argv, "--output", "one.jsonl")
    assert texts("one.jsonl") == {"question.jsonl:1": ["0", "1"]}
    printed = convert(capsys, *argv, "--output", "two.jsonl", "--turn", "2", code=2)
    assert "2 choices differ before turn 2" in printed


def test_between_the_two_benchmarks(capsys):
    choices = [{"index": 0, "turns": ["1", "2"]}]
    row = {"question_id": 82, "model_id": "m", "answer_id": "x", "choices": choices}
    write_lines("answers.jsonl", [row])
    argv = ["answers.jsonl", "--to", "alpaca-eval", "--questions", "question.jsonl"]
    convert(capsys, *argv, "--output", "out.json")
    (output,) = read_alpaca_outputs("out.json")
    assert (output.instruction, output.output, output.generator) == ("What is 2?", "1", "m")
    argv = ["out.json", "--to", "mt-bench", "--questions", "question.jsonl"]
    convert(capsys, *argv, "--output", "back.jsonl")
    (answer,) = read_mt_bench_answers("back.jsonl")
    assert (answer.question_id, answer.model_id, answer.choices) == (82, "m", (("1",),))


def test_what_a_format_cannot_hold_is_said(capsys):
    write_generations("ours.jsonl", [("a:1", [{"role": "user", "content": "Count."}])], samples=3)
    printed = convert(capsys, "ours.jsonl", "--to", "alpaca-eval", "--output", "out.json")
    assert "an unnamed model" in printed
    assert "2 further samples left out" in printed
    (output,) = read_alpaca_outputs("out.json")
    assert (output.instruction, output.generator) == ("Count.", None)


def test_a_turn_of_tool_calls_alone_cannot_be_converted(capsys):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked = [{"role": "user", "content": "What is 1?"}, call, {"role": "tool", "content": "1"}]
    write_generations("g.jsonl", [("q:81", asked)], model="m")
    said = convert(capsys, "g.jsonl", "--to", "mt-bench", "--output", "m.jsonl", code=2)
    assert "q:81: a turn of assistant has no text, only tool calls" in said


def test_an_output_that_exists_is_kept(capsys):
    write_generations("ours.jsonl", read_prompts("eval.json"))
    argv = ["ours.jsonl", "--to", "alpaca-eval", "--generator", "g"]
    Path("out.json").write_text("mine")
    printed = convert(capsys, *argv, "--output", "out.json", code=2)
    assert "out.json already exists" in printed
    assert "--overwrite" in printed
    assert Path("out.json").read_text() == "mine"
    convert(capsys, *argv, "--output", "out.json", "--overwrite")
    assert len(read_alpaca_outputs("out.json")) == 3
    back = ["out.json", "--to", "generations", "--output", "back.jsonl"]
    convert(capsys, *back)
    before = Path("back.jsonl").read_bytes()
    assert "back.jsonl already exists" in convert(capsys, *back, "--generator", "h", code=2)
    assert Path("back.jsonl").read_bytes() == before
    convert(capsys, *back, "--generator", "h", "--overwrite")
    (settings,) = read_settings("back.jsonl").values()
    assert settings["model"] == "h"
    Path("back.jsonl").unlink()
    assert "back.settings.json already exists" in convert(capsys, *back, code=2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs one file"),
        (["ours.jsonl"], "convert needs --to"),
        (["ours.jsonl", "--to", "mt-bench"], "convert needs --output"),
        (["ours.jsonl", "--to", "mtbench", "--output", "x"], "to must be one of generations, "),
        (["ours.jsonl", "--to", "mt-bench", "--output", "x", "--frm", "y"], "unknown flag 'frm'"),
        (["none.jsonl", "--to", "mt-bench", "--output", "x"], "none.jsonl"),
        (["ours.txt", "--to", "mt-bench", "--output", "x"], "not one of .json"),
        (
            ["ours.jsonl", "--to", "generations", "--output", "x"],
            "in the format generations",
        ),
        (["ours.jsonl", "--to", "mt-bench", "--output", "x"], "give --generator"),
        (["ours.jsonl", "--to", "mt-bench", "--output", ".", "--overwrite"], "is a folder"),
        (
            ["ours.jsonl", "--to", "alpaca-eval", "--output", "./ours.jsonl", "--overwrite"],
            "is an input",
        ),
        (["ours.jsonl", "--to", "mt-bench", "--output", "x", "--turn", "0"], "turn must be"),
        (["question.jsonl", "--to", "mt-bench", "--output", "x"], "not have a supported format"),
        (["empty.jsonl", "--to", "mt-bench", "--output", "x"], "has no records"),
        (["broken.jsonl", "--to", "mt-bench", "--output", "x"], "broken.jsonl:1: not JSON"),
        (["several.json", "--to", "mt-bench", "--output", "x"], "several models (a, b)"),
        (
            ["ours.jsonl", "--to", "mt-bench", "--output", "x", "--generator", "g"],
            "first does not end in a number",
        ),
        (
            [
                "ours.jsonl",
                "--to",
                "mt-bench",
                "--output",
                "x",
                "--generator",
                "g",
                "--questions",
                "question.jsonl",
            ],
            "question.jsonl does not have the question of first",
        ),
        (
            ["twice.jsonl", "--to", "mt-bench", "--output", "x", "--generator", "g"],
            "a:1 and b:1 both answer question 1",
        ),
        (
            [
                "answers.jsonl",
                "--to",
                "generations",
                "--output",
                "x",
                "--questions",
                "question.jsonl",
            ],
            "question 7: question.jsonl does not have this question",
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(argv, message, capsys):
    write_generations("ours.jsonl", [("first", "Hello?")])
    write_generations("twice.jsonl", [("a:1", "Hello?"), ("b:1", "Bye?")])
    Path("empty.jsonl").write_text("")
    Path("broken.jsonl").write_text("{\n{}\n")
    Path("ours.txt").write_text("x")
    outputs = [{"instruction": "i", "output": "o", "generator": name} for name in "ab"]
    Path("several.json").write_text(json.dumps(outputs))
    choices = [{"index": 0, "turns": ["1"]}]
    row = {"question_id": 7, "model_id": "m", "answer_id": "x", "choices": choices}
    write_lines("answers.jsonl", [row])
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert message in convert(capsys, *argv, code=2)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_the_real_questions(data_folder, capsys):
    """Ids and numbers of MT-Bench's own 80 questions."""
    questions = data_folder / "eval_prompts" / "mt_bench_question.jsonl"
    if not questions.is_file():
        pytest.skip(f"no {questions}")
    write_generations("ours.jsonl", read_prompts(questions))
    argv = ["ours.jsonl", "--to", "mt-bench", "--output", "a.jsonl", "--generator", "g"]
    convert(capsys, *argv, "--questions", questions)
    assert [a.question_id for a in read_mt_bench_answers("a.jsonl")] == list(range(81, 161))
    argv = ["a.jsonl", "--to", "generations", "--output", "b.jsonl", "--questions", questions]
    convert(capsys, *argv)
    assert texts("b.jsonl") == texts("ours.jsonl")


def test_help(capsys):
    printed = convert(capsys, "--help")
    assert "--questions" in printed
    assert "--to" in printed
