"""Outputs on their way: kept line by line as they are made, so that a stopped evaluation goes on where it stopped.

The outputs of a batch depend on the rows it is made of, so batches are cut once, over all rows in order of length, and
one that was not whole when the evaluation stopped is made again whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from corelora.data.cache import key_of


class Partial:
    """The outputs of one suite so far, in a file of JSON lines whose first line says what they are of.

    Args:
        path: of the file.
        key: everything that an output depends on; a file of another key is begun anew.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.key = key_of(key)
        self.outputs: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        if not self.outputs:
            path.write_text(json.dumps({"key": self.key}) + "\n", encoding="utf-8")

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        whole, good = [], 0
        for line in lines:
            try:
                whole.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the process ended
            if not line.endswith("\n"):
                break
            good += len(line.encode())
        if not whole or whole[0].get("key") != self.key:
            return
        self.outputs = {entry["id"]: entry["output"] for entry in whole[1:]}
        os.truncate(self.path, good)

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Keep outputs, by the id of their sample; on disk when this returns."""
        new = {n: o for n, o in outputs.items() if n not in self.outputs}
        with open(self.path, "a", encoding="utf-8") as file:
            for name, output in new.items():
                file.write(json.dumps({"id": name, "output": output}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.outputs.update(new)

    def end(self) -> None:
        """The results are written: the file is not needed any more."""
        self.path.unlink(missing_ok=True)


def batches(ids: Sequence[str], lengths: Sequence[int], size: int, partial: Partial) -> Iterator[list[int]]:
    """Indices of the batches that are still to be made, longest first: what is too large fails at once.

    Args:
        ids: of all samples.
        lengths: of their inputs; samples of like length share a batch.
        size: samples a batch.
        partial: what is there already.
    """
    order = sorted(range(len(ids)), key=lambda n: (-lengths[n], n))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        if any(ids[n] not in partial.outputs for n in batch):
            yield batch
