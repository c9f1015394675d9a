"""HumanEval and MBPP: gold answers pass, wrong and empty ones don't, programs are found in replies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from corelora.evaluate.code_tasks import humaneval_code, humaneval_program, mbpp_code, mbpp_program, pass_at_k
from corelora.evaluate.sandbox import Limits, find_sandbox, run_programs

SHARED = Path(os.environ.get("CORELORA_SHARED_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
ROW = {
    "task_id": "toy/0",
    "entry_point": "double",
    "prompt": 'import math\n\ndef helper(x):\n    return x\n\ndef double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(helper(3)) == 6\n",
}
LIMITS = Limits(seconds=20)
needs_sandbox = pytest.mark.skipif(find_sandbox() is None, reason="neither bubblewrap nor user namespaces work here")


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a shared file."""
    path = SHARED / "code" / name
    if not path.exists():
        pytest.skip(f"{name} of the shared data is not on this machine")
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_sandbox
@pytest.mark.parametrize(
    ("reply", "passes"),
    [
        ("    return 2 * x\n", True),
        ("    return 2 * x\n\ndef other(x):\n    broken(", True),
        ("return 2 * x", True),
        ("Sure!\n```python\ndef double(x):\n    return x + x\n```\nThis doubles.", True),
        ("```python\nimport math\n\ndef double(x):\n    return int(math.fsum([x, x]))\n```", True),
        ("```\n    return x * 2\n```", True),
        ("```python\ndef double(x):\n    return x + x", True),
        ("def double(x):\n    return x + x\n", True),
        ("    return x\n", False),
        ("", False),
        ("I can't do that.", False),
        ("```python\ndef double(x):\n    return helper(x)\n\ndef helper(x):\n    return 4\n```", False),
        ("```python\ndef check(c):\n    pass\n\ndef double(x):\n    pass\n```", False),
    ],
)
def test_replies_to_humaneval(reply, passes):
    outcome = run_programs([humaneval_program(ROW, reply)], LIMITS)[0]
    assert outcome.passed is passes, outcome.why


def test_what_stands_before_the_function_is_kept():
    code = humaneval_code(ROW, "```python\ndef double(x):\n    return helper(x) * 2\n```")
    assert code.startswith("import math")
    assert code.count("def double") == 1
    assert "def helper" in code


def test_programs_in_mbpp_replies():
    assert mbpp_code("[BEGIN]\ndef f():\n    pass\n[DONE]\nmore").strip() == "def f():\n    pass"
    assert mbpp_code("text\n```python\na = 1\n```\nand\n```\nb = 2\n```").split() == ["a", "=", "1", "b", "=", "2"]
    assert mbpp_code("```sql\nselect\n```\n```python\na = 1\n```") == "a = 1"


@pytest.mark.parametrize(("n", "c", "k", "value"), [(1, 1, 1, 1.0), (10, 0, 5, 0.0), (4, 1, 2, 0.5), (5, 4, 2, 1.0)])
def test_pass_at_k(n, c, k, value):
    """1 - C(n-c, k) / C(n, k), worked out by hand."""
    assert pass_at_k(n, c, k) == pytest.approx(value)


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="at least 5 samples"):
        pass_at_k(3, 1, 5)


@pytest.mark.slow
@needs_sandbox
def test_humaneval_gold_and_wrong():
    """All 164 reference solutions pass; without them, and with a `pass`, none does."""
    found = rows("humaneval.jsonl")
    assert len(found) == 164
    gold = run_programs([humaneval_program(r, r["canonical_solution"]) for r in found], LIMITS)
    assert [r["task_id"] for r, o in zip(found, gold, strict=True) if not o.passed] == []
    replies = ["", "    pass\n", f"```python\ndef {found[2]['entry_point']}(*a):\n    return None\n```"]
    wrong = run_programs([humaneval_program(r, replies[n % 3]) for n, r in enumerate(found)], LIMITS)
    assert [r["task_id"] for r, o in zip(found, wrong, strict=True) if o.passed] == []


@pytest.mark.slow
@needs_sandbox
def test_mbpp_gold_and_wrong():
    """All 974 reference solutions pass, 367 and 927 (whose set-up needs the program's class) among them."""
    found = rows("mbpp.jsonl")
    assert len(found) == 974
    gold = run_programs([mbpp_program(r, r["code"]) for r in found], LIMITS)
    assert [r["task_id"] for r, o in zip(found, gold, strict=True) if not o.passed] == []
    part = found[::10]
    wrong = run_programs([mbpp_program(r, "" if n % 2 else "x = 1") for n, r in enumerate(part)], LIMITS)
    assert [r["task_id"] for r, o in zip(part, wrong, strict=True) if o.passed] == []
