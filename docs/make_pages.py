"""Writes the report pages of studies whose runs are kept in docs/results/known: `python docs/make_pages.py`.

With `--check` nothing is written; the exit code says whether each page has the tables that those runs make. Charts and
their script are not compared: they follow the versions of Altair and Vega.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from study_tables import known_study, studies

from corelora.compare.page import page_html

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "studies"
CHARTS = '<script id="charts"'
SHOWN = ("smollm2-gsm8k/methods",)


def page(name: str) -> str:
    """A study's report, with the command and the folder of whoever makes it anew."""
    with known_study(name) as folder:
        text = page_html(folder)
        here, made_at = str(folder.root), f"studies/{studies.file_name(name)}"
    return text.replace(here, made_at).replace(f"{ROOT}{os.sep}", "")


def main() -> int:
    """Write the pages, or say which are not current."""
    wrong = 0
    for name in SHOWN:
        target = PAGES / f"{studies.file_name(name)}.html"
        there = target.read_text(encoding="utf-8") if target.is_file() else ""
        text = page(name)
        if "--check" not in sys.argv:
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
        elif there.partition(CHARTS)[0] != text.partition(CHARTS)[0]:
            print(f"{target.relative_to(ROOT)} is not current: run docs/make_pages.py")
            wrong = 1
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
