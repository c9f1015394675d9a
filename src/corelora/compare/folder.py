"""A study's folder: what was asked, and what is known of its runs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from corelora.compare.expand import Planned, expand
from corelora.compare.finalists import finalists
from corelora.compare.parts import kept_in
from corelora.compare.search import asked
from corelora.compare.standing import Standing, stand_all
from corelora.compare.study import Group, Study
from corelora.errors import CoreLoraError, raise_all
from corelora.recipe.tree import read_tree
from corelora.train.folder import write_json, write_text

STUDY = "study.yaml"
MADE_BY = "made_by.json"


@dataclass(frozen=True, kw_only=True)
class StudyFolder:
    """A study and where its runs lie.

    Attributes:
        root: the study's folder.
        study: as it was read.
        where: the folder that its recipes are relative to.
        first: the runs of its first seeds, by group: all that may be asked for.
        file: that it was read from; None for a folder that does not say it.
        words: of the command, `--set=KEY=VALUE` and `--data=PATH`.
    """

    root: Path
    study: Study
    where: Path
    first: dict[str, list[Planned]]
    file: Path | None = None
    words: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What makes the study's runs, or goes on with them."""
        file = str(self.file) if self.file else "STUDY.yaml"
        return shlex.join(["corelora", "compare", file, *self.words, "--output", str(self.root)])

    def save(self) -> None:
        """Write the study into its folder with all that it is built on, so that a report needs nothing else."""
        data = kept_in(self.root, self.study, self.where)
        write_text(self.root / STUDY, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        if self.file is not None:
            write_json(self.root / MADE_BY, {"file": os.path.relpath(self.file, self.root), "words": self.words})

    def asked(self, group: Group) -> list[Standing]:
        """Runs of a group's first seeds that are asked for so far (search.py)."""
        return asked(group, stand_all(self.first[group.name], self.root), *self.study.score_of(group))

    def finalists(self, group: Group) -> list[Planned]:
        """The finalists' runs, every seed, as far as the group's first runs say."""
        return finalists(group, self.asked(group), *self.study.score_of(group))

    def standings(self) -> dict[str, list[Standing]]:
        """What is known of each group's runs, finalists too."""
        found = {}
        for group in self.study.groups:
            runs = distinct([*(s.run for s in self.asked(group)), *self.finalists(group)])
            found[group.name] = stand_all(runs, self.root)
        return found


def open_study(
    study: Study, where: Path, root: Path, file: Path | None = None, words: Sequence[str] = ()
) -> StudyFolder:
    """A study with its runs planned.

    Args:
        study: as it was read.
        where: the folder that its recipes are relative to.
        root: the folder for its runs; another file's is refused, the same one's, grown or not, is gone on with.
        file: that it was read from, if it was not from the folder itself.
        words: of the command.

    Raises:
        CoreLoraError: recipes that can't be built; a folder with something else in it.
    """
    if root.is_dir() and any(root.glob("[!.]*")) and not (root / STUDY).is_file():
        raise CoreLoraError(f"{root} is not empty and holds no study: give another --output")
    theirs, their_words = _made_by(root)
    if file is None:
        file, words = theirs, their_words
    elif theirs is not None and theirs.is_file() and not theirs.samefile(file):
        raise CoreLoraError(f"{root} holds the study of another file, {theirs}: give another --output")
    first = expand(study, where)
    return StudyFolder(root=root, study=study, where=where, first=first, file=file, words=tuple(words))


def _made_by(root: Path) -> tuple[Path | None, Sequence[str]]:
    """(the study's file, words of the command), where the folder says so."""
    if not (root / MADE_BY).is_file():
        return None, ()
    data = json.loads((root / MADE_BY).read_text(encoding="utf-8"))
    return Path(os.path.normpath(root / data["file"])), data["words"]


def read_study(root: Path) -> StudyFolder:
    """A study from its folder.

    Raises:
        CoreLoraError: the folder holds none, or what it is built on is gone.
    """
    path = root / STUDY
    if not path.is_file():
        raise CoreLoraError(f"{root}: no study is here ({STUDY} is missing)")
    study, problems = read_tree(Study, yaml.safe_load(path.read_text(encoding="utf-8")))
    raise_all(problems, str(path))
    assert study is not None
    return open_study(study, root, root)


def distinct(runs: Sequence[Planned]) -> list[Planned]:
    """Each run once, though several groups ask for it."""
    return list({run.name: run for run in runs}.values())
