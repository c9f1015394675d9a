"""Answer readers: judged as a person would, gold answers right, wrong and empty ones not."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lm_eval.filters import build_filter_ensemble

from corelora.evaluate.harness import manager_for
from corelora.tasks.answers import READERS, choices_of, last_box, number_in, plain_latex

JUDGED = [json.loads(line) for line in (Path(__file__).parent / "judged_replies.jsonl").read_text().splitlines()]
SHARED = Path(os.environ.get("CORELORA_SHARED_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a shared file, which this machine may not have."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} of the shared data is not on this machine")
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def wrong_ones(reader: str, rows: list[dict[str, Any]], reply: Any) -> list[Any]:
    """Rows whose reply is not judged right."""
    r = READERS[reader]
    return [row for row in rows if not r.is_right(r.read(reply(row), row), row)]


@pytest.mark.parametrize("case", JUDGED, ids=lambda c: f"{c['reader']}: {c['why']}")
def test_judged_as_a_person_would(case):
    reader = READERS[case["reader"]]
    read = reader.read(case["reply"], case["row"])
    assert bool(reader.is_right(read, case["row"])) is case["right"], f"read {read!r}"


def test_there_are_enough_of_them():
    assert len(JUDGED) >= 60
    assert sum(not c["right"] for c in JUDGED) >= 15


@pytest.mark.parametrize("reader", ["gsm8k_paper", "gsm8k_flexible", "gsm8k_strict", "gsm8k_last"])
def test_gsm8k_gold(reader):
    found = rows("math/gsm8k_test.jsonl")
    assert len(found) == 1319
    assert wrong_ones(reader, found, READERS[reader].gold) == []
    assert len(wrong_ones(reader, found, lambda row: "")) == 1319
    assert len(wrong_ones(reader, found, lambda row: "The answer is: 987654321. #### 987654321")) == 1319


@pytest.mark.parametrize("reader", ["math_paper", "math_verify"])
def test_math_gold(reader):
    """All 5,000, as a stated answer and as the boxed answer of the published solution."""
    found = rows("math/math_test.jsonl.gz")
    assert len(found) == 5000
    assert wrong_ones(reader, found, READERS[reader].gold) == []
    assert wrong_ones(reader, found, lambda row: row["solution"]) == []
    assert len(wrong_ones(reader, found, lambda row: "")) == 5000


def test_math_wrong():
    """Another problem's answer is right only where it is the same value."""
    found = rows("math/math_test.jsonl.gz")[:400]
    reader = READERS["math_verify"]
    for row, other in pairwise(found):
        read = reader.read(f"\\boxed{{{other['answer']}}}", row)
        if plain_latex(row["answer"]) != plain_latex(other["answer"]) and reader.is_right(read, row):
            assert sorted(plain_latex(row["answer"])) == sorted(plain_latex(other["answer"])), (row["answer"], read)


@pytest.mark.parametrize("task", ["boolq", "piqa", "siqa", "winogrande", "arc_easy", "arc_challenge", "obqa"])
def test_commonsense_gold(task):
    found = rows(f"commonsense/{task}_test.jsonl")
    assert wrong_ones("choice", found, READERS["choice"].gold) == []
    assert len(wrong_ones("choice", found, lambda row: "")) == len(found)
    other = {id(row): next(c for c in choices_of(row) if c != row["answer"]) for row in found}
    assert len(wrong_ones("choice", found, lambda row: f"the correct answer is {other[id(row)]}")) == len(found)


def test_our_filters_are_the_harness_filters():
    """gsm8k_strict and gsm8k_last read what the harness's own filters read, on every hand-made reply."""
    config = manager_for("gsm8k").task_index["gsm8k"].cfg
    replies = [c["reply"] for c in JUDGED]
    for name, reader in (("strict-match", "gsm8k_strict"), ("flexible-extract", "gsm8k_last")):
        steps = next(f["filter"] for f in config["filter_list"] if f["name"] == name)
        parts = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in steps]
        ensemble = build_filter_ensemble(name, parts)
        instances = [_Instance(reply) for reply in replies]
        ensemble.apply(instances)
        theirs = [i.filtered_resps[name] for i in instances]
        ours = [READERS[reader].read(reply, {}) for reply in replies]
        assert ours == [None if t == "[invalid]" else t for t in theirs]


class _Instance:
    """What a filter looks at."""

    def __init__(self, reply: str) -> None:
        self.resps, self.doc, self.filtered_resps = [reply], {}, {}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a 5", "5"),
        ("1,000 and 2", "2"),
        ("3/4", "0.75"),
        ("1/3", "1/3"),
        ("$-5", "-5"),
        ("none", None),
    ],
)
def test_numbers(text, read):
    assert number_in(text) == read


def test_boxes():
    assert last_box(r"\boxed{a{b}c} and \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_box(r"\boxed 7.") == "7"
    assert last_box("no box") is None
