"""Answer readers: what a reply says, by a stated rule, and whether it is right.

A reader never sees whether an answer is right when it reads. Sources: the rule of the NLoRA authors' scripts ("The
answer is: "), which are PiSSA's and WizardMath's; the filters of lm-evaluation-harness's gsm8k (version 3); MATH's
equality by strings as Hendrycks et al. 2021 wrote it (normalised here in our own words) and by Hugging Face's
math-verify; the commonsense rule of LLM-Adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from corelora.registry import Registry
from corelora.tasks import word_problems

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Reader:
    """A rule.

    Attributes:
        about: the rule in one sentence.
        read: (reply, row) to what was understood, or None.
        is_right: (what was read, row) to the verdict.
        gold: a reply that says the row's own answer.
    """

    about: str
    read: Callable[[str, Row], str | None]
    is_right: Callable[[str | None, Row], bool]
    gold: Callable[[Row], str]


READERS: Registry[Reader] = Registry("answer reader")

# -- numbers ---------------------------------------------------------------------------------------------------------

_SAID = re.compile(r"the (?:final )?answer is\s*:?", re.IGNORECASE)
_SAID_COLON = re.compile(r"the (?:final )?answer is\s*:", re.IGNORECASE)
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*(-?[\d.,]+)\s*\}")
# A sign counts where it cannot be a minus between two numbers: at the start or behind a blank, bracket, $ or =.
_VALUE = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-−–]\s?)?(?:\$\s?(?P<sign2>-)?)?(?P<top>{_NUMBER})(?:\s?/\s?(?P<low>{_NUMBER}))?"
)
_MIXED = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d/])")


def number_in(text: str, last: bool = True) -> str | None:
    """The last (or first) number of a text as a plain decimal or fraction; None where there is none.

    Commas between thousands, a currency sign, percent signs and units, LaTeX fractions and mixed numbers are read; a
    fraction stays exact.
    """
    text = _plain_math(text)
    found = list(_VALUE.finditer(text))
    if not found:
        return None
    chosen = found[-1 if last else 0]
    value = _value(chosen)
    return None if value is None else _shown(value)


def same_number(read: str | None, gold: str | None) -> bool:
    """Whether two numbers as texts are one value, exactly, or to the decimals that the reply gives of a fraction."""
    a, b = _fraction(read), _fraction(gold)
    if a is None or b is None:
        return False
    return a == b or abs(a - b) < Fraction(1, 10**6)


def _plain_math(text: str) -> str:
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\\,", "").replace("\\!", "").replace("{,}", ",")
    text = re.sub(r"\\text\s*\{[^{}]*\}|\\(?:left|right|mathrm)\b", " ", text)
    text = _FRAC.sub(lambda m: f" {m[1]}/{m[2]} ", text)
    return _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}" if int(m[3]) else m[0], text)


def _value(match: re.Match[str]) -> Fraction | None:
    top = _fraction(match["top"])
    low = _fraction(match["low"]) if match["low"] else Fraction(1)
    if top is None or not low:
        return top
    return -top / low if match["sign"] or match["sign2"] else top / low


def _fraction(text: str | None) -> Fraction | None:
    if text is None:
        return None
    text = text.replace(",", "").strip()
    try:
        return Fraction(text) if "/" in text else Fraction(Decimal(text))
    except (ValueError, ZeroDivisionError, InvalidOperation, OverflowError):
        return None


def _shown(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return format(Decimal(value.numerator) / Decimal(value.denominator), "f") if rest == 1 else str(value)


# -- GSM8K -----------------------------------------------------------------------------------------------------------


def gsm8k_gold(row: Row) -> str | None:
    """The number behind the #### of a GSM8K solution."""
    return number_in(str(row["answer"]).rsplit("####", 1)[-1])


def _paper(reply: str, row: Row) -> str | None:
    """Behind the last "The answer is", in that sentence; the first number there."""
    parts = _SAID.split(reply)
    return number_in(parts[-1].split("\n")[0], last=False) if len(parts) > 1 else None


def _flexible(reply: str, row: Row) -> str | None:
    """What a person would take: behind "The answer is", "####" or in a box where there is one, else the last number."""
    said = _paper(reply, row)
    if said is not None:
        return said
    if "####" in reply:
        return number_in(reply.split("####")[1].split("\n")[0], last=False)
    box = last_box(reply)
    return number_in(box if box is not None else reply)


_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_LAST = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def _strict(reply: str, row: Row) -> str | None:
    """The harness's filter strict-match."""
    found = _STRICT.search(reply)
    return found[1] if found else None


def _last_match(reply: str, row: Row) -> str | None:
    """The harness's filter flexible-extract."""
    found = _LAST.findall(reply)
    return (found[-1][0] or found[-1][1]) if found else None


def _harness_equal(read: str | None, row: Row) -> bool:
    """The harness's exact_match: commas, dollars, what stands before #### and a final dot are ignored."""

    def stripped(text: str) -> str:
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    return read is not None and stripped(read) == stripped(str(row["answer"]))


def _gsm8k_right(read: str | None, row: Row) -> bool:
    return same_number(read, gsm8k_gold(row))


def _gsm8k_said(row: Row) -> str:
    return f"{row['answer']}\nThe answer is: {str(row['answer']).rsplit('####', 1)[-1].strip()}"


