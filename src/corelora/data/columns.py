"""What a column of a row may hold, and how a value is read: the value as it is kept, or one sentence on what is wrong.

Every check of a row is a check of one of its columns, so that one pass over a file finds everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Features, List, Value

from corelora.errors import nearest

_SURROGATE = re.compile("[\ud800-\udfff]")

Read = tuple[Any, str | None]  # the value, and what is wrong with it

# Conversations come as {role, content} (OpenAI's form) or {from, value} (ShareGPT's); they are kept as the former.
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one column must hold.

    Attributes:
        kind: a name of KINDS: text, texts, turns, whole (a whole number), number.
        optional: the column, or its value, may be missing; it then reads as None.
        empty: a text of blanks is a value.
        low, high: bounds of a number, both included.
        say: what the column is to a reader, for messages: "the response".
    """

    kind: str = "text"
    optional: bool = False
    empty: bool = False
    low: float | None = None
    high: float | None = None
    say: str = ""

    def read(self, name: str, value: Any, *, textual: bool = False) -> Read:
        """One value as it is kept.

        Args:
            name: the column's name in the file, for messages.
            value: as the file has it.
            textual: the file knows only texts (csv), so a number may be written as one.

        Returns:
            The value and None, or None and a sentence on what is wrong.
        """
        if value is None or (textual and value == "" and KINDS[self.kind].number):
            return (None, None) if self.optional else (None, f"column {name!r} has no value")
        return KINDS[self.kind].read(self, name, _number_in(value) if textual and KINDS[self.kind].number else value)

    @property
    def feature(self) -> Any:
        """The type that `datasets` keeps the column in."""
        return KINDS[self.kind].feature


@dataclass(frozen=True)
class Kind:
    """One kind of value: its type on disk, how it is read, and whether it is a number."""

    feature: Any
    read: Callable[[Column, str, Any], Read]
    number: bool = False


def features(columns: Mapping[str, Column]) -> Features:
    """The schema on disk of rows with these columns."""
    return Features({name: column.feature for name, column in columns.items()})


def type_name(value: Any) -> str:
    """A value's type as JSON calls it."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _text(column: Column, name: str, value: Any) -> Read:
    if not isinstance(value, str):
        return None, f"column {name!r}: a text is expected, found {type_name(value)}"
    if not value.strip() and not column.empty:
        return None, f"column {name!r} is empty" + (f": {column.say} is missing" if column.say else "")
    return (value, None) if _is_unicode(value) else (None, f"column {name!r}: half of a surrogate pair, no character")


def _is_unicode(text: str) -> bool:
    """JSON can hold halves of surrogate pairs, which no file in UTF-8 and no tokenizer can."""
    return text.isascii() or not _SURROGATE.search(text)


def _number(column: Column, name: str, value: Any) -> Read:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None, f"column {name!r}: a number is expected, found {type_name(value)}"
    if isinstance(value, int) and abs(value) > 2**53:  # a float could not hold it
        return None, f"column {name!r}: the number is too large"
    if not math.isfinite(value):
        return None, f"column {name!r}: {value} is no finite number"
    low, high = column.low, column.high
    if (low is not None and value < low) or (high is not None and value > high):
        return None, f"column {name!r}: {value} is not between {low} and {high}"
    return float(value), None


def _whole(column: Column, name: str, value: Any) -> Read:
    number, wrong = _number(column, name, value)
    if wrong:
        return None, wrong
    return (int(number), None) if number.is_integer() else (None, f"column {name!r}: {value} is not a whole number")


def _number_in(text: Any) -> Any:
    """The number that a text of a csv file stands for; the text itself where it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _texts(column: Column, name: str, value: Any) -> Read:
    """A list of texts, such as the tests of a program."""
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return None, f"column {name!r}: a list of texts is expected, found {type_name(value)}"
    return value, None


def _turns(column: Column, name: str, value: Any) -> Read:
    """A conversation: system or not, then user and assistant in turns, a reply last."""
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else type_name(value)
        return None, f"column {name!r}: a list of turns is expected, found {found}"
    read = [_turn(n, turn) for n, turn in enumerate(value, 1)]
    wrong = next((w for _, w in read if w), None)
    turns = [turn for turn, _ in read]
    wrong = wrong or _order(turns)
    return (None, f"column {name!r}: {wrong}") if wrong else (turns, None)


def _turn(n: int, turn: Any) -> Read:
    if not isinstance(turn, Mapping):
        return None, f"turn {n}: an object is expected, found {type_name(turn)}"
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        guess = nearest(str(role), ROLES)
        return None, f"turn {n}: unknown role {role!r}.{f' Did you mean {guess!r}?' if guess else ''}"
    if not isinstance(content, str):
        return None, f"turn {n}: content must be a text, found {type_name(content)}"
    if not _is_unicode(content):
        return None, f"turn {n}: half of a surrogate pair, no character"
    if not content.strip() and ROLES[role] != "system":
        return None, f"turn {n} ({ROLES[role]}) is empty"
    return {"role": ROLES[role], "content": content}, None


def _order(turns: list[dict[str, str]]) -> str | None:
    first = 2 if turns[0]["role"] == "system" else 1
    for n, turn in enumerate(turns[first - 1 :], first):
        wanted = "assistant" if (n - first) % 2 else "user"
        if turn["role"] != wanted:
            return f"turn {n} is the {turn['role']}'s, where the {wanted}'s is expected"
    return None if turns[-1]["role"] == "assistant" else "the conversation ends without a reply"


KINDS: dict[str, Kind] = {
    "text": Kind(Value("string"), _text),
    "texts": Kind(List(Value("string")), _texts),
    "turns": Kind(List({"role": Value("string"), "content": Value("string")}), _turns),
    "whole": Kind(Value("int64"), _whole, number=True),
    "number": Kind(Value("float64"), _number, number=True),
}
