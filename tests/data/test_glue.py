"""The eight GLUE tasks: columns, labels, tokens, metrics."""

import math

import numpy as np
import pytest

from corelora.data.glue import GLUE, encode_pairs, metrics
from corelora.errors import CoreLoraError
from corelora.recipe.schema import DataPart, SourcePart
from data.conftest import byte_tokenizer, llama_tokenizer, write_lines

TEXTS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
LABELS = dict.fromkeys(TEXTS, 2) | {"mnli": 3, "stsb": 1}


def part(path, form, **settings):
    source = SourcePart(path=str(path))
    return DataPart(**{"train": source, "test": source, "form": form, "max_length": 40, "shuffle": False, **settings})


def rows_of(name, count=6):
    labels = [0.0, 2.5, 5.0] if name == "stsb" else range(LABELS[name])
    rows = [{"label": list(labels)[n % len(labels)], **{t: f"{t} {n}" for t in TEXTS[name]}} for n in range(count)]
    return [{"idx": 1, **row} for row in rows]


def test_the_table_is_glue():
    assert {name: task.texts for name, task in GLUE.items()} == TEXTS
    assert {name: len(task.labels) for name, task in GLUE.items()} == LABELS
    assert [name for name, task in GLUE.items() if task.kind == "regression"] == ["stsb"]
    assert {name: task.metrics for name, task in GLUE.items() if task.metrics != ("accuracy",)} == {
        "cola": ("matthews_correlation", "accuracy"),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearmanr"),
    }


@pytest.mark.parametrize("name", TEXTS)
def test_rows_become_tokens_and_labels(tmp_path, name):
    tokenizer, rows = byte_tokenizer(), rows_of(name)
    encoded = encode_pairs(part(write_lines(tmp_path / "a.jsonl", rows), name), "train", tokenizer)
    assert set(encoded.dataset.column_names) == {"input_ids", "attention_mask", "labels"}
    for made, row in zip(encoded.dataset, rows, strict=True):
        assert tokenizer.decode(made["input_ids"]) == "".join(row[t] for t in TEXTS[name])
        assert made["labels"] == row["label"]
        assert type(made["labels"]) is (float if name == "stsb" else int)
    assert encoded.counts["rows"] == 6
    assert encoded.counts["truncated"] == 0


def test_special_tokens_stand_where_the_tokenizer_puts_them(tmp_path):
    llama = llama_tokenizer()
    path = write_lines(tmp_path / "a.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 1}])
    ids = encode_pairs(part(path, "rte"), "train", llama).dataset[0]["input_ids"]
    assert ids == llama("a", "b")["input_ids"]
    assert ids.count(llama.bos_token_id) == 2


def test_long_pairs_are_cut_and_counted(tmp_path):
    rows = [{"sentence1": "a" * n, "sentence2": "b" * 8, "label": 0} for n in (2, 12, 13, 30)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    encoded = encode_pairs(part(path, "mrpc", max_length=20), "train", byte_tokenizer())
    assert [len(r["input_ids"]) for r in encoded.dataset] == [10, 20, 20, 20]
    assert encoded.counts["truncated"] == 2
    assert encoded.counts["tokens"] == 70
    assert "2 rows (50.00%) are cut at max_length: a.jsonl line 3, a.jsonl line 4" in encoded.summary()


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("mnli", 3, "3 is not between 0 and 2"),
        ("sst2", -1, "-1 is not between 0 and 1"),
        ("rte", "entailment", "a number is expected, found a text"),
        ("stsb", 5.2, "5.2 is not between 0 and 5"),
        ("cola", 0.5, "0.5 is not a whole number"),
        ("cola", None, "column 'label' has no value"),
    ],
)
def test_a_bad_label_is_named_by_file_and_line(tmp_path, name, label, words):
    rows = rows_of(name)
    rows[4]["label"] = label
    with pytest.raises(CoreLoraError) as raised:
        encode_pairs(part(write_lines(tmp_path / "a.jsonl", rows), name), "train", byte_tokenizer())
    assert "a.jsonl line 5: column 'label'" in str(raised.value)
    assert words in str(raised.value)


