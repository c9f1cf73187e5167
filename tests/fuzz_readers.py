"""Every public reader, and real files for it, written by what writes them."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerState

from templates import family_tokenizer
from tiny import tiny_tokenizer, word_pairs
from tokenratio.cli import recipe as cli_recipe
from tokenratio.cli.answer_files import convert
from tokenratio.cli.command import read_flags
from tokenratio.cli.convert import KINDS, ConvertOptions
from tokenratio.cli.main import COMMANDS
from tokenratio.data import inspect_source, prepare_completions, prepare_pairs
from tokenratio.data.chat import prompt_of
from tokenratio.data.defects import DefectLog
from tokenratio.data.formats import CompletionExample, PreferenceExample
from tokenratio.data.parts import source_digest
from tokenratio.data.prompts import read_prompts
from tokenratio.data.selection import Selection, select_rows
from tokenratio.data.sources import locate
from tokenratio.data.tables import describe_table
from tokenratio.data.validation import find_warnings, parse_rows
from tokenratio.evaluation.inputs import subjects_of
from tokenratio.evaluation.interchange import (
    AlpacaOutput,
    MtBenchAnswer,
    read_alpaca_annotations,
    read_mt_bench_judgements,
    write_alpaca,
    write_mt_bench,
)
from tokenratio.evaluation.journal import read_settings
from tokenratio.evaluation.judges.answer_parsing import parse_verdict
from tokenratio.evaluation.judges.cache import VerdictCache
from tokenratio.evaluation.judges.human import HumanJudge, write_sheet
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict
from tokenratio.evaluation.openai_api import ReplyError, read_reply, retry_after
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.evaluation.response_files import dataset_responses, read_responses, write_responses
from tokenratio.evaluation.results import MEASURES_FILE, PolicyMeasures, measure_of, table
from tokenratio.evaluation.stability import read_metrics, stability
from tokenratio.evaluation.verdict_files import describe_judgements, judge_all, read_judgements
from tokenratio.locks import Holder
from tokenratio.models.provenance import chain_of, relocated
from tokenratio.models.response import Response
from tokenratio.models.state_baseline import (
    StateBaseline,
    load_optimizer,
    read_baseline,
    save_baseline,
    save_optimizer,
)
from tokenratio.models.template_options import template_of
from tokenratio.records import parse_json
from tokenratio.report.as_markdown import report_markdown
from tokenratio.report.run_report import build_report, report_page
from tokenratio.run_folder import METRICS_FILE, read_run_file, write_run_file
from tokenratio.settings import build, fields_of
from tokenratio.training.cache_entry import find_flaw
from tokenratio.training.callbacks import _step_of
from tokenratio.training.checkpoints import last_checkpoint
from tokenratio.training.metrics import MetricSums
from tokenratio.training.run_record import check_same_run
from tokenratio.training.token_contrast import TokenContrast
from tokenratio.yaml_text import read_yaml

TOKENIZER, CHAT = tiny_tokenizer(), family_tokenizer("hermes")
GENERATIONS = "_evaluation/generations.jsonl"
VERDICTS = [("[[A]]", 1.0), ("[[B]]", 0.0), ("[[C]]", 0.5)]
WORD_ROWS = word_pairs(5)
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}


class LostRowsError(Exception):
    """A reader lost rows silently."""


@dataclass(frozen=True)
class Seed:
    """A real file, or a folder of files."""

    name: str
    content: bytes | Path


@dataclass(frozen=True)
class Reader:
    """What reads a file: `read(path, output folder, random numbers, seeds)`."""

    read: Callable[[Path, Path, random.Random, "Seeds"], Any]
    seeds: str


def _user(text):
    return {"role": "user", "content": text}


def _answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def _layouts():
    """Rows in the layouts of docs/data.md: texts, messages, tools, ratings, transcripts."""
    for row in (
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": [_user("Why?")], "chosen": [_answer("So.")], "rejected": [_answer("No.")]},
        {
            "chosen": [_user("Hi"), _answer("Hello")],
            "rejected": [_user("Hi"), _answer("Bye")],
            "tools": [TOOL],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "instruction": "Add",
            "input": "1 2",
            "system": "You add.",
            "history": [["a", "b"]],
            "chosen": "3",
            "rejected": "4",
            "tools": json.dumps([TOOL]),
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        {"messages": json.dumps([_user("Hi"), _answer("Yes")]), "label": True},
        {"question": "Q", "generations": ["a", "b"], "ratings": [1, 2.5]},
        {"prompt": "Q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        {
            "instruction": "Q",
            "completions": [
                {"response": "a", "overall_score": 3},
                {"response": "b", "overall_score": "4"},
            ],
        },
        {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": 0},
        {"context": [_user("Q")], "response1": "a", "response2": "b", "overall_preference": -2},
        {
            "conversation_a": [_user("Q"), _answer("a")],
            "conversation_b": [_user("Q"), _answer("b")],
            "winner": "model_a",
        },
        {"chosen": "Human: Hi\n\nAssistant: a", "rejected": "Human: Hi\n\nAssistant: b"},
        {"prompt": "Why", "completion": " so", "date": "2024-01-01"},
        {"turns": ["a", "b"], "question_id": 81, "category": "x"},
    ):
        yield [row, {**row, "id": 2}, {**row, "extra": None}]


class Seeds:
    """Real files by kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: dict[str, list[Seed]] = {}
        for write in (_data, _recipes, _evaluation, _replies, _runs):
            (folder / write.__name__).mkdir(parents=True, exist_ok=True)
            write(self, folder / write.__name__)

    def add(self, kind: str, path: Path | str, content: bytes | str | None = None) -> None:
        if content is None:
            content = path if Path(path).is_dir() else Path(path).read_bytes()
        content = content.encode() if isinstance(content, str) else content
        self.kinds.setdefault(kind, []).append(Seed(Path(path).name, content))

    def pick(self, reader: Reader, rng: random.Random) -> Seed:
        return rng.choice(self.kinds[reader.seeds])


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def _data(seeds, folder):
    for rows in [*_layouts(), WORD_ROWS]:
        seeds.add("data", "rows.jsonl", _lines(rows))
        seeds.add("data", "rows.json", json.dumps(rows))
        seeds.add("data", "rows.jsonl.gz", gzip.compress(_lines(rows).encode()))
    seeds.add("data", "rows.csv", 'prompt,chosen,rejected\nash,bay,cow\n"a\nb",c,d\n')
    for rows in (WORD_ROWS, *list(_layouts())[:3]):
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        seeds.add("data", folder / "rows.parquet")
    Dataset.from_list(WORD_ROWS).save_to_disk(folder / "saved")
    seeds.add("data", folder / "saved")
    many = folder / "many"
    many.mkdir()
    for name in ("train-0", "train-1", "test", "notes"):
        (many / f"{name}.jsonl").write_text(_lines(WORD_ROWS))
    seeds.add("data", many)


