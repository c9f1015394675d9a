"""HumanEval and MBPP: prompts, programs out of replies, and pass@k.

Sources: HumanEval and the unbiased estimator of pass@k, Chen et al. 2021 (arXiv 2107.03374, section 2.1); MBPP, Austin
et al. 2021 (arXiv 2108.07732). Rows have the columns of the published files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from corelora.evaluate.sandbox import Program

# A completed function ends where the next thing begins (the paper's stop sequences).
HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def code_blocks(reply: str) -> list[str]:
    """The fenced blocks of a reply that are Python or say nothing, in their order; an unclosed one runs to the end."""
    return [body for language, body in _FENCE.findall(reply) if language.lower() in ("", "python", "py", "python3")]


def humaneval_code(row: Mapping[str, Any], reply: str) -> str:
    """The whole program of a HumanEval reply: a completion of the prompt, or a chat reply that gives the function.

    Args:
        row: `prompt`, `entry_point`.
        reply: what the model wrote after the prompt, or in a chat.
    """
    prompt, name = row["prompt"], row["entry_point"]
    defines = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    blocks = code_blocks(reply)
    whole = next((b for b in blocks if defines.search(b)), None)
    if whole is None and not blocks and defines.search(reply):
        whole = reply
    if whole is not None:
        return prompt[: _start_of(prompt, defines)] + "\n" + whole + "\n"
    body = blocks[0] if blocks else reply
    if body.strip() and not body.lstrip("\n")[:1].isspace():  # a body at the margin belongs inside the function
        body = "\n".join("    " + line if line.strip() else line for line in body.split("\n"))
    return prompt + _cut(body, HUMANEVAL_STOPS) + "\n"


def humaneval_program(row: Mapping[str, Any], reply: str) -> Program:
    """A HumanEval reply with the row's tests.

    The prompt's own helper functions are taken from the prompt, not from the program.

    Args:
        row: `prompt`, `entry_point`, `test`.
        reply: what the model wrote.
    """
    name = row["entry_point"]
    return Program(
        code=humaneval_code(row, reply),
        tests=f"{row['test']}\n\ncheck({name})\n",
        known=row["prompt"],
        entry=(name,),
    )


def mbpp_code(reply: str) -> str:
    """The program of an MBPP reply: its fenced blocks joined, or the reply up to the papers' [DONE], or all of it."""
    blocks = code_blocks(reply)
    return "\n".join(blocks) if blocks else reply.split("[DONE]")[0].replace("[BEGIN]", "")


def mbpp_program(row: Mapping[str, Any], reply: str) -> Program:
    """An MBPP reply with the row's tests; its set-up runs after the program, whose classes it may use (367, 927).

    Args:
        row: `test_list`, `test_setup_code`.
        reply: what the model wrote.
    """
    tests = "\n".join([row.get("test_setup_code") or "", *row["test_list"]]).replace("\r\n", "\n")
    return Program(code=mbpp_code(reply).replace("\r\n", "\n"), tests=tests)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples passes, estimated without bias from c passes among n: 1 - C(n-c, k) / C(n, k).

    Raises:
        ValueError: k is larger than n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _start_of(prompt: str, defines: re.Pattern[str]) -> int:
    """Where the prompt's own version of the function begins: what stands before (imports, helpers) is kept."""
    found = defines.search(prompt)
    return found.start() if found else len(prompt)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    ends = [n for n in (text.find(s) for s in stops) if n >= 0]
    return text[: min(ends)] if ends else text
