"""Prepared data from the cache is what was prepared, and never what something else was."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from datetime import date

import datasets
import pytest

from tokenratio.data import DataSource, Selection, encoder, prepare_completions, prepare_pairs
from tokenratio.data import preparation as preparation_module
from tokenratio.data.encoder import map_in_processes
from tokenratio.data.prepared_cache import tokenizer_digest
from tokenratio.data.template import TemplateSettings
from tokenratio.errors import TokenRatioError

DATED = "{{ strftime_now('%d') }}"
LIMITS = {"max_length": 24, "max_prompt_length": 9}


def turns(role, content):
    return [{"role": role, "content": content}]


def rows(num=30):
    good = [
        {
            "prompt": turns("user", f"the sky is {'so ' * i}"),
            "chosen": turns("assistant", f"good {'a ' * (i % 9)}"),
            "rejected": turns("assistant", f"bad {'b ' * (i % 7)}\ufffd"),
        }
        for i in range(num)
    ]
    return [*good, good[0], {"prompt": "x"}, {**good[1], "chosen": turns("assistant", " ")}]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()) + "no json\n", "utf-8")
    return path


def entries(folder):
    return sorted(path for path in folder.iterdir()) if folder.is_dir() else []


def same(a, b):
    """Everything but where it was read from."""
    assert replace(a, dataset=None, read_from=None) == replace(b, dataset=None, read_from=None)
    assert a.report.summary() == b.report.summary()
    assert json.dumps(a.identity()) == json.dumps(b.identity())
    assert a.dataset.features == b.dataset.features
    assert a.dataset.to_dict() == b.dataset.to_dict()
    assert (a.longest, a.largest_id) == (b.longest, b.largest_id)


@pytest.mark.parametrize("prepare", [prepare_pairs, prepare_completions])
def test_what_is_read_is_what_was_prepared(tmp_path, source, chat_tokenizer, prepare, monkeypatch):
    cache = tmp_path / "cache"
    plain = prepare(source, chat_tokenizer, **LIMITS)
    first = prepare(source, chat_tokenizer, **LIMITS, cache_dir=cache)
    assert first.read_from is None
    assert all((plain.report.warnings, plain.report.defects, plain.cuts))
    monkeypatch.setattr(preparation_module, "_prepare", None)  # it must not be called again
    second = prepare(source, chat_tokenizer, **LIMITS, cache_dir=cache)
    assert [second.read_from] == entries(cache)
    assert f"read from the cache: {second.read_from}" in second.summary()
    assert first.summary() == plain.report.summary()
    same(plain, first)
    same(plain, second)


def test_other_sources_have_entries_too(tmp_path, chat_tokenizer, source):
    cache = tmp_path / "cache"
    in_memory = datasets.Dataset.from_list(rows()[:30])
    split = datasets.DatasetDict({"train_prefs": in_memory, "train_sft": in_memory.select([0, 1])})
    mixed = [source, DataSource(rows()[:4], weight=1.5), in_memory.select(range(5, 9))]
    for given in (rows(), in_memory, in_memory.select([3, 5, 9]), split, mixed):
        fresh = prepare_pairs(given, chat_tokenizer, **LIMITS)
        assert prepare_pairs(given, chat_tokenizer, **LIMITS, cache_dir=cache).read_from is None
        again = prepare_pairs(given, chat_tokenizer, **LIMITS, cache_dir=cache)
        assert again.read_from is not None
        same(fresh, again)
    assert len(entries(cache)) == 5


@pytest.mark.slow
def test_every_ingredient_has_its_own_entry(
    tmp_path, source, make_tokenizer, chat_tokenizer, monkeypatch
):
    cache, template = tmp_path / "cache", chat_tokenizer.chat_template
    chat = {"eos": "<|im_end|>", "template": template}

    def fresh(tokenizer=None, given=source, **changed):
        tokenizer = tokenizer or make_tokenizer("bytes", **chat)
        arguments = {**LIMITS, "cache_dir": cache, **changed}
        data = prepare_pairs(given, tokenizer, **arguments)
        return data.read_from is None

    assert fresh()
    assert not fresh()
    assert fresh(max_length=25)
    assert fresh(max_prompt_length=8)
    assert fresh(template=TemplateSettings({"enable_thinking": False}))
    assert not fresh(template=TemplateSettings(day=date(1999, 1, 1)))  # this one writes no date
    dated = make_tokenizer("bytes", **chat | {"template": DATED + template})
    assert fresh(dated, template=TemplateSettings(day=date(1999, 1, 1)))
    assert fresh(dated, template=TemplateSettings(day=date(1999, 1, 2)))
    assert not fresh(dated, template=TemplateSettings(day=date(1999, 1, 1)))
    assert fresh(selection=Selection(max_samples=9))
    assert fresh(selection=Selection(max_samples=9, seed=1))
    assert fresh(make_tokenizer("bytes", bos=True, **chat))
    assert fresh(make_tokenizer("bytes", eos="</s>", template=template))
    assert fresh(make_tokenizer("bytes", eos="<|im_end|>", template=template + "{# other #}"))
    copy = source.with_name("copy.jsonl")
    copy.write_bytes(source.read_bytes())
    assert fresh(given=copy)  # its rows are called otherwise
    with source.open("a") as file:
        file.write(json.dumps(rows(2)[1]) + "\n")
    assert fresh()
    assert not fresh()
    assert not fresh(num_proc=2)
    monkeypatch.setattr("tokenratio.data.prepared_cache._code_digest", lambda: "other code")
    assert fresh()


def test_a_tokenizer_is_the_same_before_and_after_its_use(chat_tokenizer):
    before = tokenizer_digest(chat_tokenizer)
    chat_tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(chat_tokenizer) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change(path):
    path.write_text(path.read_text().replace('"rows_kept": 3', '"rows_kept": 4'))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rows.arrow", cut),
        ("rows.arrow", flip),
        ("rows.arrow", os.remove),
        ("account.json", cut),
        ("account.json", os.remove),
        ("account.json", change),
    ],
)
def test_a_damaged_entry_is_prepared_anew(tmp_path, source, chat_tokenizer, file, damage, caplog):
    cache = tmp_path / "cache"
    first = prepare_pairs(source, chat_tokenizer, **LIMITS, cache_dir=cache)
    (entry,) = entries(cache)
    damage(entry / file)
    second = prepare_pairs(source, chat_tokenizer, **LIMITS, cache_dir=cache)
    assert second.read_from is None
    assert "will be prepared again" in caplog.text
    same(first, second)
    assert prepare_pairs(source, chat_tokenizer, **LIMITS, cache_dir=cache).read_from == entry


def test_a_cache_that_cannot_be_written_is_said(tmp_path, source, chat_tokenizer, caplog):
    (tmp_path / "cache").write_text("a file")
    data = prepare_pairs(source, chat_tokenizer, **LIMITS, cache_dir=tmp_path / "cache")
    assert data.report.rows_kept == 31
    assert "cannot cache prepared data" in caplog.text


def test_bad_rows_stop_before_an_entry_is_made(tmp_path, source, chat_tokenizer):
    with pytest.raises(TokenRatioError, match=r"pairs\.jsonl:32"):
        prepare_pairs(
            source, chat_tokenizer, **LIMITS, on_bad_row="error", cache_dir=tmp_path / "cache"
        )
    assert not entries(tmp_path / "cache")


def _prepare_at_once(barrier, source, tokenizer, cache, results):
    barrier.wait()
    results.put(prepare_pairs(source, tokenizer, **LIMITS, cache_dir=cache).digest)


def test_processes_that_race_share_one_entry(tmp_path, source, chat_tokenizer):
    cache, context = tmp_path / "cache", multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (barrier, source, chat_tokenizer, cache, results)
    racers = [context.Process(target=_prepare_at_once, args=arguments) for _ in range(3)]
    for racer in racers:
        racer.start()
    digests = {results.get(timeout=60) for _ in racers}
    for racer in racers:
        racer.join()
    assert len(entries(cache)) == 1  # nothing unfinished is left either
    data = prepare_pairs(source, chat_tokenizer, **LIMITS, cache_dir=cache)
    assert digests == {data.digest}
    assert data.read_from is not None


@pytest.mark.parametrize("num_proc", [2, 3])
def test_several_processes_prepare_the_same(source, chat_tokenizer, num_proc, monkeypatch):
    monkeypatch.setattr(encoder, "_BATCH_SIZE", 7)
    same(
        prepare_pairs(source, chat_tokenizer, **LIMITS),
        prepare_pairs(source, chat_tokenizer, **LIMITS, num_proc=num_proc),
    )


def test_what_a_row_does_wrong_comes_back_from_another_process(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(encoder, "_BATCH_SIZE", 2)
    bad = {**rows(2)[0], "prompt": turns("user", "long " * 99)}
    given = [*rows(3)[:3], bad]
    limits = {"max_length": 24, "max_prompt_length": None, "num_proc": 2}
    data = prepare_pairs(given, chat_tokenizer, **limits)
    assert data.report.defect_counts == {"prompt fills max_length": 1}
    with pytest.raises(TokenRatioError, match="train_dataset:3: prompt fills max_length"):
        prepare_pairs(given, chat_tokenizer, **limits, on_bad_row="error")
    chat_tokenizer = type(chat_tokenizer)(tokenizer_object=chat_tokenizer._tokenizer, eos_token="a")
    with pytest.raises(TokenRatioError, match="no chat template"):
        prepare_pairs(given, chat_tokenizer, **limits)


def _die(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_a_message(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with pytest.raises(TokenRatioError, match="lower dataset_num_proc"):
        list(map_in_processes(_die, [1, 2, 3], 2))
    assert "TOKENIZERS_PARALLELISM" not in os.environ