def _recipes(seeds, folder):
    for path in sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml")):
        kind = "evaluate" if "evaluate" in path.name else "reward" if "reward" in path.name else ""
        seeds.add(f"recipe {kind}".strip(), "r.yaml", path.read_bytes())
    task = {"task": "t", "dataset_path": "json", "metric_list": [{"metric": "acc"}]}
    task["dataset_kwargs"] = {"data_files": {"test": "a.jsonl"}}
    seeds.add("task", "task.yaml", yaml.safe_dump(task))


def _evaluation(seeds, folder):
    prompts = [(f"a:{i}", row["prompt"]) for i, row in enumerate(WORD_ROWS)]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    prompts[-1] = ("a:4", prompt_of([_user("Hi"), call, _answer("x"), _user("y")]))
    samples = {id: [Response("x y", "eos", (1, 2)), Response("z")] for id, _ in prompts}
    path = folder / "generations.jsonl"
    write_responses(prompts, lambda _: samples.items(), path, {"model": "m"}, report=str)
    seeds.add("generations", path)
    seeds.add("settings", folder / "generations.settings.json")
    pairs = [ResponsePair(id, 0, p, Response("a b"), Response("c")) for id, p in prompts[:-1]]
    judge_all(pairs, _Judge(), folder / "judgements.jsonl", report=str)
    seeds.add("judgements", folder / "judgements.jsonl")
    write_sheet(pairs, folder / "sheet.jsonl", seed=0)
    filled = (folder / "sheet.jsonl").read_text().replace('"verdict": null', '"verdict": "1"')
    seeds.add("sheet", "sheet.jsonl", filled)
    measures = [measure_of("win_rate/gold", [("a", 0, 1.0), ("b", 0, 0.5)], unit="share")]
    measures.append(measure_of("length/tokens", [], better="lower"))
    PolicyMeasures("p", "dpo", {"seed": 0}, tuple(measures), ("n",), {"prompt a": "x"}).save(folder)
    seeds.add("measures", folder / "measures.json")
    outputs = [AlpacaOutput(row["prompt"], row["chosen"], "m") for row in WORD_ROWS]
    write_alpaca(folder / "alpaca.json", outputs)
    seeds.add("answers", folder / "alpaca.json")
    write_mt_bench(folder / "mt.jsonl", [MtBenchAnswer(i, "m", (("a", "b"),), 1.0) for i in (1, 2)])
    seeds.add("answers", folder / "mt.jsonl")
    seeds.add("answers", path)
    question = [{"question_id": i, "category": "c", "turns": ["a", "b"]} for i in (1, 2)]
    seeds.add("questions", "question.jsonl", _lines(question))
    names = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator")
    annotation = {**dict.fromkeys(names, "x"), "preference": 1.5}
    seeds.add("annotations", "annotations.json", json.dumps([annotation] * 3))
    game = {"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "tie", "turn": 1}
    game |= {"g2_winner": "model_1", "judge": ["gpt", "pair-v2"], "tstamp": 1.0}
    seeds.add("games", "games.jsonl", _lines([game] * 3))
    steps = [
        {"step": i, "loss": 1 / (i + 1), "grad_norm": 1.0, "kl_ref_policy": 0.1} for i in range(30)
    ]
    seeds.add("metrics", "metrics.jsonl", _lines(steps))
    cache = VerdictCache(folder / "verdicts.sqlite")
    cache.put("k", "text", "stop")
    cache.close()
    seeds.add("verdicts", folder / "verdicts.sqlite")
    scores = {"settings": {}, "scores": [{"task": "t", "shots": 0, "metric": "acc", "value": 0.5}]}
    scores["scores"][0] |= {"stderr": None, "n": 3}
    seeds.add("suite", "suite.json", json.dumps(scores))


class _Judge:
    order_matters = True

    def identity(self):
        return {"judge": "scripted"}

    def __call__(self, comparisons):
        return (Verdict(1.0) for _ in comparisons)


def _replies(seeds, folder):
    choice = {"index": 0, "message": _answer("A is better.\n[[A]]"), "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    seeds.add("reply", "reply.json", json.dumps({"choices": [choice] * 2, "usage": usage}))
    choice = {"text": "x", "token_ids": [1, 2], "finish_reason": "length"}
    seeds.add("reply", "reply.json", json.dumps({"choices": [choice]}))
    for text in (
        "[[A]]",
        "<think>a [[B]]</think>\n**Verdict: [[A]]**",
        '```json\n{"verdict": "[[C]]", "why": "x"}\n```',
        "<|channel|>final<|message|>So: [[B]].<|return|></s>  \n",
    ):
        seeds.add("verdict", "answer.txt", text)
    for text in (
        "3",
        "0.5",
        "Thu, 01 Jan 2099 07:28:00 GMT",
        "Thu, 99999999999 Oct 2099 07:28:00 GMT",
    ):
        seeds.add("wait", "wait.txt", text)
    for text in (
        "--loss dpo --beta 0.1 --peft {r: 8} r.yaml",
        "--max_length=3 --bf16 --seed 1e3 a b",
    ):
        seeds.add("flags", "flags.txt", text)


def _runs(seeds, folder):
    data = prepare_pairs(WORD_ROWS, TOKENIZER, max_length=16, max_prompt_length=None)
    identity = {
        "kind": "policy",
        "model": "m",
        "processes": 1,
        "reference": {"kind": "copy", "name": "m", "sha256": "x"},
        "adapters": {"default": {"r": 8}},
        "data": {"train": data.identity()},
        "config": {
            "loss": "dpo",
            "max_steps": 4,
            "num_train_epochs": 1.0,
            "output_dir": "run",
            "model_init_kwargs": {"dtype": "float32"},
            "chat_template_kwargs": {"a": 1},
            "template_date": "2024-01-01",
            "token_scores": None,
        },
    }
    run = folder / "run"
    write_run_file(run, **identity)
    seeds.add("run.json", run)
    for step in (2, 4):
        point = run / f"checkpoint-{step}"
        point.mkdir()
        (point / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 0.5}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (point / name).write_bytes(b"PK")
    write_run_file(run / "checkpoint-4", **identity)
    seeds.add("checkpoints", run)
    seeds.identity = identity
    seeds.add("lock", "lock.json", json.dumps(asdict(Holder.this_process())))
    sums = MetricSums()
    sums.ratios, sums.peaks = {"loss": (1.0, 2.0)}, {"peak": 3.0}
    seeds.add("sums", "metric_sums.json", json.dumps(sums.to_dict()))
    baseline = StateBaseline(4, 3)
    save_baseline(baseline, folder)
    seeds.add("baseline", folder / "state_baseline.safetensors")
    optimizer = torch.optim.AdamW(baseline.parameters())
    baseline(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save_optimizer(optimizer, folder / "state_baseline_optimizer.safetensors")
    seeds.add("optimizer", folder / "state_baseline_optimizer.safetensors")
    contrast = folder / "scores"
    _contrast(data).save(contrast)
    seeds.add("scores", contrast)
    prepare_pairs(WORD_ROWS, TOKENIZER, **_LIMITS, cache_dir=folder / "prepared")
    seeds.add("prepared", folder / "prepared")
    entry = folder / "entry"
    entry.mkdir()
    save_file({"x": torch.ones(2)}, entry / "values.safetensors")
    (entry / "entry.json").write_text(
        json.dumps({"key": "entry", "sha256": "x", "ingredients": {}})
    )
    seeds.add("entry", entry)
    adapter = folder / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": "../base", "peft_type": "LORA", "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(2)}, adapter / "adapter_model.safetensors")
    write_run_file(adapter, **identity)
    seeds.add("adapter", adapter)


_LIMITS = {"max_length": 16, "max_prompt_length": None}


def _contrast(data):
    import numpy as np

    from tokenratio.training.token_contrast import row_keys

    keys = row_keys(data.dataset)
    sides = [
        tuple(np.zeros(len(row[f"{side}_ids"]), np.float32) for side in ("chosen", "rejected"))
        for row in data.dataset
    ]
    return TokenContrast({"positive": {}}, dict(zip(keys, sides, strict=True)))


# --- readers --------------------------------------------------------------------------------------


def _read_rows(path, out, rng, seeds):
    wanted = rng.choice((PreferenceExample, CompletionExample))
    parts = locate(str(path), split="train")
    columns = rng.choice((None, None, {"prompt": "prompt"}, {"label": None}))
    selection = rng.choice((Selection(), Selection(max_samples=2), Selection(held_out_share=0.5)))
    selected = select_rows(parts, selection, wanted, columns)
    rows, log = [row for part in parts for row in part.rows()], DefectLog("skip")
    parsed = parse_rows(selected.rows, selected.parser, log)
    if len(parsed.examples) + len(log.defects) != len(selected.rows):
        raise LostRowsError("parsed")
    if path.suffix == ".jsonl" and len(rows) != sum(
        bool(line.strip()) for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    ):
        raise LostRowsError("lines")
    find_warnings(parsed.examples)
    source_digest(rows)
    describe_table(rows)
    [part.digest() for part in parts]


def _read_prepared(path, out, rng, seeds):
    prepare = rng.choice((prepare_pairs, prepare_completions))
    tokenizer = rng.choice((TOKENIZER, CHAT))
    data = prepare(str(path), tokenizer, max_length=64, max_prompt_length=None)
    report = data.report
    if report.rows_kept + len(report.defects) != report.rows_read:
        raise LostRowsError("prepared")
    data.summary()


def _read_questions(path, out, rng, seeds):
    read_prompts(str(path), split=None)
    dataset_responses(str(path), column="chosen")


def _inspect(path, out, rng, seeds):
    text = inspect_source(str(path), rng.choice((None, CHAT)), max_length=32, split="train")
    text.encode()


def _from_list(path, out, rng, seeds):
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(rows, list):
        if rng.random() < 0.3 and rows and isinstance(rows[0], dict):
            rows[0][rng.choice((1, None, "a"))] = rng.choice(({1: {"a": 2}}, rows, {2, 3}, b"x"))
        prepare_pairs(rows, TOKENIZER, max_length=16, max_prompt_length=None)


def _recipe(path, out, rng, seeds):
    cli_recipe.read_recipe(str(path), rng.choice(({}, {"loss": "dpo"})))
    if rng.random() < 0.2:
        cli_recipe.resolve(str(path), {"bf16": "false", "use_cpu": "true"}, {})


def _evaluate_recipe(path, out, rng, seeds):
    build(EvaluateOptions, read_yaml(path), str(path))


def _reward_recipe(path, out, rng, seeds):
    from tokenratio.cli.train_reward import COMMAND

    cli_recipe.read_values(str(path), {}, COMMAND.fields(), fields_of(cli_recipe.Recipe))


def _task(path, out, rng, seeds):
    from tokenratio.evaluation.suite import _read_task_file

    _read_task_file(path)


def _suite(path, out, rng, seeds):
    from tokenratio.evaluation.suite import _known

    _known(path, {})


def _flags(path, out, rng, seeds):
    from importlib import import_module

    argv = path.read_bytes().decode("utf-8", "surrogateescape").split()
    module, *_ = COMMANDS[rng.choice(sorted(COMMANDS))]
    command = import_module(module).COMMAND
    fields = command.fields() if command.options is None else fields_of(command.options)
    if rng.random() < 0.7:
        argv += [f"--{rng.choice(sorted(fields) or ['x'])}", *argv[:1]]
    _, flags = read_flags(argv, fields)
    if command.options is not None:
        build(command.options, flags, "flags")


def _generations(path, out, rng, seeds):
    read_responses(path)
    read_settings(path)


def _resumed(path, out, rng, seeds):
    prompts = [(each.id, each.prompt) for each in read_responses(seeds.folder / GENERATIONS)]
    before = path.read_bytes()
    try:
        write_responses(
            prompts,
            lambda missing: ((id, [Response("x")]) for id, _ in missing),
            path,
            {"model": "m"},
            report=str,
        )
    except BaseException:
        if path.read_bytes() != before:
            raise LostRowsError("a refused file was changed") from None
        raise
    texts = {sample.text for each in read_responses(path) for sample in each.samples}
    for line in before.split(b"\n")[:-2]:  # the last may be cut off
        if line.strip() and not {s["text"] for s in parse_json(line)["samples"]} <= texts:
            raise LostRowsError("resumed")


def _settings(path, out, rng, seeds):
    target = path.with_name("generations.settings.json")
    path.rename(target) if path != target else None
    read_settings(target.with_name("generations.jsonl"))


def _judgements(path, out, rng, seeds):
    describe_judgements(read_judgements(path))


def _sheet(path, out, rng, seeds):
    pairs = [ResponsePair("a", 0, "p", Response("a b"), Response("c"))]
    list(HumanJudge(path, seed=0)(pairs))


def _measures(path, out, rng, seeds):
    table([PolicyMeasures.load(path)]).encode()


def _converted(path, out, rng, seeds):
    questions = rng.choice((None, seeds.kinds["questions"][0]))
    if questions is not None:
        (out / "question.jsonl").write_bytes(questions.content)
    convert(
        str(path),
        ConvertOptions(
            to=rng.choice(KINDS),
            output=str(out / "made.jsonl"),
            generator=rng.choice((None, "m")),
            questions=None if questions is None else str(out / "question.jsonl"),
            turn=rng.choice((1, 2)),
        ),
    )


def _interchange(path, out, rng, seeds):
    (read_alpaca_annotations if path.name.startswith("ann") else read_mt_bench_judgements)(path)


def _metrics(path, out, rng, seeds):
    for line in path.read_bytes().split(b"\n"):
        _step_of(line)
    stability(read_metrics(path))


def _reported_run(path, out, rng, seeds):
    (path / METRICS_FILE).write_bytes(seeds.kinds["metrics"][0].content)
    _report([path])


def _reported_log(path, out, rng, seeds):
    run = out / "run"
    write_run_file(run, **seeds.identity)
    (run / METRICS_FILE).write_bytes(path.read_bytes())
    _report([run])


def _reported_answers(path, out, rng, seeds):
    evaluation = out / "evaluation" / "p"
    evaluation.mkdir(parents=True)
    (evaluation / MEASURES_FILE).write_bytes(seeds.kinds["measures"][0].content)
    (evaluation / "generations.jsonl").write_bytes(path.read_bytes())
    _report([evaluation])


def _reported_measures(path, out, rng, seeds):
    evaluation = out / "evaluation" / "p"
    evaluation.mkdir(parents=True)
    (evaluation / MEASURES_FILE).write_bytes(path.read_bytes())
    _report([evaluation])


def _report(runs):
    report = build_report(runs)
    report_page(report).encode()
    report_markdown(report).encode()


def _verdicts(path, out, rng, seeds):
    cache = VerdictCache(path)
    cache.get("k")
    cache.put("b", "\ud800", "\ud800") if rng.random() < 0.5 else cache.put("a", "b", "c")
    cache.close()


def _text_of(path):
    content = path.read_bytes()
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _reply(path, out, rng, seeds):
    try:
        answer = read_reply(_text_of(path), 3)
    except ReplyError:
        return
    for choice in answer.choices:
        parse_verdict(choice.text, choice.finish_reason, VERDICTS)
    json.dumps([answer.tokens_in, answer.tokens_out], allow_nan=False)


def _verdict(path, out, rng, seeds):
    parse_verdict(_text_of(path) * rng.choice((1, 1, 1000)), "stop", VERDICTS)


def _wait(path, out, rng, seeds):
    seconds = retry_after({rng.choice(("retry-after", "retry-after-ms")): _text_of(path)})
    assert seconds >= 0


def _run(path, out, rng, seeds):
    read_run_file(path)
    check_same_run(path, seeds.identity)
    subjects_of([str(path)])
    flags = {"chat_template": None, "chat_template_kwargs": None, "tools": None}
    template_of(_Options(**flags), CHAT, str(path), report=str)
    relocated("/a/b", path)


@dataclass
class _Options:
    chat_template: str | None = None
    chat_template_kwargs: Any = None
    tools: Any = None
    template_date: str | None = None
    rest: dict[str, Any] = field(default_factory=dict)


def _checkpoints(path, out, rng, seeds):
    odd = rng.choice(("checkpoint-²", "checkpoint-", "checkpoint-1e3", "checkpoint-" + "9" * 50))
    (path / odd).mkdir()
    (path / odd / "trainer_state.json").write_text("{}")
    found = last_checkpoint(path, quiet=True)
    if found is not None:
        TrainerState.load_from_json(str(found / "trainer_state.json"))
        check_same_run(found, seeds.identity)


def _lock(path, out, rng, seeds):
    holder = Holder.read(path)
    if holder is not None:
        holder.has_ended(locks_work=False)
        str(holder)


def _baseline(path, out, rng, seeds):
    read_baseline(path.parent)


def _optimizer(path, out, rng, seeds):
    baseline = StateBaseline(4, 3)
    optimizer = torch.optim.AdamW(baseline.parameters())
    load_optimizer(optimizer, path)
    baseline(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def _prepared(path, out, rng, seeds):
    prepare_pairs(WORD_ROWS, TOKENIZER, **_LIMITS, cache_dir=path).summary()


def _adapter(path, out, rng, seeds):
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # a base may look like a hub name
        chain_of(path)


READERS = {
    "rows": Reader(_read_rows, "data"),
    "rows again": Reader(_read_rows, "data"),
    "prepared rows": Reader(_read_prepared, "data"),
    "prompts": Reader(_read_questions, "data"),
    "inspect-data": Reader(_inspect, "data"),
    "lists": Reader(_from_list, "data"),
    "recipe": Reader(_recipe, "recipe"),
    "recipe of evaluate": Reader(_evaluate_recipe, "recipe evaluate"),
    "recipe of train-reward": Reader(_reward_recipe, "recipe reward"),
    "task file": Reader(_task, "task"),
    "suite": Reader(_suite, "suite"),
    "flags": Reader(_flags, "flags"),
    "generations": Reader(_generations, "generations"),
    "resumed generations": Reader(_resumed, "generations"),
    "settings": Reader(_settings, "settings"),
    "judgements": Reader(_judgements, "judgements"),
    "sheet": Reader(_sheet, "sheet"),
    "measures": Reader(_measures, "measures"),
    "convert": Reader(_converted, "answers"),
    "annotations": Reader(_interchange, "annotations"),
    "games": Reader(_interchange, "games"),
    "metrics": Reader(_metrics, "metrics"),
    "report of run.json": Reader(_reported_run, "run.json"),
    "report of metrics": Reader(_reported_log, "metrics"),
    "report of measures": Reader(_reported_measures, "measures"),
    "report of answers": Reader(_reported_answers, "generations"),
    "verdict cache": Reader(_verdicts, "verdicts"),
    "reply": Reader(_reply, "reply"),
    "verdict": Reader(_verdict, "verdict"),
    "retry-after": Reader(_wait, "wait"),
    "run.json": Reader(_run, "run.json"),
    "checkpoints": Reader(_checkpoints, "checkpoints"),
    "lock": Reader(_lock, "lock"),
    "metric sums": Reader(lambda path, *_: MetricSums.read(path), "sums"),
    "state baseline": Reader(_baseline, "baseline"),
    "baseline's optimizer": Reader(_optimizer, "optimizer"),
    "token scores": Reader(lambda path, *_: TokenContrast.open(path), "scores"),
    "prepared cache": Reader(_prepared, "prepared"),
    "reference cache": Reader(lambda path, *_: find_flaw(path), "entry"),
    "adapter": Reader(_adapter, "adapter"),
}
