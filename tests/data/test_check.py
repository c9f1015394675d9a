"""What a dry run says of a recipe's data: everything at once, quickly, without a model."""

import json

import pytest

from corelora.data import check_data, sources
from corelora.data.files import read_items
from corelora.data.forms import FORMS
from corelora.data.glue import GLUE
from corelora.recipe.schema import DataPart, SourcePart
from data.conftest import write_lines

ROWS = [{"query": f"q{n}", "response": f"r{n}"} for n in range(100)]


def part(path, form="metamath", **settings):
    return DataPart(**{"train": SourcePart(path=str(path)), "form": form, **settings})


def test_nothing_is_wrong(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    assert check_data(part(path, test=SourcePart(path=str(path), split="train[:5]"))) == []
    assert check_data(part(path), "instruct") == []
    assert check_data(part("built-in:word_problems", "word_problems")) == []
    assert check_data(part("meta-math/MetaMathQA")) == [], "a hub set is looked at when it is read"


def test_everything_is_told_at_once(tmp_path):
    write_lines(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "test.csv").write_text("querry,response\nq,\n")
    data = part(
        tmp_path / "trian.jsonl",
        columns={"responses": "r"},
        test=SourcePart(path=str(tmp_path / "test.csv")),
    )
    found = check_data(data)
    assert len(found) == 3
    assert found[0].startswith("data.columns: the form has no column 'responses'. Did you mean 'response'?")
    assert found[1].startswith("data.train: ")
    assert "Did you mean train.jsonl?" in found[1]
    assert found[2].startswith("data.test: ")
    assert "there is no column 'query'. Did you mean 'querry'?" in found[2]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "query,response\n")])
def test_a_file_without_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert check_data(part(tmp_path / name)) == [f"data.train: {tmp_path / name}: there is no row in it"]


def test_an_unknown_form_and_a_missing_file_together(tmp_path):
    found = check_data(part(tmp_path / "a.jsonl", "metamaths"))
    assert "data.form: unknown form 'metamaths'. Did you mean 'metamath'?" in found[0]
    assert "no such file" in found[1]
    known = found[0].split("Known: ")[1].strip(".").split(", ")
    assert set(known) == {*FORMS, *GLUE}


@pytest.mark.parametrize(("task", "form"), [("instruct", "sst2"), ("classify", "gsm8k")])
def test_a_form_of_the_other_task(tmp_path, task, form):
    path = write_lines(tmp_path / "a.jsonl", [{"sentence": "s", "label": 1, "question": "q", "answer": "a"}])
    assert "It is a form of the other task." in check_data(part(path, form), task)[0]
    assert check_data(part(path, form)) == []


def test_forms_that_would_fit_are_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    assert "its columns fit data.form: gsm8k" in check_data(part(path))[-1]


def test_first_rows_are_read_and_large_files_are_not(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.jsonl", []
    path.write_text('{"query": "q", "response": ""}\n{broken\n' + (json.dumps(ROWS[0]) + "\n") * 1000)

    def counted(path):
        for item in read_items(path):
            seen.append(item.place)
            yield item

    monkeypatch.setattr(sources, "read_items", counted)
    found = check_data(part(path))
    assert len(found) == 2
    assert "a.jsonl line 1: column 'response' is empty: the response is missing" in found[0]
    assert "a.jsonl line 2: invalid JSON" in found[1]
    assert max(seen) == 20


def test_a_prompt_that_cannot_hold_the_rows(tmp_path):
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": turns}] * 3)
    (found,) = check_data(part(path, "chat"))
    assert "a.jsonl line 1: prompt 'paper' holds one question and one reply, this row has 4 turns" in found
    assert check_data(part(path, "chat", prompt="chat")) == []


def test_packing_is_for_language_models(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"sentence": "s", "label": 1}])
    assert check_data(part(path, "sst2", packing=True)) == ["data.packing: GLUE rows are not packed; set it to false"]


@pytest.mark.parametrize("split", ["train[:", "dev"])
def test_bad_splits(tmp_path, split):
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", ROWS)
    data = DataPart(train=SourcePart(path=str(tmp_path / "set"), split=split), form="metamath")
    (found,) = check_data(data)
    assert f"split {split!r}" in found


def test_nothing_is_cached_or_written(tmp_path, cache):
    check_data(part(write_lines(tmp_path / "a.jsonl", ROWS)))
    assert not cache.exists()
