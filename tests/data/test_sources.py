"""Rows from files, folders, the hub and built-in sets: the same way, with their place, every mistake named."""

import gzip
import json
import os
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corelora.data import sources
from corelora.data.columns import Column
from corelora.data.sources import read_rows
from corelora.errors import CoreLoraError
from corelora.recipe.schema import SourcePart
from corelora.tasks.word_problems import held_out_problems, training_problems
from data.conftest import write_lines

TEXT = {"query": Column(), "response": Column(say="the response")}
NUMBERED = [{"query": f"q{n}", "response": f"r{n}", "unused": n} for n in range(1, 101)]


def source(path, **settings):
    return SourcePart(path=str(path), **settings)


def numbered(tmp_path, name="train.jsonl"):
    return write_lines(tmp_path / name, NUMBERED)


def bad(path, columns=TEXT, **settings):
    """The error that reading raises."""
    with pytest.raises(CoreLoraError) as raised:
        read_rows(source(path, **settings), columns)
    return str(raised.value)


def test_only_the_columns_asked_for_are_kept(tmp_path):
    rows = read_rows(source(numbered(tmp_path)), {"query": Column()})
    assert len(rows) == 100
    assert rows.dataset["query"][:] == [r["query"] for r in NUMBERED]
    assert "unused" not in rows.dataset.column_names
    assert "response" not in rows.dataset.column_names


@pytest.mark.parametrize(
    ("split", "first", "count"),
    [
        ("train", 1, 100),
        ("train[:7]", 1, 7),
        ("train[10:12]", 11, 2),
        ("train[-5:]", 96, 5),
        ("train[10%:30%]", 11, 20),
        ("train[95:1000]", 96, 5),
        (" train[:3] ", 1, 3),
    ],
)
def test_slices(tmp_path, split, first, count):
    rows = read_rows(source(numbered(tmp_path), split=split), TEXT)
    assert rows.dataset["query"][:] == [f"q{n}" for n in range(first, first + count)]
    assert rows.where(0) == f"train.jsonl line {first}"
    assert rows.where(count - 1) == f"train.jsonl line {first + count - 1}"


@pytest.mark.parametrize(
    "split", ["train[", "train[a:b]", "train+test", "", "train[:5]x", "train[50:50]", "train[200:]"]
)
def test_a_bad_slice_is_named(tmp_path, split):
    assert f"split {split!r}" in bad(numbered(tmp_path), split=split)


def test_places_survive_slices_and_shuffles(tmp_path):
    rows = read_rows(source(numbered(tmp_path), split="train[20:80]"), TEXT).shuffle(3).select([5, 1, 40])
    assert len(rows) == 3
    for n in range(3):
        line = int(rows.dataset[n]["query"][1:])
        assert rows.where(n) == f"train.jsonl line {line}"
    again = read_rows(source(numbered(tmp_path), split="train[20:80]"), TEXT).shuffle(3)
    assert again.dataset["query"][:] != [f"q{n}" for n in range(21, 81)]
    assert again.select([5, 1, 40]).dataset["query"][:] == rows.dataset["query"][:]


def test_a_folder_is_read_file_by_file(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "a_train.jsonl", NUMBERED[:2])
    (folder / "b_train.json").write_text(json.dumps(NUMBERED[2:4]))
    pq.write_table(pa.Table.from_pylist(NUMBERED[4:6]), folder / "c_train.parquet")
    (folder / "d_train.csv.gz").write_bytes(gzip.compress(b"query,response\nq7,r7\n"))
    write_lines(folder / "test.jsonl", NUMBERED[50:51])
    rows = read_rows(source(folder), TEXT)
    assert rows.dataset["query"][:] == [f"q{n}" for n in range(1, 8)]
    assert [rows.where(n) for n in (1, 2, 5, 6)] == [
        "a_train.jsonl line 2",
        "b_train.json row 1",
        "c_train.parquet row 2",
        "d_train.csv.gz line 2",
    ]
    assert read_rows(source(folder, split="test"), TEXT).dataset["query"][:] == ["q51"]


