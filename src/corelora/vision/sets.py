"""Known sets of pictures: how CoOp (Zhou 2022) writes their class names, and its prompt of each.

CoOp's split files carry the names as CoOp cleans them; here the names that the sets' own folders have become the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from corelora.registry import Registry

PLAIN = "a photo of a {}."


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """What a set's form stands for.

    Attributes:
        template: prompt of a class, `{}` for its name.
        clean: a class as a folder, table or split file has it -> its name in a prompt.
        left_out: folders that are no class.
    """

    template: str = PLAIN
    clean: Callable[[str], str] = lambda name: spaced(name)
    left_out: tuple[str, ...] = ()


def spaced(name: str) -> str:
    """Underscores as spaces."""
    return " ".join(name.replace("_", " ").split())


def _renamed(names: dict[str, str]) -> Callable[[str], str]:
    return lambda name: spaced(names.get(name, name))


def _split_words(name: str) -> str:
    """UCF101: `ApplyEyeMakeup` is `Apply Eye Makeup`."""
    return spaced(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))


def _year_first(name: str) -> str:
    """StanfordCars: `Acura RL Sedan 2012` is `2012 Acura RL Sedan`."""
    words = spaced(name).split()
    last_is_year = len(words) > 1 and re.fullmatch(r"(19|20)\d\d", words[-1])
    return " ".join([words[-1], *words[:-1]] if last_is_year else words)


SETS: Registry[KnownSet] = Registry("form")
SETS.add("folder", KnownSet())
SETS.add("dtd", KnownSet(template="{} texture."))
SETS.add("oxford_pets", KnownSet(template="a photo of a {}, a type of pet.", clean=lambda name: spaced(name).lower()))
SETS.add("food101", KnownSet(template="a photo of {}, a type of food."))
SETS.add("ucf101", KnownSet(template="a photo of a person doing {}.", clean=_split_words))
SETS.add("stanford_cars", KnownSet(clean=_year_first))
SETS.add(
    "caltech101",
    KnownSet(
        clean=_renamed(
            {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
        ),
        left_out=("BACKGROUND_Google", "Faces_easy"),
    ),
)
SETS.add(
    "eurosat",
    KnownSet(
        template="a centered satellite photo of {}.",
        clean=_renamed(
            {
                "AnnualCrop": "Annual Crop Land",
                "HerbaceousVegetation": "Herbaceous Vegetation Land",
                "Highway": "Highway or Road",
                "Industrial": "Industrial Buildings",
                "Pasture": "Pasture Land",
                "PermanentCrop": "Permanent Crop Land",
                "Residential": "Residential Buildings",
                "SeaLake": "Sea or Lake",
            }
        ),
    ),
)
SETS.add("oxford_flowers", KnownSet(template="a photo of a {}, a type of flower."))
