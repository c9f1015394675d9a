"""A recipe's pictures as rows for training."""

from __future__ import annotations

from typing import Any

import datasets

from corelora.data.cache import key_of
from corelora.vision.choose import Chosen, check_pictures
from corelora.vision.listing import FEATURE, PICTURE

SCHEMA = datasets.Features(
    {
        PICTURE: FEATURE,
        "labels": datasets.Value("int64"),
        "name": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "train": datasets.Value("bool"),
    }
)


def encode_pictures(chosen: Chosen, which: str, *settings: Any) -> tuple[datasets.Dataset, str]:
    """The pictures of a split, each with its label; they are decoded batch by batch.

    Args:
        chosen: the run's pictures.
        which: "train" or "test".
        *settings: what else the tensors depend on, in JSON: the processor's settings, the crops, the seed.

    Returns:
        A dataset and its fingerprint. Columns: picture {"path", "bytes"}, labels (a place in `chosen.classes`), name
        (the class's), row (a number within the split), train (whether it may be augmented).

    Raises:
        CoreLoraError: pictures that can't be used, by file.
    """
    pictures, labels = chosen.pictures[which], chosen.labels(which)
    count = len(labels)
    beside = {
        "labels": labels,
        "name": [chosen.names[n] for n in labels],
        "row": list(range(count)),
        "train": [which == "train"] * count,
    }
    key = key_of(check_pictures(chosen), which, labels, chosen.classes, list(settings))
    if pictures.content is None:  # paths
        rows = {PICTURE: list(pictures.contents[PICTURE]), **beside}
        return datasets.Dataset.from_dict(rows, features=SCHEMA), key
    dataset = datasets.concatenate_datasets([pictures.contents, datasets.Dataset.from_dict(beside)], axis=1)
    return dataset.cast(SCHEMA), key
