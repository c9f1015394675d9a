"""Forms of rows: which columns a data set for instruction tuning has, and how a row becomes a conversation.

A form is one entry of FORMS, and adding one is one call of `FORMS.add`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from corelora.data.columns import Column
from corelora.errors import nearest
from corelora.registry import Registry


class Message(TypedDict):
    """One turn. `input` is what an Alpaca row gives beside its instruction, which some prompts set apart."""

    role: str
    content: str
    input: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of rows.

    Attributes:
        about: which sets have it.
        columns: what a row needs; they are all the checks of a row.
        read: a row as messages, a reply last.
    """

    about: str
    columns: Mapping[str, Column]
    read: Callable[[Mapping[str, Any]], list[Message]]


FORMS: Registry[Form] = Registry("form")


def rename_problems(columns: Mapping[str, Column], names: Mapping[str, str]) -> list[str]:
    """What is wrong with `data.columns`: keys that are no column of the form."""
    found = []
    for key in names:
        if key not in columns:
            guess = nearest(key, columns)
            hint = f" Did you mean {guess!r}?" if guess else ""
            found.append(f"data.columns: the form has no column {key!r}.{hint} Its columns: {', '.join(columns)}.")
    return found


def fitting_forms(names: set[str]) -> list[str]:
    """The forms whose needed columns are all among these."""
    return [
        name for name, form in FORMS.items() if all(c in names or column.optional for c, column in form.columns.items())
    ]


def pair(question: str, reply: str, about: str) -> Form:
    """A form of one question and one reply, each a column of text."""
    columns = {question: Column(say="the question"), reply: Column(say="the response")}
    return Form(
        about=about,
        columns=columns,
        read=lambda row: [
            {"role": "user", "content": row[question]},
            {"role": "assistant", "content": row[reply]},
        ],
    )


def _instruction(row: Mapping[str, Any]) -> list[Message]:
    """Alpaca's columns; an input of blanks is none."""
    question: Message = {"role": "user", "content": row["instruction"]}
    if (row["input"] or "").strip():
        question["input"] = row["input"]
    return [question, {"role": "assistant", "content": row["output"]}]


_INSTRUCTION = {
    "instruction": Column(say="the instruction"),
    "input": Column(optional=True, empty=True),
    "output": Column(say="the response"),
}

FORMS.add("metamath", pair("query", "response", "meta-math/MetaMathQA"))
FORMS.add("code_feedback", pair("query", "answer", "m-a-p/CodeFeedback-Filtered-Instruction"))
FORMS.add("evol_instruct", pair("instruction", "output", "WizardLMTeam/WizardLM_evol_instruct_70k"))
FORMS.add("gsm8k", pair("question", "answer", "openai/gsm8k; the reply is the worked solution with its #### line"))
FORMS.add("word_problems", pair("question", "solution", "built-in:word_problems"))
FORMS.add("alpaca", Form(about="tatsu-lab/alpaca, Code Alpaca", columns=_INSTRUCTION, read=_instruction))
FORMS.add(
    "commonsense",
    Form(about="commonsense_170k and its eight tasks, as LLM-Adapters", columns=_INSTRUCTION, read=_instruction),
)
FORMS.add(
    "chat",
    Form(
        about="conversations as a list of {role, content}; every reply is trained",
        columns={"messages": Column(kind="turns")},
        read=lambda row: list(row["messages"]),
    ),
)
FORMS.add(
    "conversations",
    Form(
        about="WizardLMTeam/WizardLM_evol_instruct_V2_196k and ShareGPT: a list of {from, value}",
        columns={"conversations": Column(kind="turns")},
        read=lambda row: list(row["conversations"]),
    ),
)
