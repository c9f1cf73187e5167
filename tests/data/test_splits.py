"""Which split is read: never the sum of several, and always the one that was named."""

import json

import datasets
import pytest

from tokenratio.data import inspect_source, prepare_completions, prepare_pairs, read_rows
from tokenratio.data.prompts import read_prompts
from tokenratio.data.sources import locate
from tokenratio.errors import TokenRatioError

ULTRAFEEDBACK = ("train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft", "test_gen")
LIMITS = {"max_length": 64, "max_prompt_length": None}


def row(name):
    return {"prompt": "the sky", "chosen": f"good {name}", "rejected": f"bad {name}"}


def folder_of(path, *files):
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(json.dumps(row(file)) + "\n", encoding="utf-8")
    return path


def files_read(source, **options):
    return [row.origin.rpartition(":")[0] for row in read_rows(source, **options)]


@pytest.mark.parametrize(
    ("files", "split", "read"),
    [
        # Shards are one split, whatever their numbers look like.
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            "train",
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ),
        (
            ["train_1.jsonl", "train_2.jsonl", "dev.jsonl"],
            "train",
            ["train_1.jsonl", "train_2.jsonl"],
        ),
        (
            ["train.part-0.jsonl", "train.part-1.jsonl"],
            "train",
            ["train.part-0.jsonl", "train.part-1.jsonl"],
        ),
        # A subfolder names its files' split.
        (
            ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
            "train",
            ["train/a.jsonl", "train/b.jsonl"],
        ),
        # An exact name is taken before those that only begin alike.
        (["train.jsonl", "train_sft.jsonl"], "train", ["train.jsonl"]),
        # Other words for the three.
        (["training.jsonl", "dev.jsonl"], "train", ["training.jsonl"]),
        (["training.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (["train.jsonl", "eval.jsonl"], "test", ["eval.jsonl"]),
        # Where there is no test split, evaluation takes the validation split.
        (["train.jsonl", "val.jsonl"], "test", ["val.jsonl"]),
        # The only one that could be meant.
        (["ultra-train.jsonl", "ultra-test.jsonl"], "train", ["ultra-train.jsonl"]),
        (["train_v2.jsonl", "notes.jsonl"], "train", ["train_v2.jsonl"]),
        # A word that only begins like one is none; such a folder is read whole.
        (["trainer.jsonl", "testament.jsonl"], "train", ["testament.jsonl", "trainer.jsonl"]),
        (["eval_set.jsonl", "judged.jsonl"], "train", ["eval_set.jsonl", "judged.jsonl"]),
    ],
)
def test_files_of_one_split(tmp_path, files, split, read):
    assert files_read(folder_of(tmp_path, *files), split=split) == read


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        (["train_a.jsonl", "train_b.jsonl"], "train_a, train_b"),
        (["train_sft.jsonl", "train_gen.jsonl", "test.jsonl"], "train_gen, train_sft"),
        (["helpful/train.jsonl", "harmless/train.jsonl"], "harmless/train, helpful/train"),
        (["train_v1.jsonl", "train_v2.jsonl"], "train_v1, train_v2"),
    ],
)
def test_several_that_fit_are_a_question(tmp_path, files, listed):
    folder = folder_of(tmp_path, *files)
    with pytest.raises(TokenRatioError, match=f"several splits could be 'train': {listed}") as e:
        read_rows(folder)
    first = listed.split(",")[0]
    assert f"{folder}@{first}" in str(e.value)
    assert len(read_rows(f"{folder}@{first}")) == 1
    assert len(read_rows(folder, split="all")) == len(files)


def test_pairs_and_completions_prefer_the_split_made_for_them(tmp_path, tokenizer):
    folder = folder_of(tmp_path, *(f"data/{name}-00000-of-00001.jsonl" for name in ULTRAFEEDBACK))
    pairs = prepare_pairs(folder, tokenizer, **LIMITS)
    assert pairs.dataset["origin"] == ["data/train_prefs-00000-of-00001.jsonl:1"]
    said = pairs.report.summary()
    assert "1 row of split train_prefs" in said
    assert "not read: test_gen, test_prefs, test_sft, train_gen, train_sft" in said
    held_out = prepare_pairs(folder, tokenizer, **LIMITS, split="test")
    assert held_out.dataset["origin"] == ["data/test_prefs-00000-of-00001.jsonl:1"]
    completions = prepare_completions(folder, tokenizer, **LIMITS)
    assert completions.dataset["origin"] == ["data/train_sft-00000-of-00001.jsonl:1"]
    assert completions.report.to_dict()["sources"][0]["split"] == "train_sft"
    named = prepare_pairs(f"{folder}@train_gen", tokenizer, **LIMITS)
    assert named.dataset["origin"] == ["data/train_gen-00000-of-00001.jsonl:1"]
    assert "split train_prefs" in inspect_source(folder, tokenizer)


