"""What the commands print with: tables, sizes, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Columns wide enough for their longest entry; numbers stand to the right.

    Args:
        headers: one a column.
        rows: cells as text.
        left: headers of the columns that stand to the left, beside the first.
    """
    widths = [max(len(row[n]) for row in (headers, *rows)) for n in range(len(headers))]
    is_left = [n == 0 or header in left for n, header in enumerate(headers)]

    def line(cells: Sequence[str]) -> str:
        parts = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, is_left, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *(line(row) for row in rows)])


def megabytes(size: int | None) -> str:
    """Bytes as "7.42 MB" (10^6 bytes), "-" for None."""
    return "-" if size is None else f"{size / 1e6:,.2f} MB"


def gibibytes(size: int | None) -> str:
    """Bytes as "13.55" GiB (2^30 bytes), "-" for None."""
    return "-" if size is None else f"{size / 2**30:,.2f}"


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
