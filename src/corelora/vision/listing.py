"""Which pictures a source has, and the class of each: folders of classes, tables, hub sets, CoOp's split files.

Nothing is decoded here. What is wrong comes as sentences, so that all of it can be said at once.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from corelora.data.columns import Column
from corelora.data.files import split_of
from corelora.data.sources import BUILT_IN, is_local, load_hub, read_rows, split_name
from corelora.errors import CoreLoraError, nearest
from corelora.recipe.images import ImagesPart
from corelora.recipe.schema import DataPart, SourcePart

NAMED = 10  # a message names so many; it counts the rest
NOT_PICTURES = ("thumbs.db", "desktop.ini")  # what systems leave in folders; names with a leading dot are left out too
PICTURE, LABEL = "picture", "label"  # the columns of a table or hub set, as `data.columns` can rename them
FEATURE = datasets.Image(decode=False)


@dataclass(frozen=True)
class Pictures:
    """Pictures and their classes, in the order of their source.

    Attributes:
        contents: one column `picture`: {"path", "bytes"}, not decoded.
        labels: of each picture, the class as its source writes it.
        classes: all classes of the source, in its order.
        source: names the source, for messages.
        content: stands for a hub set in fingerprints; files are looked at themselves.
        rows: of a hub set, the row that each picture is in, from 1.
    """

    contents: datasets.Dataset
    labels: list[str]
    classes: list[str]
    source: str
    content: Any = None
    rows: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, n: int) -> str:
        """What a reader finds picture n by."""
        return f"{self.source} row {self.rows[n]}" if self.rows else self.contents[n][PICTURE]["path"]

    def select(self, numbers: Iterable[int]) -> Pictures:
        """These pictures, in this order."""
        chosen = list(numbers)
        key = None if self.content is None else [self.content, chosen]
        labels = [self.labels[n] for n in chosen]
        rows = [self.rows[n] for n in chosen] if self.rows else ()
        return replace(self, contents=self.contents.select(chosen), labels=labels, content=key, rows=rows)


def list_pictures(part: DataPart, images: ImagesPart, source: SourcePart, left_out: tuple[str, ...]) -> Pictures:
    """All pictures of a source's split.

    Args:
        part: the recipe's `data`, for other names of columns.
        images: the recipe's `images`, for the split file.
        source: `data.train` or `data.test`.
        left_out: folders that are no class.

    Raises:
        CoreLoraError: nothing is there, a split or column that does not exist, with the nearest.
    """
    root = Path(source.path).expanduser()
    if images.split_file is not None:
        return _from_split_file(Path(images.split_file).expanduser(), root, source)
    if source.path.startswith(BUILT_IN):
        raise CoreLoraError(f"{source.path}: there is no built-in set of pictures")
    if root.is_dir():
        return _from_folder(root, source, left_out)
    if is_local(source.path):
        return _from_table(root, part, source)
    return _from_hub(part, source)


def named(sentences: list[str], what: str) -> list[str]:
    """The first few sentences, and a count of the rest."""
    more = len(sentences) - NAMED
    return sentences[:NAMED] + ([f"and {more:,} more {what}"] if more > 0 else [])


def _local(paths: list[Path], labels: list[str], classes: list[str], source: SourcePart) -> Pictures:
    rows = {PICTURE: [{"path": str(p), "bytes": None} for p in paths]}
    contents = datasets.Dataset.from_dict(rows, features=datasets.Features({PICTURE: FEATURE}))
    return Pictures(contents, labels, classes, source.path)


# -- folders ---------------------------------------------------------------------------------------------------------


def _from_folder(root: Path, source: SourcePart, left_out: tuple[str, ...]) -> Pictures:
    """Each folder below the split's folder is a class."""
    folder = _split_folder(root, source)
    classes = [p.name for p in _visible(folder) if p.is_dir() and p.name not in left_out]
    if not classes:
        raise CoreLoraError(f"{folder}: a folder a class is expected in it, with the class's pictures; found none")
    files = {name: [p for p in sorted((folder / name).rglob("*")) if _is_candidate(p)] for name in classes}
    paths = [p for name in classes for p in files[name]]
    labels = [name for name in classes for _ in files[name]]
    return _local(paths, labels, classes, source)


def _split_folder(root: Path, source: SourcePart) -> Path:
    """The folder of a split; the root itself where it has no folders of splits and `train` is asked for."""
    split = split_name(source)
    if source.split.strip() != split:
        raise CoreLoraError(f"split {source.split!r} of {root}: folders have no slices; images.shots draws pictures")
    below = [p.name for p in _visible(root) if p.is_dir()]
    if split in below:
        return root / split
    splits = {split_of(Path(name)): name for name in below if split_of(Path(name)) and len(below) <= 4}
    wanted = split_of(Path(split))
    if wanted in splits and wanted is not None:
        return root / splits[wanted]
    if not splits and wanted == "train":
        return root
    known = ", ".join(sorted(splits.values())) or "none; give the folder of each split as its path, with split: train"
    raise CoreLoraError(f"{root}: there is no folder for the split {split!r}. Folders of splits: {known}.")


