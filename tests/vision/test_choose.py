"""Folders, tables, hub sets and split files; classes, names, shots; what is wrong with them."""

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image

from corelora.errors import CoreLoraError
from corelora.recipe.images import ImagesPart
from corelora.recipe.schema import DataPart, SourcePart
from corelora.vision import choose as module
from corelora.vision.choose import check_pictures, choose
from corelora.vision.listing import from_dataset
from corelora.vision.sets import SETS
from vision.helpers import DTD, SHARED, TEXTURES, save_textures, texture


def part(path, test=None, form="folder", **options):
    """A recipe's data."""
    tested = None if test is None else SourcePart(path=str(path), split=test)
    return DataPart(train=SourcePart(path=str(path)), test=tested, form=form, **options)


def files(chosen, which="train"):
    """Names of the chosen files, with their classes' folder."""
    return ["/".join(Path(p["path"]).parts[-2:]) for p in chosen.pictures[which].contents["picture"]]


# -- sources ---------------------------------------------------------------------------------------------------------


def test_folders_of_classes(pictures):
    """Splits are folders; each folder in one is a class."""
    chosen = choose(part(pictures, "test"), ImagesPart(), 0)
    assert chosen.classes == sorted(TEXTURES)
    assert (len(chosen.pictures["train"]), len(chosen.pictures["test"])) == (36, 24)
    labels = [chosen.classes[n] for n in chosen.labels("train")]
    assert labels == [f.split("/")[0] for f in files(chosen)]
    alone = choose(part(pictures / "train"), ImagesPart(), 0)  # a folder without splits
    assert files(alone) == files(chosen)
    with pytest.raises(CoreLoraError, match=r"no folder for the split 'val'.*test, train"):
        choose(part(pictures, "val"), ImagesPart(), 0)
    with pytest.raises(CoreLoraError, match="folders have no slices"):
        choose(DataPart(train=SourcePart(path=str(pictures), split="train[:5]"), form="folder"), ImagesPart(), 0)


def test_what_systems_leave_in_folders_is_no_picture(tmp_path):
    """Hidden files and thumbnails are passed over."""
    save_textures(tmp_path, 2, 1)
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "train" / "banded" / name).write_bytes(b"no picture")
    check_pictures(choose(part(tmp_path), ImagesPart(), 0))


