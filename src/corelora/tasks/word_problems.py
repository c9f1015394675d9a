"""Arithmetic word problems, generated: a task that a small model learns in minutes and that no model has memorised.

Fourteen templates: addition, subtraction, multiplication and two steps. Two of them are held out whole, and held-out
problems of the others use number pairs that training never sees: a pair belongs to one side or the other by a fixed
rule (`is_held_out_pair`), whatever the template. An answer is read by one rule, the last number of the reply.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_NAMES = (
    "Ana",
    "Ben",
    "Chloe",
    "Dario",
    "Ella",
    "Farid",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kofi",
    "Lena",
    "Mina",
    "Omar",
)
_THINGS = ("apples", "marbles", "stickers", "pencils", "shells", "coins", "books", "cards", "buttons", "stamps")

_ADD, _SUB, _MUL = "+", "-", "*"
_APPLY: dict[str, Callable[[int, int], int]] = {
    _ADD: lambda a, b: a + b,
    _SUB: lambda a, b: a - b,
    _MUL: lambda a, b: a * b,
}


@dataclass(frozen=True)
class Template:
    """A text with slots {n}, {m} (names), {t} (a thing), {a}, {b}, {c} (numbers), and the operations on a, b, c.

    Attributes:
        name: unique.
        text: the problem.
        operations: one sign a step: a op b, then the result op c.
        held_out: training never sees this template.
    """

    name: str
    text: str
    operations: tuple[str, ...]
    held_out: bool = False

    @property
    def kind(self) -> str:
        """addition, subtraction, multiplication or two steps."""
        if len(self.operations) == 2:
            return "two steps"
        return {_ADD: "addition", _SUB: "subtraction", _MUL: "multiplication"}[self.operations[0]]


TEMPLATES = (
    Template("gift", "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?", (_ADD,)),
    Template("two_boxes", "One box holds {a} {t} and another holds {b} {t}. How many {t} are there in both?", (_ADD,)),
    Template("two_days", "{n} found {a} {t} on Monday and {b} on Tuesday. How many {t} is that together?", (_ADD,)),
    Template("older", "{n} is {a} years old. {m} is {b} years older. How old is {m}?", (_ADD,), held_out=True),
    Template("lost", "{n} had {a} {t} and lost {b} of them. How many {t} are left?", (_SUB,)),
    Template("sold", "A shop had {a} {t}. It sold {b}. How many {t} remain in the shop?", (_SUB,)),
    Template("more_than", "{n} has {a} {t} and {m} has {b}. How many more {t} does {n} have than {m}?", (_SUB,)),
    Template("bags", "{n} fills {a} bags with {b} {t} each. How many {t} is that in all?", (_MUL,)),
    Template("rows", "There are {a} rows of {b} {t}. How many {t} are there?", (_MUL,)),
    Template("price", "{n} buys {a} tickets at {b} dollars each. How many dollars is that?", (_MUL,)),
    Template(
        "bags_plus", "{n} has {a} bags with {b} {t} each and {c} loose ones. How many {t} does {n} have?", (_MUL, _ADD)
    ),
    Template(
        "buy_and_give", "{n} had {a} {t}, bought {b} more and gave {c} to {m}. How many {t} are left?", (_ADD, _SUB)
    ),
    Template(
        "eat_and_find", "{n} had {a} {t}, lost {b} and then found {c}. How many {t} does {n} have now?", (_SUB, _ADD)
    ),
    Template(
        "boxes_broken",
        "A van brings {a} crates with {b} lamps each. {c} lamps are broken. How many lamps are whole?",
        (_MUL, _SUB),
        held_out=True,
    ),
)


@dataclass(frozen=True)
class Problem:
    """One problem: its template's name, the question, the worked answer and the number that counts."""

    template: str
    kind: str
    question: str
    solution: str
    answer: int
    pairs: tuple[tuple[int, int], ...]


def is_held_out_pair(a: int, b: int) -> bool:
    """The fixed rule that gives about a quarter of all number pairs to the held-out side, without any pattern.

    The order does not count: who has learnt 7 + 5 knows 5 + 7.
    """
    return zlib.crc32(f"{min(a, b)},{max(a, b)}".encode()) % 4 == 0


def _numbers(operation: str, rng: random.Random) -> tuple[int, int]:
    """Small enough for a small model to know the facts: what it learns here is which fact a story asks for."""
    if operation == _MUL:
        return rng.randint(2, 7), rng.randint(2, 7)
    if operation == _ADD:
        return rng.randint(2, 12), rng.randint(2, 9)
    b = rng.randint(2, 9)
    return b + rng.randint(1, 10), b