def _visible(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]


def _is_candidate(path: Path) -> bool:
    """Whether a file in a class's folder is meant to be a picture; one that is none, or a link to none, is named."""
    return not path.is_dir() and not path.name.startswith(".") and path.name.lower() not in NOT_PICTURES


# -- tables ----------------------------------------------------------------------------------------------------------


def _from_table(file: Path, part: DataPart, source: SourcePart) -> Pictures:
    """A file of rows that name a picture (relative to the file) and its class."""
    columns = {PICTURE: Column(), LABEL: Column()}
    rows = read_rows(source, columns, part.columns)
    paths = [file.parent / str(p) for p in rows.dataset[PICTURE]]
    labels = [str(name) for name in rows.dataset[LABEL]]
    return _local(paths, labels, sorted(set(labels)), source)


# -- CoOp's split files ----------------------------------------------------------------------------------------------


def _from_split_file(file: Path, root: Path, source: SourcePart) -> Pictures:
    """CoOp's JSON: lists `train`, `val` and `test` of [file below the root, number of the class, its name]."""
    splits = _read_splits(file)
    split = split_name(source)
    wanted = {"validation": "val", "valid": "val", "dev": "val"}.get(split, split)
    if wanted not in splits:
        raise CoreLoraError(f"{file}: there is no split {split!r} in it. Known: {', '.join(splits)}.")
    if not root.is_dir():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        guess = nearest(root.name, beside)
        raise CoreLoraError(f"{root}: no such folder of pictures.{f' Did you mean {guess}?' if guess else ''}")
    names = {int(number): str(name) for rows in splits.values() for _, number, name in rows}
    rows = splits[wanted]
    labels = [names[int(number)] for _, number, _ in rows]
    return _local([root / str(path) for path, _, _ in rows], labels, [names[n] for n in sorted(names)], source)


def _read_splits(file: Path) -> Mapping[str, list[Any]]:
    try:
        data = file.read_bytes()
        splits = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
    except FileNotFoundError:
        beside = [p.name for p in file.parent.glob("*.json*")] if file.parent.is_dir() else []
        guess = nearest(file.name, beside)
        raise CoreLoraError(f"{file}: no such file.{f' Did you mean {guess}?' if guess else ''}") from None
    except (OSError, ValueError, EOFError) as error:
        raise CoreLoraError(f"{file}: not a split file in JSON ({' '.join(str(error).split())})") from None
    whole = isinstance(splits, dict) and all(isinstance(rows, list) for rows in splits.values())
    if not whole or not all(_is_row(row) for rows in splits.values() for row in rows):
        raise CoreLoraError(
            f"{file}: lists of [file, number of the class, its name] under train, val, test are expected"
        )
    return splits


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and isinstance(row[1], int)


# -- hub sets --------------------------------------------------------------------------------------------------------


def _from_hub(part: DataPart, source: SourcePart) -> Pictures:
    """A hub set with a column of pictures and one of classes."""
    dataset = load_hub(source, source.split)
    return from_dataset(dataset, part.columns, source)


def from_dataset(dataset: datasets.Dataset, columns: Mapping[str, str], source: SourcePart) -> Pictures:
    """Pictures of a loaded set.

    Args:
        dataset: has an Image column, and one of classes (ClassLabel, or texts).
        columns: other names: `{"picture": "img", "label": "fine_label"}`.
        source: where it is from, for messages.

    Raises:
        CoreLoraError: no such column, with the nearest; several columns of pictures.
    """
    shown = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    picture = columns.get(PICTURE) or (shown[0] if len(shown) == 1 else None)
    if picture is None:
        found = f"several columns hold pictures ({', '.join(shown)})" if shown else "no column holds pictures"
        raise CoreLoraError(
            f"{source.path}: {found}; set data.columns.picture. Columns: {', '.join(dataset.features)}."
        )
    label = columns.get(LABEL, LABEL)
    for name in (picture, label):
        if name not in dataset.features:
            guess = nearest(name, dataset.features)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise CoreLoraError(
                f"{source.path}: there is no column {name!r}.{hint} Columns: {', '.join(dataset.features)}. "
                "data.columns.picture and data.columns.label name them."
            )
    contents = dataset.select_columns([picture]).rename_column(picture, PICTURE).cast_column(PICTURE, FEATURE)
    kind, values = dataset.features[label], dataset[label]
    if isinstance(kind, datasets.ClassLabel):
        labels, classes = [kind.names[n] for n in values], list(kind.names)
    else:
        labels = [str(v) for v in values]
        classes = sorted(set(labels))
    content, rows = datasets.fingerprint.generate_fingerprint(dataset), range(1, len(labels) + 1)
    return Pictures(contents, labels, classes, f"{source.path} {source.split}", content, rows)