def test_links_to_nothing_are_named(tmp_path):
    """As data managers leave for files that were not fetched."""
    save_textures(tmp_path, 2, 1)
    (tmp_path / "train" / "banded" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(CoreLoraError, match=r"banded/gone\.png is missing"):
        check_pictures(choose(part(tmp_path), ImagesPart(), 0))


@pytest.mark.parametrize("template", ["a photo", "{} of {}", "{} of {place}", "{} {", "{{}}", "{} }"])
def test_templates_have_one_place_for_the_name(template):
    assert repr(template) in ImagesPart(templates=["a {}.", template]).problems()[0]


def test_tables(pictures):
    """Rows that name a file, relative to the table, and a class."""
    rows = [{"file": f"train/{k}/{n:03}.png", "name": k} for k in TEXTURES for n in (3, 1)]
    (pictures / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = part(pictures / "few.jsonl", columns={"picture": "file", "label": "name"})
    chosen = choose(data, ImagesPart(), 0)
    assert files(chosen) == [r["file"].removeprefix("train/") for r in rows]
    check_pictures(chosen)
    with pytest.raises(CoreLoraError, match="no column 'label'"):
        choose(part(pictures / "few.jsonl", columns={"picture": "file"}), ImagesPart(), 0)


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_split_files_of_coop(pictures, ending):
    """[file, number, name] under train, val and test; labels in the order of the numbers."""
    rows = [[f"train/{k}/000.png", 2 - n, f"the_{k}"] for n, k in enumerate(TEXTURES)]
    text = json.dumps({"train": rows, "val": rows[:2], "test": rows}).encode()
    file = pictures / f"split{ending}"
    file.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    chosen = choose(part(pictures, "validation"), ImagesPart(split_file=str(file)), 0)
    assert chosen.classes == [f"the_{k}" for k in reversed(TEXTURES)]
    assert chosen.names == [f"the {k}" for k in reversed(TEXTURES)]
    assert chosen.labels("train") == [2, 1, 0]
    assert chosen.labels("test") == [2, 1]


def test_split_files_that_are_wrong(pictures, tmp_path):
    """A missing one with the nearest, one of another form, a split that is not in it."""
    (tmp_path / "split_a.json").write_text(json.dumps({"train": [["x", 1, "a"]]}))
    (tmp_path / "other.json").write_text(json.dumps({"train": ["x"]}))
    for name, said in (("split_b.json", "Did you mean split_a.json"), ("other.json", "lists of \\[file")):
        with pytest.raises(CoreLoraError, match=said):
            choose(part(pictures), ImagesPart(split_file=str(tmp_path / name)), 0)
    with pytest.raises(CoreLoraError, match=r"no split 'test' in it. Known: train"):
        choose(part(pictures, "test"), ImagesPart(split_file=str(tmp_path / "split_a.json")), 0)


def hub_set(kind=None):
    """A set as the hub has them, its pictures inside."""
    rows = {"img": [texture(k, n) for k in TEXTURES for n in range(2)], "kind": [n // 2 for n in range(6)]}
    kinds = kind or datasets.ClassLabel(names=list(TEXTURES))
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"img": datasets.Image(), "kind": kinds}))


def test_hub_sets(monkeypatch):
    """The only column of pictures is found; classes are the set's own, in its order."""
    monkeypatch.setattr("corelora.vision.listing.load_hub", lambda source, split: hub_set())
    chosen = choose(part("somebody/textures", columns={"label": "kind"}), ImagesPart(shots=1), 0)
    assert chosen.classes == list(TEXTURES)
    first = check_pictures(chosen)
    again = choose(part("somebody/textures", columns={"label": "kind"}), ImagesPart(shots=1), 3)
    assert again.labels("train") == chosen.labels("train") == [0, 1, 2]
    assert check_pictures(again) != first  # another seed, other pictures


def test_bad_pictures_of_hub_sets_are_named_by_row(monkeypatch):
    """The row is that of the set, whatever was drawn from it."""
    whole = hub_set().cast_column("img", datasets.Image(decode=False))
    rows = [{**row, "img": {**row["img"], "bytes": b"no"}} if n == 4 else row for n, row in enumerate(whole)]
    broken = datasets.Dataset.from_list(rows, features=whole.features)
    monkeypatch.setattr("corelora.vision.listing.load_hub", lambda source, split: broken)
    chosen = choose(
        part("somebody/textures", columns={"label": "kind"}), ImagesPart(classes=["chequered", "dotted"]), 0
    )
    with pytest.raises(CoreLoraError, match="pictures: train: somebody/textures train row 5 is not a picture"):
        check_pictures(chosen)


def test_columns_of_hub_sets():
    """What is missing is named with the nearest; labels may be texts."""
    source = SourcePart(path="somebody/textures")
    with pytest.raises(CoreLoraError, match=r"no column 'label'.*Columns: img, kind"):
        from_dataset(hub_set(), {}, source)
    other = hub_set().select_columns("img").rename_column("img", "other")
    both = datasets.concatenate_datasets([hub_set(), other], axis=1)
    with pytest.raises(CoreLoraError, match="several columns hold pictures"):
        from_dataset(both, {}, source)
    with pytest.raises(CoreLoraError, match="no column holds pictures"):
        from_dataset(hub_set().remove_columns("img"), {"label": "kind"}, source)
    texts = from_dataset(hub_set(datasets.Value("string")), {"label": "kind"}, source)
    assert texts.classes == ["0", "1", "2"]


# -- classes and shots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_shots(pictures, shots):
    """As many of each class, by seed; fewer are among more."""
    drawn = {s: choose(part(pictures, "test"), ImagesPart(shots=shots), s) for s in (0, 1)}
    for chosen in drawn.values():
        assert Counter(chosen.pictures["train"].labels) == dict.fromkeys(TEXTURES, shots)
        assert len(chosen.pictures["test"]) == 24
    assert files(drawn[0]) == files(choose(part(pictures), ImagesPart(shots=shots), 0))
    assert files(drawn[0]) != files(drawn[1])
    assert set(files(drawn[0])) <= set(files(choose(part(pictures), ImagesPart(shots=shots + 2), 0)))


def test_a_class_with_too_few_pictures_is_named(tmp_path):
    """All such classes at once, with what they have."""
    save_textures(tmp_path, 3, 1)
    (tmp_path / "train" / "banded" / "000.png").unlink()
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(CoreLoraError) as caught:
        choose(part(tmp_path), ImagesPart(shots=3), 0)
    assert "class 'banded' has 2 pictures, fewer than the 3 needed" in str(caught.value)
    assert "class 'empty' has 0 pictures" in str(caught.value)
    assert "dotted" not in str(caught.value)


def test_some_of_the_classes(pictures):
    """In the order that the recipe gives; the test rows are of these only."""
    chosen = choose(part(pictures, "test"), ImagesPart(classes=["dotted", "banded"]), 0)
    assert chosen.classes == ["dotted", "banded"]
    assert set(chosen.pictures["test"].labels) == {"dotted", "banded"}
    assert chosen.labels("test") == [1] * 8 + [0] * 8
    for classes, said in (
        (["dotted", "bandd"], "Did you mean 'banded'"),
        (["dotted", "dotted"], "is there twice"),
        (["dotted"], "at least two classes"),
    ):
        with pytest.raises(CoreLoraError, match=said):
            choose(part(pictures), ImagesPart(classes=classes), 0)


def test_a_class_of_the_test_that_never_trains(tmp_path):
    """It could only be answered wrongly."""
    save_textures(tmp_path, 2, 2)
    (tmp_path / "test" / "banded").rename(tmp_path / "test" / "stripes")
    with pytest.raises(CoreLoraError, match=r"class 'stripes' is not among the classes of data\.train"):
        choose(part(tmp_path, "test"), ImagesPart(), 0)


def test_an_unknown_set(pictures):
    """With the nearest."""
    with pytest.raises(CoreLoraError, match=r"unknown form 'oxford_pet'\. Did you mean 'oxford_pets'"):
        choose(part(pictures, form="oxford_pet"), ImagesPart(), 0)


@pytest.mark.parametrize(
    ("form", "name", "prompt"),
    [
        ("folder", "red_car", "a photo of a red car."),
        ("dtd", "polka-dotted", "polka-dotted texture."),
        ("oxford_pets", "American_Bulldog", "a photo of a american bulldog, a type of pet."),
        ("food101", "apple_pie", "a photo of apple pie, a type of food."),
        ("ucf101", "ApplyEyeMakeup", "a photo of a person doing Apply Eye Makeup."),
        ("ucf101", "Apply_Eye_Makeup", "a photo of a person doing Apply Eye Makeup."),
        ("stanford_cars", "Acura RL Sedan 2012", "a photo of a 2012 Acura RL Sedan."),
        ("stanford_cars", "2012 Acura RL Sedan", "a photo of a 2012 Acura RL Sedan."),
        ("caltech101", "Faces", "a photo of a face."),
        ("eurosat", "SeaLake", "a centered satellite photo of Sea or Lake."),
        ("oxford_flowers", "pink_primrose", "a photo of a pink primrose, a type of flower."),
    ],
)
def test_prompts_of_the_known_sets(form, name, prompt):
    """As CoOp has them, from the sets' own folders and from its split files."""
    assert SETS[form].template.format(SETS[form].clean(name)) == prompt


def test_folders_that_are_no_class(tmp_path):
    """Caltech101 has two that nobody counts."""
    for name in ("BACKGROUND_Google", "Faces", "Leopards"):
        (tmp_path / name).mkdir()
        texture("banded", 0).save(tmp_path / name / "0.png")
    assert choose(part(tmp_path, form="caltech101"), ImagesPart(), 0).names == ["face", "leopard"]


# -- the check of each file ------------------------------------------------------------------------------------------


def test_all_bad_files_are_named_at_once(tmp_path):
    """By file, of both splits; the check is made again once they are mended."""
    save_textures(tmp_path, 3, 2)
    bad = {"train/banded/000.png": b"", "train/dotted/001.png": b"text", "test/dotted/000.png": b"\x89PNG\r\n\x1a\n"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CoreLoraError) as caught:
        check_pictures(choose(part(tmp_path, "test"), ImagesPart(), 0))
    for name in bad:
        assert str(tmp_path / name) in str(caught.value)
    assert "3 problems" in str(caught.value)
    for name in bad:
        texture("dotted", 5).save(tmp_path / name)
    check_pictures(choose(part(tmp_path, "test"), ImagesPart(), 0))


def test_many_bad_files_are_counted(tmp_path):
    """The first ones by name."""
    save_textures(tmp_path, 6, 1)
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(CoreLoraError, match="and 8 more pictures that can't be used"):
        check_pictures(choose(part(tmp_path), ImagesPart(), 0))


def test_missing_files_of_a_table(tmp_path):
    """A table can name what is not there."""
    (tmp_path / "t.csv").write_text("picture,label\na.png,x\nb.png,y\n")
    with pytest.raises(CoreLoraError, match=r"a\.png is missing"):
        check_pictures(choose(part(tmp_path / "t.csv"), ImagesPart(), 0))


def test_good_pictures_are_decoded_once(pictures, monkeypatch):
    """What was found good and did not change is not read again."""
    chosen = choose(part(pictures), ImagesPart(shots=2), 7)
    first, seen, look = check_pictures(chosen), [], module._look
    monkeypatch.setattr(module, "_look", lambda content: seen.append(content) or look(content))
    assert check_pictures(chosen) == first
    assert not seen
    path = Path(chosen.pictures["train"].contents[0]["picture"]["path"])
    before = path.read_bytes()
    Image.new("RGB", (9, 9)).save(path)
    try:
        assert check_pictures(chosen) != first
        assert len(seen) == 6
    finally:
        path.write_bytes(before)


# -- the shared data -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DTD.is_dir(), reason="the shared data is not beside this repository")
def test_ten_classes_of_dtd():
    """The table, and the same pictures by CoOp's split file of the whole set."""
    test = SourcePart(path=str(DTD / "test.jsonl"))
    columns = {"picture": "file", "label": "classname"}
    table = choose(
        DataPart(train=SourcePart(path=str(DTD / "train.jsonl")), test=test, form="dtd", columns=columns),
        ImagesPart(shots=16),
        0,
    )
    assert len(check_pictures(table)) == 64
    assert (len(table.pictures["train"]), len(table.pictures["test"])) == (160, 360)
    split = SHARED / "vision" / "splits" / "split_zhou_DescribableTextures.json.gz"
    listed = choose(
        part(DTD / "images", "test", form="dtd"), ImagesPart(split_file=str(split), classes=table.classes), 0
    )
    assert sorted(files(listed, "test")) == sorted(files(table, "test"))
    assert set(files(table)) <= set(files(listed))
