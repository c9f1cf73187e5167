"""Reading: every format, and one bad line never loses a file."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from tokenratio.data import (
    DataSource,
    SourceRow,
    describe_splits,
    locate,
    read_rows,
    source_digest,
    source_name,
)
from tokenratio.data.sources import draw_worlds
from tokenratio.data.worlds import world_rows
from tokenratio.errors import TokenRatioError

ROWS = [
    {"prompt": "a\u2028b", "chosen": "x\x85y", "rejected": "z"},
    {"prompt": "ü", "chosen": "line\nbreak\r\n", "rejected": '"quoted", '},
]


def lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, fmt):
    if fmt == "jsonl":
        path.write_bytes(lines(*ROWS).encode())
    elif fmt == "json":
        path.write_bytes(json.dumps(ROWS, ensure_ascii=False, indent=1).encode())
    elif fmt == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write("prompt,chosen,rejected\r\n")
            for row in ROWS:
                file.write(",".join('"' + text.replace('"', '""') + '"' for text in row.values()))
                file.write("\r\n")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("fmt", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, fmt):
    path = tmp_path / f"pairs.{fmt}"
    write(path, fmt)
    rows = read_rows(path)
    assert [row.fields for row in rows] == ROWS
    assert rows[0].origin == {"csv": "pairs.csv:2"}.get(fmt, f"pairs.{fmt}:1")
    assert source_digest(rows) == source_digest(read_rows(ROWS))


@pytest.mark.parametrize("fmt", ["jsonl", "json", "csv"])
def test_byte_order_mark_and_gzip(tmp_path, fmt):
    plain, packed = tmp_path / f"a.{fmt}", tmp_path / f"b.{fmt}.gz"
    write(plain, fmt)
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes()))
    assert [row.fields for row in read_rows(packed)] == ROWS


def test_a_record_over_several_lines_is_named_by_its_first(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen\n"a\nb",c\n\nd,"e"\nf\n', encoding="utf-8", newline="")
    rows = read_rows(path)
    assert [row.origin for row in rows] == ["a.csv:2", "a.csv:5", "a.csv:6"]
    assert rows[2].problem == "it has 1 fields, the header 2"


def test_bad_lines_do_not_lose_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    digits = b'{"a": ' + b"9" * 5000 + b"}"
    path.write_bytes(
        b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\r\n'
        + digits
        + b"\n"
        + b"[" * 100_000
        + b'\n{"a": ["x"]}'
    )
    rows = read_rows(path)
    assert [row.fields for row in rows if row.problem is None] == [{"a": 1}, {"a": ["x"]}]
    assert {row.origin: row.problem for row in rows if row.problem} == {
        "a.jsonl:3": "not JSON: Expecting value (column 7)",
        "a.jsonl:4": "it holds a list, not an object",
        "a.jsonl:5": "not UTF-8: byte 0xff at offset 28 of the file",
        "a.jsonl:6": rows[4].problem,
        "a.jsonl:7": rows[5].problem,
    }
    assert path.read_bytes()[28] == 0xFF
    assert rows[-1].origin == "a.jsonl:8"


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("fmt", ["json", "csv"])
def test_not_utf8_names_byte_and_line(tmp_path, fmt, bom):
    path = tmp_path / f"a.{fmt}"
    path.write_bytes(bom + b'\n[{"a": "caf\xe9"}]')
    offset = path.read_bytes().index(b"\xe9")
    with pytest.raises(TokenRatioError, match=rf"not UTF-8: byte 0xe9 at offset {offset}, line 2"):
        read_rows(path)


def test_json_lines_named_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(lines(*ROWS), encoding="utf-8")
    assert [row.fields for row in read_rows(path)] == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[{]", "not JSON"),
        ("a.csv", 'a,b\n"x"y,z\n', "broken CSV near line 2"),
        ("a.csv", 'a,b\nx,"y\n', "broken CSV near line"),
        ("a.csv", "a,a\nx,y\n", "duplicate column names"),
        ("a.parquet", "no parquet", "Parquet"),
        ("a.txt", "", "not one of"),
        ("a.jsonl.gz", "no gzip", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TokenRatioError, match=message) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_csv_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"a\n{'x' * 200_000}\n", encoding="utf-8")
    assert len(read_rows(path)[0].fields["a"]) == 200_000


def test_folder_takes_the_files_of_its_split(tmp_path):
    for name in ("train-1", "train-0", "test", "notes"):
        (tmp_path / f"{name}.jsonl").write_text(lines({"name": name}), encoding="utf-8")
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    names = {
        split: [row.fields["name"] for row in read_rows(tmp_path, split=split)]
        for split in ("train", "test")
    }
    assert names == {"train": ["train-0", "train-1"], "test": ["test"]}
    assert len(read_rows(tmp_path, split="all")) == 4
    with pytest.raises(TokenRatioError, match=r"no split 'validation'; it has: test, train"):
        read_rows(tmp_path, split="validation")


def test_folder_without_splits_is_read_whole(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "all.jsonl").write_text(lines({"n": 1}), encoding="utf-8")
    (tmp_path / "deep" / "b.csv").write_text("n\n2\n", encoding="utf-8")
    assert [row.origin for row in read_rows(str(tmp_path))] == ["all.jsonl:1", "deep/b.csv:2"]


def test_folder_without_data(tmp_path):
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    with pytest.raises(TokenRatioError, match=r"no \.json, \.jsonl, \.csv, \.parquet file"):
        read_rows(tmp_path)


def test_datasets(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    rows = read_rows(data)
    assert [row.fields for row in rows] == ROWS
    assert rows[1].origin == "train_dataset:1"
    splits = datasets.DatasetDict(test=data, train=data)
    assert read_rows(splits, split="test")[0].origin == "test_dataset:0"
    assert len(read_rows(splits, split="all")) == 4
    with pytest.raises(TokenRatioError, match="several splits: test, train"):
        read_rows(splits, split=None)
    with pytest.raises(TokenRatioError, match="no split 'dev'"):
        read_rows(splits, split="dev")
    for stream in (data.to_iterable_dataset(), datasets.IterableDatasetDict()):
        with pytest.raises(TokenRatioError, match="Streaming"):
            read_rows(stream)
    with pytest.raises(TokenRatioError, match="int is not a data source"):
        read_rows(3)


def test_lists_keep_what_is_no_row():
    rows = read_rows([{"a": 1}, "text", {1: 2}], split="eval")
    assert rows[0] == SourceRow("eval_dataset:0", {"a": 1})
    assert rows[1].problem == "it holds a string, not an object"
    assert rows[2].problem == "the key 1 is not text"


def test_hub_names(monkeypatch):
    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        if name == "org/gone":
            raise ConnectionError("Couldn't reach 'org/gone' on the Hub\n(offline)")
        return datasets.Dataset.from_list(ROWS)

    def offline(*_):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    monkeypatch.setattr(datasets, "get_dataset_config_names", offline)
    assert read_rows("org/name:part", split="test_prefs")[1].origin == "org/name[test_prefs]:1"
    assert asked == [("org/name", "part", "test_prefs")]
    with pytest.raises(
        TokenRatioError, match="org/gone: no such file or folder here, and not"
    ) as gone:
        read_rows("org/gone")
    assert "\n" not in str(gone.value)
    for path in ("data/pairs.jsonl", "./data/pairs", "/no/such", "pairs"):
        with pytest.raises(TokenRatioError, match="no such file or folder"):
            read_rows(path)
    assert len(asked) == 2


def test_digest_sees_content_and_order_not_place(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(lines(*ROWS), encoding="utf-8")
    digest = source_digest(read_rows(ROWS))
    assert source_digest(read_rows(path)) == digest
    assert source_digest(read_rows(ROWS[::-1])) != digest
    assert source_digest(read_rows([{**ROWS[0], "chosen": "xy"}, ROWS[1]])) != digest
    assert source_digest(read_rows([*ROWS, "text"])) != source_digest(read_rows([*ROWS, {}]))
    assert len(source_digest(read_rows([{"a": "\ud800", "b": float("nan"), "c": object}]))) == 64


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":\r1}\r\n' + '{"a":\t"\u2028\u2029\x85"}'.encode())
    assert [(row.origin, row.fields["a"]) for row in read_rows(path)] == [
        ("a.jsonl:1", 1),
        ("a.jsonl:2", "\u2028\u2029\x85"),
    ]


WORLD = "world:reviews?pairs=4&seed=1"


@pytest.mark.parametrize("source", [WORLD, DataSource(WORLD), {"path": WORLD, "weight": 2.0}])
def test_a_world_is_a_source(source):
    rows = world_rows(WORLD)
    assert [row.fields for row in read_rows(source)] == rows
    assert read_rows(source)[0].origin == read_rows(rows)[0].origin == "train_dataset:0"
    assert describe_splits(source) == []
    assert WORLD in source_name(source)


def test_a_world_among_several_sources():
    both = [{"path": WORLD, "weight": 0.5}, ROWS]
    assert [part.weight for part in locate(both)] == [0.5, 1.0]
    assert [row.fields for row in read_rows(both)] == [*world_rows(WORLD), *ROWS]
    assert read_rows(both)[0].origin == "train_dataset 1:0"
    with pytest.raises(TokenRatioError, match="no world 'review'"):
        read_rows(["world:review?pairs=4", ROWS])


def test_the_split_of_a_world_is_an_option_of_it():
    """Beside the world it would be ignored, and the training prompts used."""
    with pytest.raises(TokenRatioError, match=r"write world:reviews\?pairs=4&seed=1&split=test"):
        DataSource(WORLD, split="test")
    with pytest.raises(TokenRatioError, match="'test' does not apply to a world"):
        draw_worlds({"path": WORLD, "split": "test"}, lambda prompts, num: [])


def test_responses_of_worlds_are_drawn_beforehand():
    def sampler(prompts, _):
        return [["good", "bad"]] * len(prompts)

    for source in (WORLD, {"path": WORLD}, DataSource(WORLD), [ROWS, {"path": WORLD}]):
        rows = read_rows(draw_worlds(source, sampler))[-4:]
        assert all(
            {row.fields["chosen"], row.fields["rejected"]} == {"good", "bad"} for row in rows
        )
    text = [{"prompt": WORLD, "chosen": "a", "rejected": "b"}]
    assert draw_worlds(text, sampler) is text
    assert draw_worlds(None, sampler) is None
