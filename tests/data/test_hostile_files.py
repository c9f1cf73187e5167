"""Data files that are made, or happen, to break a reader: a row is lost with its reason, or the
file is refused in one line; never more memory or time than the file deserves."""

import gzip
import json
import resource
import struct
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenratio.data import files, prepare_pairs, read_rows
from tokenratio.data.arrow_rows import check_arrow
from tokenratio.data.columns import SourceColumns
from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.errors import TokenRatioError

GOOD = {"prompt": "ash", "chosen": "bay", "rejected": "cow"}


def prepared(source, tokenizer):
    return prepare_pairs(source, tokenizer, max_length=32, max_prompt_length=None)


def defects(data):
    return [(each.origin, each.detail) for each in data.report.defects]


def bad_utf8(*texts):
    """A column of text, its first value not UTF-8."""
    broken = pa.StringArray.from_buffers(
        1, pa.py_buffer(struct.pack("<ii", 0, 3)), pa.py_buffer(b"\xff\xfea")
    )
    return pa.concat_arrays([broken, pa.array(texts, pa.string())])


TABLE = {"prompt": ["ash", "bay"], "chosen": ["dew", "elm"], "rejected": ["fig", "gum"]}


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_one_bad_value_costs_one_row(tmp_path, tokenizer, kind):
    table = pa.table({**TABLE, "chosen": bad_utf8("elm")})
    source = str(tmp_path / "a.parquet")
    pq.write_table(table, source)
    if kind == "dataset":
        source = datasets.Dataset(table)
    data = prepared(source, tokenizer)
    assert (data.report.rows_read, data.report.rows_kept) == (2, 1)
    ((origin, detail),) = defects(data)
    assert origin == ("a.parquet:1" if kind == "parquet" else "train_dataset:0")
    assert detail.startswith("chosen cannot be read: 'utf-8' codec can't decode")


@pytest.mark.parametrize(
    "column",
    [
        bad_utf8("x"),
        pa.array([2**62, 0], pa.timestamp("us")),
        pa.array([2**30, 0], pa.date32()),
        pa.StructArray.from_arrays([pa.array([2**30, 0], pa.date32())], ["day"]),
    ],
)
def test_columns_that_are_not_used_cost_nothing(tmp_path, tokenizer, column):
    pq.write_table(pa.table({**TABLE, "when": column}), tmp_path / "a.parquet")
    data = prepared(str(tmp_path / "a.parquet"), tokenizer)
    assert data.report.rows_kept == 2
    assert prepared(str(tmp_path / "a.parquet"), tokenizer).digest == data.digest


def test_arrow_that_points_outside_itself_is_refused():
    """Reading it would be a segmentation fault."""
    for number, size in (("i", pa.string()), ("q", pa.large_string())):
        offsets = pa.py_buffer(struct.pack(f"<3{number}", 0, 10**9, 3))
        outside = pa.Array.from_buffers(size, 2, [None, offsets, pa.py_buffer(b"abc")])
        nested = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), outside)
        for column in (outside, nested):
            with pytest.raises(TokenRatioError, match="saved is damaged: column chosen: "):
                check_arrow(pa.table({"chosen": column}), "saved")
    check_arrow(pa.table({**TABLE, "chosen": bad_utf8("elm")}), "saved")


def test_parquet_without_columns_and_with_repeated_ones(tmp_path):
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(TokenRatioError, match="duplicate column names: prompt, prompt"):
        read_rows(tmp_path / "a.parquet")


def test_parquet_whose_columns_have_no_names(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["ash"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"prompt", b"pr\xeampt"))
    with pytest.raises(TokenRatioError, match=r"a\.parquet: cannot be read as Parquet: .*utf-8"):
        read_rows(path)