def splits(*names):
    return datasets.DatasetDict({name: datasets.Dataset.from_list([row(name)]) for name in names})


def test_a_dataset_dict_answers_as_a_folder_does(tokenizer):
    data = splits(*ULTRAFEEDBACK)
    assert prepare_pairs(data, tokenizer, **LIMITS).dataset["origin"] == [
        "train_dataset[train_prefs]:0"
    ]
    assert read_rows(data, split="test_sft")[0].fields == row("test_sft")
    with pytest.raises(TokenRatioError, match="could be 'train': train_a, train_b"):
        read_rows(splits("train_a", "train_b"))
    with pytest.raises(TokenRatioError, match="no split 'test'; it has: train"):
        read_rows(splits("train"), split="test")


def test_what_save_to_disk_wrote_is_read_without_its_descriptions(tmp_path):
    splits("train", "test").save_to_disk(tmp_path / "both")
    datasets.Dataset.from_list([row("x")]).save_to_disk(tmp_path / "one")
    assert [row.fields for row in read_rows(tmp_path / "both")] == [row("train")]
    assert [row.fields for row in read_rows(f"{tmp_path}/both@test")] == [row("test")]
    assert read_rows(tmp_path / "one")[0].origin == "one:0"


def test_the_only_split_needs_no_name(tmp_path):
    folder = folder_of(tmp_path, "test_prefs.jsonl")
    assert len(read_prompts(folder)) == 1
    folder_of(tmp_path, "train_prefs.jsonl")
    with pytest.raises(TokenRatioError, match="several splits: test_prefs, train_prefs"):
        read_prompts(folder)
    assert len(read_prompts(f"{folder}@test_prefs")) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uf@train_prfs", "no split 'train_prfs'; it has: test_prefs, train_prefs"),
        ("uf@train[:10]", "max_samples"),
        ("uf/train_prefs.jsonl@train", "is a single file and has no splits"),
        ("gone@train", "gone: no such file or folder"),
    ],
)
def test_split_names_that_do_not_fit(tmp_path, monkeypatch, name, message):
    folder_of(tmp_path / "uf", "train_prefs.jsonl", "test_prefs.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenRatioError, match=message):
        read_rows(name)


def test_a_path_with_the_sign_in_it_is_a_path(tmp_path):
    folder = folder_of(tmp_path / "mine@home", "train.jsonl", "test.jsonl")
    assert files_read(folder) == ["train.jsonl"]
    assert files_read(f"{folder}@test") == ["test.jsonl"]


@pytest.fixture
def hub(monkeypatch):
    """A hub of two data sets: UltraFeedback's splits, and one of two configurations."""
    loaded = []

    def split_names(name, config=None):
        if name == "org/two" and config not in ("a", "b"):
            raise ValueError("Config name is missing.")
        return list(ULTRAFEEDBACK) if name == "org/uf" else ["train"]

    def load(name, config, *, split):
        loaded.append((name, config, split))
        return datasets.Dataset.from_list([row(split)])

    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["a", "b"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    return loaded


def test_hub_names_with_configuration_and_split(hub, tokenizer):
    pairs = prepare_pairs("org/uf", tokenizer, **LIMITS)
    assert pairs.dataset["origin"] == ["org/uf[train_prefs]:0"]
    assert "not read: test_gen" in pairs.report.summary()
    read_rows("org/uf@test_gen")
    read_rows("org/two:b@train")
    read_rows({"path": "org/two", "config": "a"})
    assert hub == [
        ("org/uf", None, "train_prefs"),
        ("org/uf", None, "test_gen"),
        ("org/two", "b", "train"),
        ("org/two", "a", "train"),
    ]
    with pytest.raises(TokenRatioError, match="has several configurations; available: a, b"):
        read_rows("org/two")
    with pytest.raises(TokenRatioError, match="no configuration 'c'; available: a, b"):
        read_rows("org/two:c")
    with pytest.raises(TokenRatioError, match="several splits: test_gen"):
        locate("org/uf", split=None)
