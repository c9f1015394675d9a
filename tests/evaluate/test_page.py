"""The page of a run: what is on it, that text of a model stays text, that it needs nothing from outside."""

import json
import re
from html.parser import HTMLParser

import pytest

from corelora.cli import main
from corelora.errors import CoreLoraError
from corelora.evaluate.page import SHOWN, report


@pytest.fixture
def run(tmp_path):
    """A run with a curve and one evaluated suite, whose first output is hostile."""
    (tmp_path / "eval").mkdir()
    samples = [
        {"id": f"t/{n}", "prompt": "2 + 2?", "output": str(n), "read": str(n), "right": n == 4}
        for n in range(SHOWN + 3)
    ]
    samples[0]["output"] = "<script>alert(1)</script>"
    suite = {
        "suite": "toy",
        "version": 3,
        "protocol": "paper",
        "model": "base",
        "adapter": "run/adapter",
        "dtype": "bfloat16",
        "device": "cpu",
        "settings": {"batch_size": 8},
        "seconds": 2.0,
        "skipped": ["other"],
        "notes": ["a note"],
        "scores": {"toy acc": {"value": 0.125, "stderr": 0.01, "n": 8}},
        "samples": samples,
    }
    (tmp_path / "eval" / "toy-paper.json").write_text(json.dumps(suite))
    rows = [{"step": n, "loss": 2.0 / n} for n in range(1, 9)] + [{"step": 8, "test_loss": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    results = {"method": "nlora", "trained_parameters": 1234, "test_loss": 0.3, "seconds": 9}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


class _Balanced(HTMLParser):
    """Counts what is opened and closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """A tag that closes itself."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(run, capsys):
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "12.50 ± 1.00" in text
    assert "nlora · 1,234 trained parameters · test loss 0.3000" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script" not in text
    assert "3 more are in the JSON file" in text
    assert "depend on the batch size" in text
    assert "skipped: other" in text
    assert text.count("<circle") == 1
    assert not re.search(r"https?://|src=|href=", text), "nothing from outside"
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_nothing_to_report(tmp_path):
    with pytest.raises(CoreLoraError, match="train or evaluate first"):
        report(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "x.json").write_text("{")
    with pytest.raises(CoreLoraError, match="not a result file"):
        report(tmp_path)