def test_long_lines_are_refused_without_being_read_whole(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    monkeypatch.setattr(files, "_MIB", 100)
    lines = [GOOD, {**GOOD, "chosen": "x" * 5000}, GOOD | {"prompt": "dew"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a.jsonl").write_text(text + '{"prompt": "' + "y" * 3000)
    data = prepared(tmp_path / "a.jsonl", tokenizer)
    assert (data.report.rows_read, data.report.rows_kept) == (4, 2)
    assert [origin for origin, _ in defects(data)] == ["a.jsonl:2", "a.jsonl:4"]
    assert "the line is longer than 10 MiB" in defects(data)[0][1]


def test_compressed_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ALWAYS_ALLOWED", 10_000)
    row = json.dumps(GOOD).encode() + b"\n"
    for name, content in (
        ("a.jsonl", row * 20_000),
        ("a.jsonl", b'{"a": "' + b"x" * 10**6),
        ("a.jsonl", b"\n" * 10**6),
        ("a.json", b"[" + b" " * 10**6 + b"]"),
        ("a.csv", b"a,b\n" * 10**6),
    ):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(content))
        with pytest.raises(TokenRatioError, match=r"expands to more than 100 times its size"):
            read_rows(path)
    path = tmp_path / "b.jsonl.gz"
    path.write_bytes(gzip.compress(row * 50))
    assert len(read_rows(path)) == 50


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_named(tmp_path, suffix, encoding):
    (tmp_path / f"a.{suffix}").write_bytes(json.dumps([GOOD]).encode(encoding))
    with pytest.raises(TokenRatioError, match=rf"a.{suffix}: UTF-16 or UTF-32, not UTF-8"):
        read_rows(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is given twice"),
        ('{"tools": [{"x": 1, "x": 2}]}', "the key 'x' is given twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "more than 100 levels"),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}", "more than 100 levels"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": "]"}', None),
    ],
)
def test_one_bad_object_costs_one_row(tmp_path, as_array, row, problem):
    good = json.dumps(GOOD)
    path = tmp_path / ("a.json" if as_array else "a.jsonl")
    lines = [good, row, good]
    path.write_text("[" + ", \n".join(lines) + "] " if as_array else "\n".join(lines))
    rows = read_rows(path)
    assert [each.origin for each in rows] == [f"{path.name}:{i}" for i in (1, 2, 3)]
    assert rows[0].fields == rows[2].fields == GOOD
    assert problem is None if rows[1].problem is None else problem in rows[1].problem


@pytest.mark.parametrize(
    "text", ["[1,]", "[1 2]", "[1] x", "[", "[1", '["a', "[,1]", "[[[", "[1]]"]
)
def test_broken_arrays_are_refused_whole(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(TokenRatioError, match=r"a\.json: not JSON: .*char \d+"):
        read_rows(tmp_path / "a.json")


def test_arrays_of_every_spacing(tmp_path):
    for text, num in (("[]", 0), (" [ ] ", 0), ("[1]", 1), ("\n[ {} ,{}\t]\n", 2), ('["a,]"]', 1)):
        (tmp_path / "a.json").write_text(text)
        assert len(read_rows(tmp_path / "a.json")) == num


def test_texts_that_hold_json_have_the_same_limits():
    for tools in ("[" * 200 + "]" * 200, '[{"name": "f", "name": "g"}]'):
        data = read_rows([{**GOOD, "tools": tools}])
        with pytest.raises(RowDefectError, match="tools is a string that is not JSON"):
            SourceColumns(data, "pair").parts(data[0])
    twice = '[{"role": "user", "content": "a", "content": "b"}]'
    row = {**GOOD, "prompt": json.dumps([{"role": "user", "content": "x"}])}
    data = read_rows([row, row, {**row, "prompt": twice}])
    columns = SourceColumns(data, "pair")
    with pytest.raises(RowDefectError, match="holds messages as JSON text in most rows, but not"):
        columns.parts(data[2])


def test_lists_that_are_not_json(tokenizer):
    loop = dict(GOOD)
    loop["extra"] = loop
    bad = [{**GOOD, "extra": {1: "a"}}, {1: "a", "b": 2}, loop, {**GOOD, "x": [{None: 1}]}]
    data = prepared([GOOD, *bad], tokenizer)
    assert data.report.rows_kept == 1
    assert {each.kind for each in data.report.defects} == {DefectKind.MALFORMED_ROW}
    assert "the key 1 is not text" in defects(data)[0][1]


def test_links(tmp_path):
    for name, target in (("train-0", "train-1.jsonl"), ("train-1", "train-0.jsonl")):
        (tmp_path / f"{name}.jsonl").symlink_to(target)  # a loop
    (tmp_path / "more").symlink_to(tmp_path)
    (tmp_path / "train-2.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(TokenRatioError, match=r"train-0\.jsonl: cannot be read: .*symbolic links"):
        read_rows(tmp_path)
    with pytest.raises(TokenRatioError, match="no such file"):
        read_rows(tmp_path / "train-0.jsonl")


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "x" * 5000, "a\0b", "x/" * 300])
def test_names_that_no_file_can_have(name):
    with pytest.raises(TokenRatioError, match="no such file or folder"):
        read_rows(name)


@pytest.mark.slow
def test_memory_of_a_long_line_is_bounded(tmp_path):
    """A line of 300 MB of brackets, which would be 15 GB of lists, takes little memory."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": [')
        for _ in range(300):
            file.write(b"[]," * (10**6 // 3))
        file.write(b"1]}\n" + json.dumps(GOOD).encode() + b"\n")
    code = (
        "import resource, sys\nfrom tokenratio.data import read_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"rows = read_rows({str(path)!r})\n"
        "assert [row.problem is None for row in rows] == [False, True]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300_000  # KiB: the limit of a line, with copies
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