def test_columns_under_other_names(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "q", "response": "r"}])
    rows = read_rows(source(path), TEXT, {"query": "question"})
    assert rows.dataset[0]["query"] == "q"
    assert "Did you mean 'question'?" in _renamed_error(path, {"query": "questoin"})


def _renamed_error(path, names):
    with pytest.raises(CoreLoraError) as raised:
        read_rows(source(path), TEXT, names)
    return str(raised.value)


def test_missing_columns_are_named_once_a_file_with_the_nearest(tmp_path):
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "a.jsonl", [{"querry": "q", "answer": "r"}] * 50)
    write_lines(tmp_path / "set" / "b.jsonl", [{"query": "q", "reponse": "r"}] * 50)
    message = bad(tmp_path / "set")
    assert "a.jsonl: there is no column 'query'. Did you mean 'querry'? Columns: querry, answer." in message
    assert "b.jsonl: there is no column 'response'. Did you mean 'reponse'?" in message
    assert message.count("there is no column") == 3


def test_bad_rows_are_all_counted_and_the_first_named_by_line(tmp_path):
    good = {"query": "q", "response": "r"}
    lines = [json.dumps(row) for row in [good] * 60]
    lines[2] = '{"query": "q", "response": " \\n"}'
    lines[3] = '{"query": 5, "response": null}'
    lines[4] = "{broken"
    lines[5] = '{"query": "q"}'
    lines[6] = '{"query": "\\ud83d", "response": "r"}'
    lines[20:30] = ['["a list"]'] * 10
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    message = bad(tmp_path / "a.jsonl")
    assert "15 bad rows" in message
    assert "a.jsonl line 3: column 'response' is empty: the response is missing" in message
    assert "line 4: column 'query': a text is expected, found a number; column 'response' has no value" in message
    assert "line 5: invalid JSON" in message
    assert "line 6: there is no column 'response'" in message
    assert "line 7: column 'query': half of a surrogate pair" in message
    assert "line 21: a row must be an object" in message
    assert message.endswith("and 5 more bad rows")


def test_one_bad_row_is_one_sentence(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*NUMBERED, {"query": "q", "response": ""}])
    assert bad(path) == f"{path}: a.jsonl line 101: column 'response' is empty: the response is missing"


def test_a_broken_gzip_names_where_it_broke(tmp_path):
    raw = "".join(json.dumps({"query": os.urandom(40).hex(), "response": "r"}) + "\n" for _ in range(3000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw)[:-1000])
    message = bad(tmp_path / "a.jsonl.gz")
    assert "broken gzip" in message
    line = int(message.split("a.jsonl.gz line ")[1].split(":")[0])
    assert 2000 < line < 3000


def test_bad_data_leaves_nothing_in_the_cache(tmp_path, cache):
    bad(write_lines(tmp_path / "a.jsonl", [{"query": "q", "response": ""}]))
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_no_rows_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "there is no row in it" in bad(tmp_path / "a.jsonl")


def test_numbers_in_csv_and_json(tmp_path):
    (tmp_path / "a.csv").write_text("query,label\nq,1\nq,2.0\nq,\n")
    (tmp_path / "b.csv").write_text("query,label\nq,1\nq,2.0\n")
    write_lines(
        tmp_path / "a.jsonl", [{"query": "q", "label": v} for v in (1, "1", True, 1.5, 7, float("nan"), 10**400)]
    )
    columns = {"query": Column(), "label": Column(kind="whole", low=0, high=2)}
    assert "a.csv line 4: column 'label' has no value" in bad(tmp_path / "a.csv", columns)
    assert read_rows(source(tmp_path / "b.csv"), columns).dataset["label"][:] == [1, 2]
    message = bad(tmp_path / "a.jsonl", columns)
    assert "line 1:" not in message
    for line, words in [
        (2, "a number is expected, found a text"),
        (3, "a number is expected, found true or false"),
        (4, "1.5 is not a whole number"),
        (5, "7 is not between 0 and 2"),
        (6, "nan is no finite number"),
        (7, "the number is too large"),
    ]:
        assert f"line {line}: column 'label': {words}" in message


