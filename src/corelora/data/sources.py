"""Rows from a hub set, a local file, a folder of files or a built-in set, checked and kept as Arrow on disk.

Nothing is dropped: every row that is wrong is an error, which names file and line. All rows are checked before any
is used, and the error has the first of them and their count.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetNotFoundError
from tqdm.auto import tqdm

from corelora.data.cache import digest_of, key_of, made_once
from corelora.data.columns import Column, features
from corelora.data.files import FORMATS, Item, file_format, find_files, read_items
from corelora.errors import CoreLoraError, nearest, raise_all
from corelora.recipe.schema import SourcePart
from corelora.registry import Registry
from corelora.tasks.word_problems import Problem, held_out_problems, training_problems

NAMED = 10  # bad rows that an error names; it counts the rest
FILE, PLACE = "_file", "_place"  # where a row is from: index of its file, line or row in it
BUILT_IN = "built-in:"
NO_ROWS = "there is no row in it"

_SPLIT = re.compile(r"\s*(?P<name>\w[\w.-]*)\s*(\[[^\[\]]*\])?\s*")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Rows:
    """Rows, and where each is from.

    Attributes:
        dataset: the columns that were asked for, under the names they were asked for, and two that say where from.
        files: name of each file and what its rows are counted in, "line" or "row".
        fingerprint: names the content: equal files, columns and slice, equal fingerprint.
    """

    dataset: datasets.Dataset
    files: list[tuple[str, str]]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, n: int) -> str:
        """Where row n is from, such as "train.jsonl line 7", also after slices and shuffles."""
        row = self.dataset.select_columns([FILE, PLACE])[n]
        name, unit = self.files[row[FILE]]
        return f"{name} {unit} {row[PLACE]}"

    def select(self, indices: Iterable[int]) -> Rows:
        """These rows, in this order."""
        indices = indices if isinstance(indices, range) else list(indices)
        return Rows(self.dataset.select(indices), self.files, key_of(self.fingerprint, repr(indices)))

    def shuffle(self, seed: int) -> Rows:
        """All rows, in an order that the seed gives."""
        return Rows(
            self.dataset.shuffle(seed=seed, keep_in_memory=True), self.files, key_of(self.fingerprint, "shuffled", seed)
        )


@dataclass(frozen=True)
class Wanted:
    """The columns that are needed.

    Attributes:
        columns: by the name they are kept under.
        names: other names that they have in the file: `{"query": "question"}`.
    """

    columns: Mapping[str, Column]
    names: Mapping[str, str] = field(default_factory=dict)

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """One sentence a column that a row must have and has not."""
        needed = [self.names.get(n, n) for n, column in self.columns.items() if not column.optional]
        return [_missing(name, row) for name in needed if name not in row]

    def read(self, row: Mapping[str, Any], textual: bool) -> tuple[dict[str, Any], list[str]]:
        """The values that are kept, and what is wrong."""
        problems = self.missing(row)
        if problems:
            return {}, problems
        read = {n: self._value(n, column, row, textual) for n, column in self.columns.items()}
        return {n: value for n, (value, _) in read.items()}, [wrong for _, wrong in read.values() if wrong]

    def _value(self, name: str, column: Column, row: Mapping[str, Any], textual: bool) -> tuple[Any, str | None]:
        there = self.names.get(name, name)
        return column.read(there, row.get(there), textual=textual)

    @property
    def key(self) -> list[Any]:
        """What stands for this in a fingerprint."""
        return [{n: repr(c) for n, c in self.columns.items()}, dict(self.names)]


def _missing(name: str, row: Mapping[str, Any]) -> str:
    guess = nearest(name, row)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"there is no column {name!r}.{hint} Columns: {', '.join(map(str, row)) or 'none'}."


@dataclass
class Stream:
    """Items on their way from a source.

    Attributes:
        name: of the file, for messages.
        items: an iterator that can be asked for anew.
        textual: every value is a text (csv).
    """

    name: str
    items: Callable[[], Iterator[Item]]
    textual: bool = False


def read_rows(source: SourcePart, columns: Mapping[str, Column], names: Mapping[str, str] | None = None) -> Rows:
    """All rows of a source's split, checked.

    Args:
        source: where from.
        columns: what is needed, by the name it is kept under.
        names: other names that columns have in the file: `{"query": "question"}`.

    Raises:
        CoreLoraError: nothing is there; a bad split; a column that is missing, with the nearest; bad rows, the first
            ones by file and line, and their count.
    """
    split, wanted = split_name(source), Wanted(columns, names or {})
    streams, content = _streams(source, split)
    key = key_of(content, wanted.key)
    folder = made_once("rows", key, lambda out: _write(source, streams, wanted, out))
    files = [(str(name), str(unit)) for name, unit in json.loads((folder / "files.json").read_text())]
    dataset = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    if not len(dataset):
        raise CoreLoraError(f"{source.path}: {NO_ROWS}")
    return _sliced(source, split, Rows(dataset, files, key))


def peek(source: SourcePart, wanted: Wanted, count: int) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The first rows of each file, unless something is wrong with them; a hub set is not asked for.

    Args:
        source: where from.
        wanted: the columns that are needed.
        count: rows to look at, of each file.

    Returns:
        Rows, each with where it is from, and what is wrong, one sentence each.
    """
    try:
        split = split_name(source)
        _slice(source, split, 100)
        if not is_local(source.path):
            return [], []
        streams = _open_local(source, split)
        problems = [f"{source.path}: {text}" for text in _column_problems(streams, wanted)]
    except CoreLoraError as error:
        return [], [str(error)]
    rows, found = [], Findings()
    items = ((s, item) for s in streams for item in itertools.islice(s.items(), 0 if problems else count))
    for stream, item in items:
        row = _kept(stream, item, wanted, found)
        if row is not None:
            rows.append((f"{stream.name} {item.unit} {item.place}", row))
    if not rows and not problems and not found.count:
        problems = [f"{source.path}: {NO_ROWS}"]
    return rows, problems + [f"{source.path}: {text}" for text in found.all()]


