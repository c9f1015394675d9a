"""Files of rows, read one row at a time: json, jsonl and csv (plain or gzipped) and parquet.

A reader yields an `Item` for each row, and for what is no row; it never holds a whole file in memory. Only an array in
a .json file has no lines to go on after broken JSON, and only a broken gzip file ends early; both say so.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from corelora.errors import CoreLoraError, nearest

CHUNK = 1 << 20  # characters of a .json array that are read at a time
LONGEST_FIELD = 1 << 27  # characters of a csv field; Python's own limit of 131,072 is below long replies


@dataclass(frozen=True)
class Item:
    """One row of a file, or what stands in its place.

    Attributes:
        place: number of its line; in parquet files and .json arrays of the row.
        unit: what `place` counts, "line" or "row".
        row: the row, or None where there is a problem.
        problem: what is wrong, in one sentence.
    """

    place: int
    unit: str = "line"
    row: dict[str, Any] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Format:
    """How one kind of file is read.

    Attributes:
        items: path -> items.
        textual: every value is a text.
        zipped: may be gzipped.
    """

    items: Callable[[Path], Iterator[Item]]
    textual: bool = False
    zipped: bool = True


def file_format(path: Path) -> Format:
    """The format that a file's name stands for.

    Raises:
        CoreLoraError: no known ending.
    """
    name = path.name.lower()
    found = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    if found is None or (name.endswith(".gz") and not found.zipped):
        known = [f"{e}{' (.gz)' if f.zipped else ''}" for e, f in FORMATS.items()]
        raise CoreLoraError(f"{path}: no format is known by this ending. Known: {', '.join(known)}.")
    return found


def is_data_file(path: Path) -> bool:
    """Whether a file in a folder holds rows, by its name."""
    return not path.name.startswith(".") and Path(path.name.lower().removesuffix(".gz")).suffix in FORMATS


def find_files(path: Path, split: str) -> list[Path]:
    """The files of one split.

    A single file is whatever split it is asked for. In a folder, a file belongs to the split that its name or its
    folder's has in it as a word (train; test; validation, valid, val, dev); where no name has one, all are `train`.

    Args:
        path: file or folder.
        split: the split's name.

    Raises:
        CoreLoraError: nothing is there, with the nearest name; a folder without files of this split.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = nearest(path.name, beside)
        raise CoreLoraError(f"{path}: no such file or folder.{f' Did you mean {guess}?' if guess else ''}")
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and is_data_file(p)]
    if not files:
        raise CoreLoraError(f"{path}: no file with rows is in this folder ({', '.join(FORMATS)})")
    splits = {p: split_of(p.relative_to(path)) for p in files}
    if set(splits.values()) == {None}:
        splits = dict.fromkeys(files, "train")
    chosen = [p for p in files if splits[p] == _SPLIT_WORDS.get(split, split)]
    if not chosen:
        found = ", ".join(sorted({s for s in splits.values() if s}))
        raise CoreLoraError(f"{path}: no file of this folder belongs to split {split!r}. Found: {found}.")
    return chosen


_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def split_of(path: Path) -> str | None:
    """The split that a path names as a word, the file's own name before its folders'; None where it names none."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def read_items(path: Path) -> Iterator[Item]:
    """The rows of a file, in order; problems come as items too.

    A file that cannot be read on (broken gzip, no parquet, a CSV without a header) ends with an item that says so.
    """
    place = 0
    try:
        for item in file_format(path).items(path):
            place = item.place
            yield item
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield Item(place + 1, problem=f"broken gzip, nothing can be read from here on ({error})")
    except (csv.Error, pa.ArrowException) as error:
        yield Item(place + 1, problem=f"cannot be read from here on: {' '.join(str(error).split())}")
    except UnicodeDecodeError as error:
        yield Item(place + 1, problem=f"not UTF-8, cannot be read from here on ({error.reason})")
    except OSError as error:
        raise CoreLoraError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _json_lines(path: Path) -> Iterator[Item]:
    with _open(path) as file:
        for place, line in enumerate(file, 1):
            if place == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _json_line(place, line)


def _json_line(place: int, line: bytes) -> Item:
    try:
        return _as_row(place, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Item(place, problem=f"not UTF-8 at byte {error.start + 1} of the line")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        return Item(place, problem=f"invalid JSON: {error}")


def _as_row(place: int, value: Any, unit: str = "line") -> Item:
    if isinstance(value, dict):
        return Item(place, unit, row=value)
    wrong = f"a row must be an object with the columns' names as keys, found {str(value)[:40]!r}"
    return Item(place, unit, problem=wrong)


def _json(path: Path) -> Iterator[Item]:
    """A .json file: one array of objects, or one object a line."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _json_array(path) if start.startswith(b"[") else _json_lines(path)


class _Window:
    """A part of a text file that moves forward; values are decoded from it."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.text, self.at = file, "", 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Read on, and forget what is behind; False at the file's end."""
        new = self.file.read(CHUNK)
        self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)

    def next_sign(self) -> str:
        """The next character that is no blank, where the window stops; empty at the file's end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that begins here; the window stops behind it."""
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # Cut off by the window's end, or broken? A string may be cut anywhere, the rest only at the very end.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if not cut or not self.more():
                    raise


_BLANKS = re.compile(r"\s*")


def _json_array(path: Path) -> Iterator[Item]:
    """The items of one array, whose brackets and commas are read here."""
    place = 0
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig") as file:
        window = _Window(file)
        while window.next_sign() and window.text[window.at] != "]":
            window.at += 1  # the opening bracket, or the comma behind a row
            if window.next_sign() == "]" and place == 0:
                break
            place += 1
            try:
                yield _as_row(place, window.value(), "row")
            except (ValueError, RecursionError) as error:
                yield Item(place, "row", problem=f"invalid JSON, nothing can be read from here on ({_short(error)})")
                return
            if window.next_sign() not in (",", "]"):
                break
        if window.next_sign() != "]":
            yield Item(place + 1, "row", problem="invalid JSON: a comma or the end of the array is expected")
            return
        window.at += 1
        if window.next_sign():
            yield Item(place + 1, "row", problem="invalid JSON: there is more behind the end of the array")


def _short(error: Exception) -> str:
    """A decoder's message without its place, which is one in the window."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _csv(path: Path) -> Iterator[Item]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            yield from _csv_items(csv.reader(file, strict=True))
    finally:
        csv.field_size_limit(limit)


def _csv_items(reader: Any) -> Iterator[Item]:
    header: list[str] = next(reader, [])
    yield from _header_problems(header)
    before = reader.line_num
    for values in reader:
        place, before = before + 1, reader.line_num  # a quoted value may span lines; the row begins here
        if len(values) == len(header):
            yield Item(place, row=dict(zip(header, values, strict=True)))
        elif values:
            yield Item(place, problem=f"{len(values)} values, where the header has {len(header)} columns")


def _header_problems(header: list[str]) -> Iterator[Item]:
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header:
        yield Item(1, problem="no header with the columns' names")
    if twice:
        yield Item(1, problem=f"the header has {', '.join(map(repr, twice))} more than once")


def _parquet(path: Path) -> Iterator[Item]:
    with closing(pa.parquet.ParquetFile(path)) as file:
        rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
        yield from (Item(place, "row", row=row) for place, row in enumerate(rows, 1))


FORMATS: dict[str, Format] = {
    ".jsonl": Format(_json_lines),
    ".json": Format(_json),
    ".csv": Format(_csv, textual=True),
    ".parquet": Format(_parquet, zipped=False),
}
