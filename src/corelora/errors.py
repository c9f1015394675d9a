"""What corelora raises, and how a wrong name is answered: with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CoreLoraError(ValueError):
    """Any mistake in what the user gave: a setting, statistics, a file, a base model."""


class UnknownSettingError(TypeError):
    """A keyword that no corelora config has. A TypeError, as an unknown keyword is everywhere in Python."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None where none does."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """One line for a name that does not exist: what it is, the nearest known one, all known ones."""
    known = sorted(known)
    guess = nearest(str(name), known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."


def raise_all(problems: list[str], where: str) -> None:
    """Raise one CoreLoraError that lists every problem; do nothing where there is none.

    Args:
        problems: one sentence a mistake.
        where: what was being checked, for the first line of the message.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise CoreLoraError(f"{where}: {problems[0]}")
    lines = "\n".join(f"  - {p}" for p in problems)
    raise CoreLoraError(f"{where}: {len(problems)} problems\n{lines}")


def sentences(error: CoreLoraError) -> list[str]:
    """The sentences of an error that gathers several, without its first line."""
    first, *rest = str(error).splitlines()
    return [line.removeprefix("  - ") for line in rest] or [first]