def first_columns(source: SourcePart) -> set[str]:
    """The columns of a local source's first row; none where it cannot be read."""
    try:
        first = next(_open_local(source, split_name(source))[0].items(), None)
    except CoreLoraError:
        return set()
    return set(first.row or ()) if first else set()


def split_name(source: SourcePart) -> str:
    """The split without its slice.

    Raises:
        CoreLoraError: the split is not written as one.
    """
    match = _SPLIT.fullmatch(source.split)
    if match is None:
        raise CoreLoraError(
            f"split {source.split!r} of {source.path}: write one split, with a slice if wanted, such as "
            "train, train[:1000] or train[10%:20%]"
        )
    return match["name"]


def _slice(source: SourcePart, split: str, rows: int) -> range:
    """The row numbers that a split's slice stands for. An end behind the last row is the last row, as in Python."""
    try:
        part = datasets.ReadInstruction.from_spec(source.split.strip()).to_absolute({split: rows})[0]
    except (ValueError, AssertionError) as error:
        raise CoreLoraError(f"split {source.split!r} of {source.path}: {error}") from None
    return range(part.from_ or 0, rows if part.to is None else part.to)


def _sliced(source: SourcePart, split: str, rows: Rows) -> Rows:
    chosen = _slice(source, split, len(rows))
    if not chosen:
        raise CoreLoraError(f"split {source.split!r} of {source.path}: no row is in this slice of {len(rows):,} rows")
    return rows if len(chosen) == len(rows) else rows.select(chosen)


# -- where rows are from ---------------------------------------------------------------------------------------------


def _streams(source: SourcePart, split: str) -> tuple[list[Stream], Any]:
    """The streams of a source, and what stands for their content in a fingerprint."""
    if source.path.startswith(BUILT_IN):
        return _open_local(source, split), [source.path, split]
    if is_local(source.path):
        files = find_files(Path(source.path).expanduser(), split)
        return _open_local(source, split), [[p.name, digest_of(p)] for p in files]
    dataset = load_hub(source, split)
    return [Stream(f"{source.path} {split}", lambda: _hub_items(dataset))], [
        source.path,
        source.subset,
        split,
        datasets.fingerprint.generate_fingerprint(dataset),
    ]


def _open_local(source: SourcePart, split: str) -> list[Stream]:
    if source.path.startswith(BUILT_IN):
        return [_built_in(source, split)]
    root = Path(source.path).expanduser()
    streams = []
    for path in find_files(root, split):
        name = path.name if path == root else str(path.relative_to(root))
        streams.append(Stream(name, lambda p=path: read_items(p), file_format(path).textual))  # type: ignore[misc]
    return streams


def is_local(path: str) -> bool:
    """Whether a source needs no network: a built-in set, or a file or folder, which is there or is written as one."""
    written = path.startswith((BUILT_IN, ".", "/", "~")) or path.endswith(".gz") or Path(path).suffix in FORMATS
    return written or Path(path).exists() or not _HUB_NAME.fullmatch(path)