def test_read_once_until_a_file_changes(tmp_path, monkeypatch):
    path = numbered(tmp_path)
    first = read_rows(source(path), TEXT)

    def fail(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_write", fail)
        again = read_rows(source(path), TEXT)
        assert again.fingerprint == first.fingerprint
        assert again.dataset[:] == first.dataset[:]
        assert read_rows(source(path, split="train[:50]"), TEXT).fingerprint != first.fingerprint
    stat = path.stat()
    write_lines(path, [{**NUMBERED[0], "query": "Q1"}, *NUMBERED[1:]])  # as many bytes
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = read_rows(source(path), TEXT)
    assert changed.dataset[0]["query"] == "Q1"
    assert changed.fingerprint != first.fingerprint


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "file"))
    assert "Set CORELORA_CACHE to a folder with room" in bad(numbered(tmp_path))


def test_many_rows_are_never_all_in_memory(tmp_path):
    """30,000 rows, 36 MB on disk, in less than a fifth of that."""
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"query": f"q{n}", "response": "r" * 1200}) + "\n" for n in range(30_000))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = read_rows(source(tmp_path / "a.jsonl"), TEXT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 30_000
    assert peak < 7e6
    assert pa.total_allocated_bytes() - before < 4e6, "the rows are mapped from disk"
    assert rows.where(29_999) == "a.jsonl line 30000"


@pytest.mark.parametrize("split", ["train", "test"])
def test_built_in_word_problems(split):
    columns = {"question": Column(), "solution": Column(), "answer": Column(kind="whole")}
    rows = read_rows(SourcePart(path="built-in:word_problems", split=f"{split}[:30]"), columns)
    expected = {"train": training_problems, "test": held_out_problems}[split](30)
    assert rows.dataset["question"][:] == [p.question for p in expected]
    assert rows.dataset["answer"][:] == [p.answer for p in expected]
    assert rows.where(4) == f"word_problems {split} row 5"


def test_unknown_built_in_names_and_splits():
    assert "Did you mean 'word_problems'?" in bad("built-in:word_problem")
    assert "has no split 'dev'. Known: train, test." in bad("built-in:word_problems", split="dev")


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one set, and says what it was asked."""
    asked = []

    def load_dataset(path, name, *, split, revision):
        asked.append((path, name, split, revision))
        if path != "meta-math/MetaMathQA":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return datasets.Dataset.from_list([*NUMBERED, {"query": "q", "response": "", "unused": 0}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_rows_are_sliced_and_named_like_files(hub):
    columns = {"query": Column(), "response": Column(empty=True)}
    rows = read_rows(SourcePart(path="meta-math/MetaMathQA", split="train[10:20]", subset="s", revision="v1"), columns)
    assert hub == [("meta-math/MetaMathQA", "s", "train", "v1")]
    assert rows.dataset["query"][:] == [f"q{n}" for n in range(11, 21)]
    assert rows.where(0) == "meta-math/MetaMathQA train row 11"


def test_hub_rows_are_checked_like_files(hub):
    assert "meta-math/MetaMathQA train row 101: column 'response' is empty" in bad("meta-math/MetaMathQA")
    assert "there is no column 'text'" in bad("meta-math/MetaMathQA", {"text": Column()})


def test_what_is_neither_here_nor_on_the_hub(hub):
    message = bad("meta-math/MetaMathQB")
    assert "no such file or folder here, and it cannot be read from the hub" in message
    assert "doesn't exist on the Hub" in message
    bad("./meta-math/MetaMathQA")
    assert hub == [("meta-math/MetaMathQB", None, "train", None)], "what is written as a file is not looked for there"


def test_the_hub_cannot_be_reached():
    """The tests have no network, and a hub would not know this name: a sentence either way."""
    assert "it cannot be read from the hub" in bad("corelora/there-is-no-such-set")