def test_renamed_columns_an_empty_text_and_the_seed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"s": "a" * n, "label": n % 2} for n in range(20)])
    data = part(path, "sst2", columns={"sentence": "s"}, shuffle=True)
    lengths = [
        [len(ids) for ids in encode_pairs(data, "train", byte_tokenizer(), s).dataset["input_ids"]] for s in (1, 2)
    ]
    assert lengths[0] != lengths[1]
    assert sorted(lengths[0]) == list(range(20))
    test = encode_pairs(data, "test", byte_tokenizer(), 1).dataset["input_ids"]
    assert [len(ids) for ids in test] == list(range(20))


# -- metrics, against their formulas ---------------------------------------------------------------------------------

TRUTH = np.array([1, 1, 1, 0, 0, 1, 0, 1])
GUESS = np.array([1, 0, 1, 0, 1, 1, 0, 1])  # true positives 4, false positives 1, false negatives 1, true negatives 2
LOGITS = np.stack([-GUESS + 0.3, GUESS - 0.3], axis=1) * 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sst2", {"accuracy": 6 / 8}),
        ("qnli", {"accuracy": 6 / 8}),
        ("rte", {"accuracy": 6 / 8}),
        ("mrpc", {"accuracy": 6 / 8, "f1": 8 / 10}),
        ("qqp", {"accuracy": 6 / 8, "f1": 8 / 10}),
        ("cola", {"matthews_correlation": (4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3), "accuracy": 6 / 8}),
    ],
)
def test_two_classes(name, expected):
    assert metrics(name, LOGITS, TRUTH) == pytest.approx(expected)
    assert list(metrics(name, LOGITS, TRUTH)) == list(expected)


def test_three_classes():
    assert metrics("mnli", np.eye(3)[[0, 1, 2, 2]], [0, 1, 2, 1]) == {"accuracy": 0.75}


def test_correlations():
    labels, scores = np.array([0.0, 1.0, 2.0, 5.0, 3.0]), np.array([1.0, 1.5, 2.0, 30.0, 1.8])
    a, b = labels - labels.mean(), scores - scores.mean()
    ranks = np.array([1, 2, 3, 5, 4]), np.array([1, 2, 4, 5, 3])
    rank_difference = ((ranks[0] - ranks[1]) ** 2).sum()
    expected = {"pearson": a @ b / math.sqrt((a @ a) * (b @ b)), "spearmanr": 1 - 6 * rank_difference / (5 * 24)}
    assert metrics("stsb", scores, labels) == pytest.approx(expected)
    assert metrics("stsb", scores[:, None], labels) == metrics("stsb", scores, labels)


def test_constant_predictions_score_zero_without_a_warning(recwarn):
    assert metrics("stsb", np.ones(4), [1.0, 2.0, 3.0, 4.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    constant = np.tile([0.0, 1.0], (4, 1))
    assert metrics("cola", constant, [0, 1, 0, 1])["matthews_correlation"] == 0.0
    assert metrics("mrpc", constant[:, ::-1], [0, 1, 0, 1]) == {"accuracy": 0.5, "f1": 0.0}
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "predictions", "words"),
    [
        ("sst2", np.zeros((8, 3)), r"predictions \[8, 2\] are expected"),
        ("sst2", np.zeros(8), r"predictions \[8, 2\] are expected"),
        ("sst2", np.zeros((7, 2)), "found"),
        ("sst2", np.full((8, 2), np.nan), "8 of 8 predictions are not finite"),
        ("stsb", np.zeros((8, 2)), r"predictions \[8, 1\] are expected"),
    ],
)
def test_predictions_that_cannot_be_scored(name, predictions, words):
    with pytest.raises(CoreLoraError, match=words):
        metrics(name, predictions, TRUTH)
