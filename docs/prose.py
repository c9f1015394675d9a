"""Finds figures in the documents' prose that no result file stands behind.

A figure is a number with a unit, a share, a number with a decimal point or a "12 of 40", outside of code, of generated
tables and of the marks that `make_tables.py` fills. What is not a measurement (a setting, a definition, a citation) is
listed in `unmarked.yaml`, each with its reason.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from figures import MARK

HERE = Path(__file__).resolve().parent
FILLED = "¤"  # stands where a mark was
WORDS = "two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|hundred"
UNITS = r"%|percent|[µnm]?s\b|(?:micro|milli)?seconds?\b|minutes?\b|hours?\b|[KMGT]i?B(?:/s)?\b|times\b"

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_FIGURE = re.compile(
    rf"(?<![\w.,/^-])(?:{_NUMBER}|{WORDS})\s(?:{UNITS})"  # 45 ms, 12 %, ten times
    rf"|(?<![\w.,/^-]){_NUMBER}%"
    rf"|(?<![\w.,/^-]){_NUMBER}\s(?:to|and|or|against)\s(?:{FILLED}|(?:{_NUMBER}|{WORDS})\s(?:{UNITS}))"
    r"|(?<![\w.,/^-])\d[\d,]*\.\d+(?![\w.])"  # 1.179
    r"|(?<![\w.,/^-])\d[\d,]*\sof\s\d+"
)
_VERSION = re.compile(
    r"(?:accelerate|bitsandbytes|DeepSpeed|diffusers|PEFT|Stable Diffusion|torch|transformers|TRL|Table|[Ss]ections?"
    r"|appendix|Eq\.|arXiv) (?:[A-Z]\.)?\d+(?:\.\d+)*(?: and \d+(?:\.\d+)*)?"
)
_LEFT_OUT = [
    r"<!-- table [a-z0-9-]+ -->.*?<!-- end -->",
    r"^```.*?^```",
    r"^ {4,}\S.*?$",  # commands, but not the further lines of a list
    r"`[^`]*`",
    r"\]\([^)]*\)",
]


def prose(text: str) -> str:
    """The text in one line a paragraph, without tables of result files, code and addresses; FILLED for each mark."""
    for pattern in _LEFT_OUT:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    text = MARK.sub(FILLED, text)
    return "\n".join(re.sub(r"\s+", " ", part) for part in re.split(r"\n\s*\n|\n(?=[-|#] ?)", text))


def allowed(name: str) -> list[str]:
    """The phrases of one document, with figures that are no measurements."""
    groups = yaml.safe_load((HERE / "unmarked.yaml").read_text())
    return [phrase for group in groups for phrase in group["phrases"].get(name, [])]


def unmarked(text: str, phrases: list[str]) -> list[str]:
    """What is wrong with a document: figures that no mark and no phrase stands for, phrases it lacks, bad marks."""
    found, plain = _wrong_marks(text), prose(text)
    for phrase in phrases:
        if phrase not in plain:
            found.append(f"unmarked.yaml allows what is not there: {phrase}")
        plain = plain.replace(phrase, " ")
    plain = _VERSION.sub(" ", plain)
    for match in _FIGURE.finditer(plain):
        around = plain[max(0, match.start() - 60) : match.end() + 30].replace("\n", " ")
        found.append(f"{match.group()!r} is no figure of a result file: ...{around}...")
    return found


def _wrong_marks(text: str) -> list[str]:
    found = []
    if len(MARK.findall(text)) != text.count("<!-- figure"):
        found.append("a mark is not of the form <!-- figure NAME FORMAT -->...<!-- /figure -->")
    if re.search(r"^[\s*-]*<!-- figure", text, flags=re.MULTILINE):
        found.append("a line begins with a mark: Markdown takes it for the end of the paragraph")
    return found
