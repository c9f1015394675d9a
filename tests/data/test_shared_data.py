"""Real benchmark files: every file that a form fits is read whole, and has the rows that its README says."""

import pytest

from corelora.data.check import check_data
from corelora.data.forms import FORMS
from corelora.data.glue import GLUE
from corelora.data.sources import read_rows
from corelora.errors import CoreLoraError
from corelora.recipe.schema import DataPart, SourcePart
from data.conftest import shared_data

SHARED = shared_data()
pytestmark = pytest.mark.skipif(SHARED is None, reason="no ../shared/data and no CORELORA_SHARED_DATA on this machine")

FILES = [
    ("commonsense", "commonsense/arc_challenge_test.jsonl", 1172),
    ("commonsense", "commonsense/arc_challenge_train.jsonl", 1119),
    ("commonsense", "commonsense/arc_easy_test.jsonl", 2376),
    ("commonsense", "commonsense/arc_easy_train.jsonl", 2251),
    ("commonsense", "commonsense/boolq_test.jsonl", 3270),
    ("commonsense", "commonsense/boolq_train.jsonl.gz", 9427),
    ("commonsense", "commonsense/hellaswag_test_1000.jsonl", 1000),
    ("commonsense", "commonsense/hellaswag_train_1000.jsonl", 1000),
    ("commonsense", "commonsense/obqa_test.jsonl", 500),
    ("commonsense", "commonsense/obqa_train.jsonl", 4957),
    ("commonsense", "commonsense/piqa_test.jsonl", 1838),
    ("commonsense", "commonsense/siqa_test.jsonl", 1954),
    ("commonsense", "commonsense/winogrande_test.jsonl", 1267),
    ("cola", "glue/cola_dev.jsonl", 1043),
    ("cola", "glue/cola_train.jsonl", 8551),
    ("mnli", "glue/mnli_dev_matched.jsonl.gz", 9815),
    ("mnli", "glue/mnli_train_10k.jsonl.gz", 9999),
    ("mrpc", "glue/mrpc_dev.jsonl", 408),
    ("mrpc", "glue/mrpc_train.jsonl", 3668),
    ("qnli", "glue/qnli_dev.jsonl", 5463),
    ("qnli", "glue/qnli_train_10k.jsonl.gz", 9999),
    ("qqp", "glue/qqp_train_10k.jsonl", 9999),
    ("qqp", "glue/qqp_train_part2.jsonl.gz", 22869),
    ("rte", "glue/rte_dev.jsonl", 277),
    ("rte", "glue/rte_train.jsonl", 2490),
    ("sst2", "glue/sst2_dev.jsonl", 872),
    ("sst2", "glue/sst2_train.jsonl.gz", 67349),
    ("stsb", "glue/stsb_dev.jsonl", 1500),
    ("stsb", "glue/stsb_train.jsonl", 5749),
    ("alpaca", "instruct/alpaca_1k.jsonl", 1000),
    ("evol_instruct", "instruct/alpaca_eval.jsonl", 805),
    ("alpaca", "instruct/new_codealpaca.jsonl.gz", 4535),
    ("gsm8k", "math/gsm8k_test.jsonl", 1319),
    ("gsm8k", "math/gsm8k_train.jsonl.gz", 7473),
    ("alpaca", "math/llm_adapters/addsub_test.jsonl", 395),
    ("alpaca", "math/llm_adapters/aqua_test.jsonl", 254),
    ("alpaca", "math/llm_adapters/multiarith_test.jsonl", 600),
    ("alpaca", "math/llm_adapters/singleeq_test.jsonl", 508),
    ("alpaca", "math/llm_adapters/svamp_test.jsonl", 1000),
]


@pytest.mark.parametrize(("form", "name", "count"), FILES, ids=[f[1] for f in FILES])
def test_a_file_has_all_its_rows(form, name, count):
    data = DataPart(train=SourcePart(path=str(SHARED / name)), form=form)
    assert check_data(data) == []
    rows = read_rows(data.train, (FORMS.get(form) or GLUE[form]).columns)
    assert len(rows) == count
    assert rows.where(count - 1) == f"{name.split('/')[-1]} line {count}"


def test_math_has_its_columns_under_other_names():
    source = SourcePart(path=str(SHARED / "math/math_test.jsonl.gz"))
    rows = read_rows(source, FORMS["gsm8k"].columns, {"question": "problem", "answer": "solution"})
    assert len(rows) == 5000


def test_empty_responses_of_real_files_are_refused_by_line():
    def bad(name):
        with pytest.raises(CoreLoraError) as raised:
            read_rows(SourcePart(path=str(SHARED / name)), FORMS["alpaca"].columns)
        return str(raised.value)

    empty = "column 'output' is empty: the response is missing"
    message = bad("instruct/code_alpaca_2k.jsonl")
    assert "2 bad rows" in message
    assert f"code_alpaca_2k.jsonl line 238: {empty}" in message
    assert f"code_alpaca_2k.jsonl line 1860: {empty}" in message
    message = bad("math/llm_adapters/mawps_test.jsonl")
    assert "238 bad rows" in message
    assert f"mawps_test.jsonl line 1: {empty}" in message
    assert message.endswith("and 228 more bad rows")