def load_hub(source: SourcePart, split: str) -> datasets.Dataset:
    """A hub set's split, or a part of one.

    Raises:
        CoreLoraError: it can't be read.
    """
    try:
        return datasets.load_dataset(source.path, source.subset, split=split, revision=source.revision)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        why = " ".join(str(error).split())
        raise CoreLoraError(
            f"{source.path}: no such file or folder here, and it cannot be read from the hub: {why}"
        ) from error


def _hub_items(dataset: datasets.Dataset) -> Iterator[Item]:
    for place, row in enumerate(dataset, 1):
        yield Item(place, "row", row=row)


def _problem_row(problem: Problem) -> dict[str, Any]:
    return {"question": problem.question, "solution": problem.solution, "answer": problem.answer}


# Built-in sets: split -> rows. A slice takes the first ones, which do not depend on how many there are.
BUILT_IN_SETS: Registry[dict[str, Callable[[], list[dict[str, Any]]]]] = Registry("built-in set")
BUILT_IN_SETS.add(
    "word_problems",
    {
        "train": lambda: [_problem_row(p) for p in training_problems(20_000)],
        "test": lambda: [_problem_row(p) for p in held_out_problems(2_000)],
    },
)


def _built_in(source: SourcePart, split: str) -> Stream:
    name = source.path.removeprefix(BUILT_IN)
    splits = BUILT_IN_SETS[name]
    if split not in splits:
        raise CoreLoraError(f"{source.path} has no split {split!r}. Known: {', '.join(splits)}.")
    return Stream(f"{name} {split}", lambda: (Item(n, "row", row=row) for n, row in enumerate(splits[split](), 1)))


# -- checks and files ------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What is wrong with rows: the first few sentences, and the count of all."""

    sentences: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, problems: list[str]) -> None:
        """One bad row."""
        self.count += 1
        if self.count <= NAMED:
            self.sentences.append(f"{where}: {'; '.join(problems)}")

    def all(self) -> list[str]:
        """For an error message; empty where nothing is wrong."""
        return self.sentences + ([f"and {self.count - NAMED:,} more bad rows"] if self.count > NAMED else [])

    def stop(self, path: str) -> None:
        """Raise what was found; do nothing where that is nothing."""
        if self.count > 1:
            lines = "\n".join(f"  - {text}" for text in self.all())
            raise CoreLoraError(f"{path}: {self.count:,} bad rows\n{lines}")
        raise_all(self.sentences, path)


def _column_problems(streams: list[Stream], wanted: Wanted) -> list[str]:
    """What the first row of each file lacks: one sentence a column, not one a row."""
    found = []
    for stream in streams:
        first = next(stream.items(), None)
        if first is not None and first.row is not None:
            found += [f"{stream.name}: {text}" for text in wanted.missing(first.row)]
    return found


def _kept(stream: Stream, item: Item, wanted: Wanted, found: Findings) -> dict[str, Any] | None:
    """A row as it is kept, or None where it is wrong, which is then among the findings."""
    values: dict[str, Any] = {}
    problems = [str(item.problem)]
    if item.row is not None:
        values, problems = wanted.read(item.row, stream.textual)
    if problems:
        found.add(f"{stream.name} {item.unit} {item.place}", problems)
    return None if problems else values


def _write(source: SourcePart, streams: list[Stream], wanted: Wanted, out: Path) -> None:
    """Check all rows and write them as Arrow; raise what is wrong once everything has been read."""
    raise_all(_column_problems(streams, wanted), source.path)
    schema = features({**wanted.columns, FILE: Column(kind="whole"), PLACE: Column(kind="whole")}).arrow_schema
    found, units = Findings(), ["line"] * len(streams)
    with pa.OSFile(str(out / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(_rows(streams, wanted, found, units)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    found.stop(source.path)
    (out / "files.json").write_text(json.dumps([[s.name, unit] for s, unit in zip(streams, units, strict=True)]))


def _rows(streams: list[Stream], wanted: Wanted, found: Findings, units: list[str]) -> Iterator[dict[str, Any]]:
    items = ((n, item) for n, stream in enumerate(streams) for item in stream.items())
    for n, item in tqdm(items, desc="reading", unit="row", delay=2):
        units[n] = item.unit
        row = _kept(streams[n], item, wanted, found)
        if row is not None:
            yield {**row, FILE: n, PLACE: item.place}


def _batches(rows: Iterator[dict[str, Any]], size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch
