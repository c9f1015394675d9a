"""Readers of files: the same rows from every format, and every kind of damage named by its line."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corelora.data import files
from corelora.data.files import Item, find_files, read_items, split_of
from corelora.errors import CoreLoraError

ROWS = [
    {"query": 'a "quoted" one,\nover two lines', "response": "é 漢 🙂"},
    {"query": " b ", "response": "[1, 2] {"},
    {"query": "c" * 500, "response": "\\ \" ' ]"},
]


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def content(name, rows):
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()
    array = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    return {"jsonl": lines, "json": array, "lines.json": lines, "csv": as_csv(rows)}[name]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["jsonl", "json", "lines.json", "csv"])
def test_every_text_format_gives_the_same_rows(tmp_path, name, zipped):
    raw = content(name, ROWS)
    path = tmp_path / (f"rows.{name}" + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert [i.row for i in read_items(path)] == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    items = list(read_items(tmp_path / "rows.parquet"))
    assert [i.row for i in items] == ROWS
    assert [(i.place, i.unit) for i in items] == [(1, "row"), (2, "row"), (3, "row")]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 64, 1000])
def test_an_array_is_read_through_a_window_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    rows = [{"n": n, "x": [-1.5e-3, True, None, "\\u00e9\\n"], "deep": {"a": {"b": "]" * 70}}} for n in range(5)]
    for text in (json.dumps(rows), json.dumps(rows, indent=4), " [ ] ", "[]"):
        path = tmp_path / "rows.json"
        path.write_text(text)
        assert [i.row for i in read_items(path)] == json.loads(text)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    for name in ("jsonl", "json", "lines.json", "csv"):
        path = tmp_path / f"marked.{name}"
        path.write_bytes(b"\xef\xbb\xbf" + content(name, ROWS))
        assert [i.row for i in read_items(path)] == ROWS, name


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n  \n{"a": 2}')
    assert [(i.place, i.unit) for i in read_items(tmp_path / "a.jsonl")] == [(2, "line"), (5, "line")]
    (tmp_path / "a.csv").write_bytes(as_csv(ROWS))
    assert [i.place for i in read_items(tmp_path / "a.csv")] == [2, 4, 5], "the first row spans lines 2 and 3"


# name of the file, its bytes, good rows before the damage, its place, words of the message
DAMAGE = [
    ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', 2, "invalid JSON"),
    ("a.jsonl", b'{"a": 1}\n[1]\n', 2, "must be an object"),
    ("a.jsonl", b'{"a": 1}\n"text"\n', 2, "must be an object"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8 at byte 8"),
    ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"\n", 2, "invalid JSON"),
    ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n", 2, "invalid JSON"),
    ("a.json", b'[{"a": 1}, {"a": ' + b"1" * 5000 + b"}]", 2, "invalid JSON"),
    ("a.json", b'[{"a": 1}, ' + b"[" * 100_000, 2, "invalid JSON"),
    ("a.json", b'[{"a": 1}, {"a": tru}]', 2, "invalid JSON"),
    ("a.json", b'[{"a": 1}, 5]', 2, "must be an object"),
    ("a.json", b'[{"a": 1}, {"a": 2', 2, "invalid JSON"),
    ("a.json", b'[{"a": 1}, {"a": "never closed}]', 2, "invalid JSON"),
    ("a.json", b'[{"a": 1} {"a": 2}]', 2, "a comma or the end"),
    ("a.json", b'[{"a": 1}', 2, "a comma or the end"),
    ("a.json", b'[{"a": 1}, ]', 2, "invalid JSON"),
    ("a.json", b'[{"a": 1}] {"a": 2}', 2, "more behind the end"),
    ("a.json", b'[{"a": 1}, {"a": "\xff"}]', 1, "not UTF-8"),
    ("a.json", b'{"data": [\n{"a": 1}]}', 1, "invalid JSON"),
    ("a.csv", b"a,b\n1,2\n3\n", 3, "1 values, where the header has 2 columns"),
    ("a.csv", b"a,b\n1,2\n3,4,5\n", 3, "3 values"),
    ("a.csv", b'a,b\n1,2\n3,"4\n', 3, "cannot be read"),
    ("a.csv", b"a,a\n", 1, "'a' more than once"),
    ("a.csv", b"", 1, "no header"),
    ("a.csv", b"a,b\n1,\xff\n", 1, "not UTF-8"),
    ("a.parquet", b"PAR1 and no more", 1, "cannot be read"),
    ("a.parquet", b"", 1, "cannot be read"),
    ("a.jsonl.gz", b'{"a": 1}\n', 1, "broken gzip"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 5000)[:-20], None, "broken gzip"),
    ("a.csv.gz", gzip.compress(b"a\n1\n") + b"garbage", None, "broken gzip"),
]


@pytest.mark.parametrize(
    ("name", "raw", "place", "words"), DAMAGE, ids=[f"{n}-{d[0]}-{d[3]}" for n, d in enumerate(DAMAGE)]
)
def test_damage_is_named_by_its_line(tmp_path, name, raw, place, words):
    (tmp_path / name).write_bytes(raw)
    bad = [i for i in read_items(tmp_path / name) if i.problem]
    assert words in bad[0].problem
    assert bad[0].row is None
    if place is not None:
        assert bad[0].place == place


def test_a_bad_line_does_not_hide_the_rows_behind_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 3}\nmore nonsense\n')
    items = list(read_items(tmp_path / "a.jsonl"))
    assert [i.row for i in items] == [{"a": 1}, None, {"a": 3}, None]
    assert [i.place for i in items if i.problem] == [2, 4]


def test_a_long_csv_field_is_read_and_pythons_limit_put_back(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("a\n" + "x" * (before + 1) + "\n")
    (item,) = read_items(tmp_path / "a.csv")
    assert item == Item(2, row={"a": "x" * (before + 1)})
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["rows.txt", "rows.parquet.gz", "rows"])
def test_an_unknown_ending_names_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(CoreLoraError, match=r"\.jsonl \(\.gz\).*\.parquet"):
        list(read_items(tmp_path / name))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("gsm8k_test.jsonl.gz", "test"),
        ("mnli-dev-matched.csv", "validation"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("train/part1.jsonl", "train"),
        ("train/test.jsonl", "test"),
        ("contest.jsonl", None),
        ("trainer.json", None),
    ],
)
def test_a_split_is_a_word_of_the_name(tmp_path, path, split):
    assert split_of(tmp_path.relative_to(tmp_path) / path) == split


def test_files_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b_train.jsonl", "a_train.csv", "test.jsonl", "deep/train.json", "README.md", ".train.jsonl"):
        (tmp_path / name).write_text("")
    names = [str(p.relative_to(tmp_path)) for p in find_files(tmp_path, "train")]
    assert names == ["a_train.csv", "b_train.jsonl", "deep/train.json"]
    with pytest.raises(CoreLoraError, match=r"split 'dev'\. Found: test, train\."):
        find_files(tmp_path, "dev")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "rows.jsonl").write_text("")
    assert [p.name for p in find_files(tmp_path / "plain", "train")] == ["rows.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CoreLoraError, match="no file with rows"):
        find_files(tmp_path / "empty", "train")


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "gsm8k_train.jsonl").write_text("")
    with pytest.raises(CoreLoraError, match=r"no such file or folder\. Did you mean gsm8k_train\.jsonl\?"):
        find_files(tmp_path / "gsm8k_trian.jsonl", "train")
