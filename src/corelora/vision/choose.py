"""The pictures of a run: its classes and their names in prompts, the shots that its seed draws, and their check."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from corelora.data.cache import key_of, made_once
from corelora.errors import CoreLoraError, nearest, raise_all
from corelora.recipe.images import ImagesPart
from corelora.recipe.schema import DataPart, SourcePart
from corelora.vision.listing import PICTURE, Pictures, list_pictures, named
from corelora.vision.pictures import picture_problem
from corelora.vision.sets import SETS, KnownSet

AHEAD = 256  # pictures whose bytes a hub set hands over at once
READERS = 4  # threads that decode while pictures are checked; Pillow lets others run meanwhile


@dataclass(frozen=True)
class Chosen:
    """Everything that a run reads.

    Attributes:
        pictures: "train", and "test" where the recipe has it.
        classes: as the set writes them; a label is a place here.
        names: of the classes, as a prompt has them.
        templates: prompts of a class, `{}` for its name.
    """

    pictures: dict[str, Pictures]
    classes: list[str]
    names: list[str]
    templates: list[str]

    def labels(self, which: str) -> list[int]:
        """Number of each picture's class."""
        numbers = {name: n for n, name in enumerate(self.classes)}
        return [numbers[label] for label in self.pictures[which].labels]


def choose(part: DataPart, images: ImagesPart, seed: int) -> Chosen:
    """List a recipe's pictures and draw its shots; no picture is opened.

    The shots of a class depend on the seed and the class alone, and fewer shots are the first ones of more.

    Args:
        part: the recipe's `data`; `form` names the set.
        images: the recipe's `images`.
        seed: of the run.

    Raises:
        CoreLoraError: every mistake at once: unknown set or classes, sources that are not there, classes with fewer
            pictures than shots.
    """
    known = _known_set(part)
    listed, found = _list_all(part, images, known)
    raise_all(found, "data")
    train = listed["train"]
    wanted = images.classes if images.classes is not None else train.classes
    found = _class_problems(wanted, train)
    chosen = {which: _of_classes(pictures, set(wanted)) for which, pictures in listed.items()}
    if not found:
        found = _count_problems(chosen, wanted, images.shots)
    if images.classes is None:
        unknown = sorted(set(listed["test"].labels) - set(wanted)) if "test" in listed else []
        found += named([f"data.test: class {c!r} is not among the classes of data.train" for c in unknown], "classes")
    raise_all(found, "data")
    if images.shots is not None:
        chosen["train"] = _draw(chosen["train"], wanted, images.shots, seed)
    names = [known.clean(name) for name in wanted]
    return Chosen(chosen, list(wanted), names, images.templates or [known.template])


def check_pictures(chosen: Chosen) -> str:
    """Decode every picture once, with a bar; files that were found good and did not change since are not read again.

    Returns:
        A fingerprint of all contents.

    Raises:
        CoreLoraError: each picture that can't be used, by its file (the first ones, and a count).
    """
    marks = [mark for pictures in chosen.pictures.values() for mark in _marks(pictures)]
    folder = made_once("pictures", key_of("pictures", marks), lambda out: _check_all(chosen, out))
    return str(json.loads((folder / "digest.json").read_text()))


def _known_set(part: DataPart) -> KnownSet:
    missing = SETS.miss(part.form)
    if missing:
        raise CoreLoraError(f"data.form: {missing}")
    return SETS[part.form]


def _list_all(part: DataPart, images: ImagesPart, known: KnownSet) -> tuple[dict[str, Pictures], list[str]]:
    sources: dict[str, SourcePart | None] = {"train": part.train, "test": part.test}
    listed, found = {}, []
    for which, source in sources.items():
        if source is None:
            continue
        try:
            listed[which] = list_pictures(part, images, source, known.left_out)
        except CoreLoraError as error:
            found.append(f"{which}: {error}")
    return listed, list(dict.fromkeys(found))


def _class_problems(wanted: list[str], train: Pictures) -> list[str]:
    if len(wanted) < 2:
        return [f"at least two classes are needed, found {len(wanted)}: {', '.join(wanted) or 'none'}"]
    twice = [name for name, count in Counter(wanted).items() if count > 1]
    found = [f"images.classes: {name!r} is there twice" for name in twice]
    for name in wanted:
        if name not in train.classes:
            guess = nearest(name, train.classes)
            found.append(f"images.classes: there is no class {name!r}.{f' Did you mean {guess!r}?' if guess else ''}")
    return named(found, "such classes")


def _count_problems(chosen: dict[str, Pictures], wanted: list[str], shots: int | None) -> list[str]:
    """Classes without pictures, or with fewer than the shots to draw."""
    found = []
    for which, pictures in chosen.items():
        counts = Counter(pictures.labels)
        least = shots or 1 if which == "train" else 0
        few = [(name, counts[name]) for name in wanted if counts[name] < least]
        found += named(
            [f"{which}: class {n!r} has {c} pictures, fewer than {'the ' * bool(shots)}{least} needed" for n, c in few],
            "classes with too few",
        )
        if not len(pictures):
            found.append(f"{which}: there is no picture of these classes")
    return found


def _of_classes(pictures: Pictures, wanted: set[str]) -> Pictures:
    if set(pictures.labels) <= wanted:
        return pictures
    return pictures.select(n for n, label in enumerate(pictures.labels) if label in wanted)


def _draw(pictures: Pictures, classes: list[str], shots: int, seed: int) -> Pictures:
    places: dict[str, list[int]] = {name: [] for name in classes}
    for n, label in enumerate(pictures.labels):
        places[label].append(n)
    drawn = []
    for name, numbers in places.items():
        random.Random(f"shots {seed} {name}").shuffle(numbers)
        drawn += numbers[:shots]
    return pictures.select(drawn)


def _marks(pictures: Pictures) -> list[Any]:
    """What tells whether a picture is still the one that was checked."""
    if pictures.content is not None:
        return [pictures.content]
    return [_mark(row["path"]) for row in pictures.contents[PICTURE]]


def _mark(path: str) -> list[Any]:
    try:
        stat = Path(path).stat()
    except OSError:
        return [path, None]
    return [path, stat.st_size, stat.st_mtime_ns]


def _check_all(chosen: Chosen, out: Path) -> None:
    """Decode every picture; keep the digest of all."""
    digest, found = hashlib.sha256(), []
    total = sum(len(p) for p in chosen.pictures.values())
    with (
        tqdm(total=total, desc="checking pictures", unit="picture", delay=2) as bar,
        ThreadPoolExecutor(READERS) as pool,
    ):
        for which, n, pictures, (own, problem) in _looked_at(chosen, pool):
            digest.update(own)
            found += [f"{which}: {pictures.where(n)} {problem}"] if problem else []
            bar.update()
    raise_all(named(found, "pictures that can't be used"), "pictures")
    (out / "digest.json").write_text(json.dumps(digest.hexdigest()))


def _looked_at(chosen: Chosen, pool: ThreadPoolExecutor) -> Iterator[tuple[str, int, Pictures, Any]]:
    """Each picture's split, number, set, and what `_look` says; a few hundred are read ahead."""
    for which, pictures in chosen.pictures.items():
        for start in range(0, len(pictures), AHEAD):
            part = pictures.contents[start : start + AHEAD][PICTURE]
            for n, looked in enumerate(pool.map(_look, part), start):
                yield which, n, pictures, looked


def _look(content: dict[str, Any]) -> tuple[bytes, str | None]:
    """A digest of one picture's file, and what is wrong with it."""
    data = content["bytes"]
    if data is None:
        try:
            data = Path(content["path"]).read_bytes()
        except FileNotFoundError:
            return b"", "is missing: there is no such file"
        except OSError as error:
            return b"", f"can't be read ({error.strerror or error})"
    return hashlib.sha256(data).digest(), picture_problem(data)
