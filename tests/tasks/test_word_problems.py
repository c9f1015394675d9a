"""The built-in task: deterministic, honest splits, one rule to read answers."""

import re
import zlib

import pytest

from corelora.tasks import word_problems
from corelora.tasks.word_problems import (
    TEMPLATES,
    Problem,
    held_out_problems,
    is_held_out_pair,
    is_right,
    read_answer,
    scores,
    training_problems,
)


def test_same_seed_same_problems():
    assert training_problems(50, seed=3) == training_problems(50, seed=3)
    assert training_problems(50, seed=3) != training_problems(50, seed=4)


def test_the_problems_are_these():
    """Figures of different machines and times are about the same problems; a change of the generator shows here."""
    for made, checksum in ((training_problems(640), 20772835), (held_out_problems(210), 3511944714)):
        assert zlib.crc32("\n".join(f"{p.question} {p.solution}" for p in made).encode()) == checksum


def test_held_out_pairs_do_not_depend_on_order():
    pairs = [(a, b) for a in range(2, 60) for b in range(2, 60)]
    assert all(is_held_out_pair(a, b) == is_held_out_pair(b, a) for a, b in pairs)
    assert 0.2 < sum(is_held_out_pair(*pair) for pair in pairs) / len(pairs) < 0.3


def test_too_many_problems_is_an_error(monkeypatch):
    monkeypatch.setattr(word_problems, "_THINGS", ("apples",))
    monkeypatch.setattr(word_problems, "TEMPLATES", [t for t in TEMPLATES if t.name == "rows"])
    with pytest.raises(ValueError, match="100 different questions"):
        training_problems(100)


def test_templates_cover_the_kinds():
    assert len(TEMPLATES) >= 12
    assert {t.kind for t in TEMPLATES} == {"addition", "subtraction", "multiplication", "two steps"}
    assert sum(t.held_out for t in TEMPLATES) == 2


def test_training_never_sees_held_out_pairs_templates_or_questions():
    train, test = training_problems(3000), held_out_problems(400)
    seen = {frozenset(pair) for p in train for pair in p.pairs}  # 7 + 5 is 5 + 7
    assert not seen & {frozenset(pair) for p in test for pair in p.pairs}
    unseen_templates = {p.template for p in test} - {p.template for p in train}
    assert unseen_templates == {t.name for t in TEMPLATES if t.held_out}
    assert not {p.question for p in train} & {p.question for p in test}


def test_answers_are_right_by_a_second_route():
    """Every solution's steps are evaluated as Python and chain up to the answer; numbers come from the question."""
    for problem in training_problems(500) + held_out_problems(200):
        *steps, last = problem.solution.removesuffix(".").split(". ")
        for step in steps:
            left, *counted = re.split(" = |: |, ", step)
            assert eval(left) == int(counted[-1])
            assert counted == [str(n * int(counted[0])) for n in range(1, len(counted) + 1)]
        assert last == f"The answer is {problem.answer}"
        assert int(steps[-1].split(" ")[-1]) == problem.answer > 0
        assert read_answer(problem.solution) == problem.answer
        for number in problem.pairs[0]:
            assert str(number) in problem.question


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("The answer is 42.", 42),
        ("12 + 30 = 42", 42),
        ("It costs 1,024 dollars.", 1024),
        ("3.5", 3.5),
        ("the result is -7", -7),
        ("20 -13", 13),
        ("9-4", 4),
        ("First 7, then 9 apples, so 16 in total!", 16),
        ("no idea", None),
        ("", None),
        ("answer: 5 (five)", 5),
        ("1,2", 2),
        ("5.", 5),
        ("1,024.50 dollars", 1024.5),
        ("12,345,678", 12345678),
        ("between 1,000 and 2,000, so 3", 3),
        ("$-4", -4),
        ("-$4", -4),
        ("\u22127", -7),
        ("item-4", 4),
        ("(9) -4", 4),
        (".5 of it", 0.5),
        ("**18**.", 18),
        ("\\boxed{42}", 42),
        ("#### 16\n", 16),
        ("16 apples (12 + 4)", 4),
    ],
)
def test_last_number_of_a_reply(reply, value):
    assert read_answer(reply) == value


def test_scores_by_template():
    problems = [Problem(t, "addition", "q", "s", n, ()) for t, n in (("x", 4), ("x", 5), ("y", 6))]
    table = scores(problems, ["4", "no", "it is 6"])
    assert table["all"] == {"right": 2, "count": 3, "percent": 66.67}
    assert table["x"]["percent"] == 50
    assert table["y"]["percent"] == 100
    assert not is_right("", problems[0])
    assert not is_right("44", problems[0])