def _worked(a: int, operation: str, b: int) -> str:
    """One step: "7 + 5 = 12", or for a product the count in steps of b, "3 * 4: 4, 8, 12".

    A small model that trains on facts alone forgets the products that it is not shown; counting carries over to them.
    """
    if operation == _MUL:
        return f"{a} * {b}: {', '.join(str(n * b) for n in range(1, a + 1))}"
    return f"{a} {operation} {b} = {_APPLY[operation](a, b)}"


def _draw(template: Template, rng: random.Random, held_out: bool) -> Problem:
    """One problem whose number pairs, at every step, are all on the asked side."""
    while True:
        a, b = _numbers(template.operations[0], rng)
        pairs, steps = [(a, b)], []
        result = _APPLY[template.operations[0]](a, b)
        steps.append(_worked(a, template.operations[0], b))
        c = rng.randint(2, 5)
        for operation in template.operations[1:]:
            pairs.append((result, c))
            after = _APPLY[operation](result, c)
            steps.append(_worked(result, operation, c))
            result = after
        if result > 0 and all(is_held_out_pair(*pair) == held_out for pair in pairs):
            break
    n, m = rng.sample(_NAMES, 2)
    question = template.text.format(n=n, m=m, t=rng.choice(_THINGS), a=a, b=b, c=c)
    solution = f"{'. '.join(steps)}. The answer is {result}."
    return Problem(template.name, template.kind, question, solution, result, tuple(pairs))


def training_problems(count: int, seed: int = 0) -> list[Problem]:
    """`count` problems from the training templates and training pairs, all questions different.

    Args:
        count: how many.
        seed: the same seed gives the same problems on every machine.
    """
    return _problems([t for t in TEMPLATES if not t.held_out], count, random.Random(seed), held_out=False)


def held_out_problems(count: int, seed: int = 1) -> list[Problem]:
    """`count` problems from all templates, the two unseen ones among them, with pairs that training never sees."""
    return _problems(list(TEMPLATES), count, random.Random(seed), held_out=True)


def _problems(templates: list[Template], count: int, rng: random.Random, held_out: bool) -> list[Problem]:
    made: dict[str, Problem] = {}
    for attempt in range(20 * count):  # a question drawn twice counts once
        if len(made) == count:
            return list(made.values())
        problem = _draw(templates[attempt % len(templates)], rng, held_out)
        made.setdefault(problem.question, problem)
    raise ValueError(f"the templates don't give {count} different questions")


# Digits with or without commas between thousands, then decimals; or decimals alone. "1,2" is two numbers.
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")
_SIGN = re.compile(r"[-\u2212][$€£]?$")  # a hyphen or a minus sign, at the end of what stands before the number


def read_answer(reply: str) -> float | None:
    """The last number of a reply, None where it has none. "1,024.50" is 1024.5, "$-4" and "-$4" are -4.

    A minus is a sign where nothing stands before it that it could join or be taken from: "9-4", "9 -4" and "item-4"
    end in 4, "it is -4" in -4.
    """
    found = list(_NUMBER.finditer(reply))
    if not found:
        return None
    value = float(found[-1].group().replace(",", ""))
    before = reply[: found[-1].start()]
    sign = _SIGN.search(before)
    return -value if sign and _may_be_sign(before[: sign.start()]) else value


def _may_be_sign(before: str) -> bool:
    """Whether a minus after this text is a sign, and no hyphen or difference."""
    joined = before[-1:].isalnum() or before[-1:] == ")"
    return not joined and not before.rstrip()[-1:].isdigit() and before.rstrip()[-1:] != ")"


def is_right(reply: str, problem: Problem) -> bool:
    """Whether the last number of the reply is the problem's answer."""
    answer = read_answer(reply)
    return answer is not None and abs(answer - problem.answer) < 1e-6


def scores(problems: Sequence[Problem], replies: Sequence[str]) -> dict[str, dict[str, float]]:
    """Exact match in percent: under "all", and by template under its name, with counts.

    Returns:
        name -> {"right": number, "count": number, "percent": 0 to 100}.
    """
    table: dict[str, dict[str, float]] = {}
    for problem, reply in zip(problems, replies, strict=True):
        for name in ("all", problem.template):
            row = table.setdefault(name, {"right": 0, "count": 0})
            row["right"] += is_right(reply, problem)
            row["count"] += 1
    for row in table.values():
        row["percent"] = round(100 * row["right"] / row["count"], 2)
    return table