READERS.add("gsm8k_paper", Reader('the number behind "The answer is:"', _paper, _gsm8k_right, _gsm8k_said))
READERS.add(
    "gsm8k_flexible",
    Reader("behind The answer is, #### or in a box; else the last number", _flexible, _gsm8k_right, _gsm8k_said),
)
READERS.add("gsm8k_strict", Reader("the harness's strict-match", _strict, _harness_equal, lambda r: str(r["answer"])))
READERS.add(
    "gsm8k_last", Reader("the harness's flexible-extract", _last_match, _harness_equal, lambda r: str(r["answer"]))
)

# -- MATH ------------------------------------------------------------------------------------------------------------


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{...}, braces matched; None where there is none or it is not closed."""
    starts = [m.end() for m in re.finditer(r"\\f?boxed\s*", text)]
    if not starts:
        return None
    rest = text[starts[-1] :]
    if not rest.startswith("{"):
        return rest.split()[0].strip("$.") if rest.split() else None
    depth = 0
    for n, char in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return rest[1:n]
    return None


def _math_said(reply: str, row: Row) -> str | None:
    """Behind the last "The answer is:"; without a colon there, the last box; else behind "the answer is"."""
    for pattern in (_SAID_COLON, _SAID):
        parts = pattern.split(reply)
        if len(parts) > 1:
            return _said(parts[-1])
        box = last_box(reply)
        if box is not None:
            return box
    return None


def _said(rest: str) -> str | None:
    """An answer at the beginning of a text: a box, or the rest of its line."""
    line = rest.strip().split("\n")[0].strip()
    if "boxed" in line:
        first = rest.partition("\\boxed")[2].partition("\\boxed")[0]
        return last_box("\\boxed" + first)
    return line.rstrip(".").strip().strip("$").strip() or None


_REMOVED = ("\\left", "\\right", "\\!", "\\,", "\\ ", "\\;", "^{\\circ}", "^\\circ", "\\$", "$", "\\%", "%", " ")
_REPLACED = (("\\tfrac", "\\frac"), ("\\dfrac", "\\frac"), ("\\cfrac", "\\frac"), ("\\mbox", "\\text"))


def plain_latex(text: str) -> str:
    """A LaTeX answer with what does not change its value taken away, for comparison letter by letter."""
    text = text.strip().rstrip(".").replace("\n", "")
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text = re.sub(r"\\text\s*\{\s*([^{}]*?)\s*\}\s*$", _unit, text)
    for piece in _REMOVED:
        text = text.replace(piece, "")
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(?!\{)(\w)(?!\{)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(?!\{)(\w)\{", r"\\frac{\1}{", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(^|[^\d])\.(\d)", r"\g<1>0.\2", text)
    text = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", text) if not text.startswith(("(", "[", "\\{")) else text
    head, equals, tail = text.partition("=")
    return tail if equals and len(head) <= 2 and "=" not in tail else text


def _unit(match: re.Match[str]) -> str:
    """A word behind a number is a unit; a word alone is the answer."""
    return "" if match.string[: match.start()].strip() else match[1]


def _same_latex(read: str | None, row: Row) -> bool:
    return read is not None and plain_latex(read) == plain_latex(str(row["answer"]))


def _verified(read: str | None, row: Row) -> bool:
    """math-verify's equality; on top of it, equal letters are equal whatever it can read."""
    return read is not None and (_same_latex(read, row) or _math_verify(read, str(row["answer"])))


def _math_verify(read: str, gold: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = (LatexExtractionConfig(), ExprExtractionConfig())
    try:
        target, given = (parse(f"${text}$", extraction_config=configs, parsing_timeout=5) for text in (gold, read))
        return bool(verify(target, given, timeout_seconds=5))
    except Exception:  # sympy raises anything on odd input; what can't be compared is not equal
        return False


def _boxed(row: Row) -> str:
    return f"Some steps, 1 + 1 = 2.\nThe answer is: \\boxed{{{row['answer']}}}."


READERS.add(
    "math_paper", Reader("behind The answer is, or the last box; letter by letter", _math_said, _same_latex, _boxed)
)
READERS.add("math_verify", Reader("the same, by symbolic equality (math-verify)", _math_said, _verified, _boxed))

# -- choices ---------------------------------------------------------------------------------------------------------

_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


def choices_of(row: Row) -> list[str]:
    """The answers that a commonsense row allows: true/false, answer1/answer2/..., from its "Answer format"."""
    found = _FORMAT.search(str(row["instruction"]).strip())
    return found[1].split("/") if found else ["true", "false"]


def _choice(reply: str, row: Row) -> str | None:
    """The first of the allowed answers that the reply names; behind "the correct answer is" where it says so."""
    pattern = re.compile(r"\b(" + "|".join(re.escape(c) for c in choices_of(row)) + r")\b", re.IGNORECASE)
    _, said, rest = reply.lower().partition("correct answer is")
    found = (pattern.search(rest) if said else None) or pattern.search(reply)
    return found[1].lower() if found else None


READERS.add(
    "choice",
    Reader(
        "the first allowed answer that the reply names",
        _choice,
        lambda read, row: read is not None and read == str(row["answer"]).lower(),
        lambda row: str(row["output"]),
    ),
)


def _word_number(reply: str, row: Row) -> str | None:
    read = word_problems.read_answer(reply)
    return None if read is None else str(read)


READERS.add(
    "word_problems",
    Reader(
        "the last number of the reply",
        _word_number,
        lambda read, row: read is not None and read == str(row["answer"]),
        lambda row: str(row["solution"]),
    ),
)
