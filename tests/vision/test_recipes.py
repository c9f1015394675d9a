"""Every recipe and study of vision that ships, dry-run on folders as CoOp's guide lays them out, without a network."""

import dataclasses
import json

import pytest
from PIL import Image
from transformers import CLIPConfig

from corelora.compare.devices import without_rates
from corelora.compare.published import published_columns
from corelora.compare.session import planned_runs, start_study
from corelora.errors import CoreLoraError
from corelora.recipe import Recipe, load_recipe
from corelora.train import clip_few_shot, dry_run, tasks
from corelora.train.dry_run import check, plan
from vision.helpers import DTD, REPOSITORY, SHARED

ROOT = REPOSITORY / "recipes" / "vision"
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
RECIPES = sorted(p for p in ROOT.rglob("*.yaml") if p.parent.name != "studies")
BASES = ("nora-paper/base.yaml", "dtd-efficientnet/base.yaml")  # what others build on: no set, or no method
SHOTS = 16


def named(path):
    return str(path.relative_to(ROOT))


def clip_b16(part, **settings):
    """The shape of openai/clip-vit-base-patch16, one layer a tower."""
    assert part.name == "openai/clip-vit-base-patch16"
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 1}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
    return CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 16}, projection_dim=512)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The pictures and split files that the recipes name: small, but enough of each class."""
    root = tmp_path_factory.mktemp("coop")
    for path in RECIPES:
        recipe = load_recipe(Recipe, path) if named(path) not in BASES else None
        if recipe is not None and not (root / str(recipe.images.split_file)).exists():
            lay_out(root, recipe)
    return root


def lay_out(root, recipe):
    """One set: `train`, `val` and `test` lists, and their files."""
    folder, split = root / recipe.data.train.path, root / recipe.images.split_file
    classes = recipe.images.classes or ["Acura RL", "b_c"]
    lists = {which: [] for which in ("train", "val", "test")}
    for which, rows in lists.items():
        for n, name in enumerate(classes):
            rows += [[f"{n}/{which}{k}.png", n, name] for k in range(SHOTS if which == "train" else 1)]
    for name in (name for rows in lists.values() for name, _, _ in rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    split.parent.mkdir(parents=True, exist_ok=True)
    split.write_text(json.dumps(lists))


@pytest.fixture
def offline(laid_out, monkeypatch):
    """Where the data lies; CLIP's config from here."""
    monkeypatch.chdir(laid_out)
    real = tasks.load_model_config

    def config(part, **settings):
        return real(part, **settings) if part.name.startswith("package:") else clip_b16(part, **settings)

    for module in (tasks, dry_run):
        monkeypatch.setattr(module, "load_model_config", config)
    words = lambda texts: {"input_ids": [text.split() for text in texts]}  # noqa: E731
    monkeypatch.setattr(clip_few_shot, "load_tokenizer", lambda part: words)


def test_there_are_recipes():
    """Nothing is passed over: both folders and all studies are seen."""
    assert len(RECIPES) >= 14
    assert {p.parent.name for p in RECIPES} == {"dtd-efficientnet", "nora-paper"}
    assert [p.stem for p in STUDIES] == [
        "dtd-efficientnet",
        "nora-figure-02",
        "nora-table-03",
        "nora-table-08",
        "nora-table-09",
    ]


@pytest.mark.parametrize("path", [p for p in RECIPES if named(p) not in BASES], ids=named)
def test_a_recipe(path, offline, tmp_path):
    """Nothing is wrong with it; it says what it is for and where its settings come from."""
    recipe = load_recipe(Recipe, path)
    assert recipe.about
    assert f"method    {recipe.method['name']}, " in plan(recipe, tmp_path / "run")


def test_the_papers_settings():
    """Table 12 and appendix C.3 differ; both are there."""
    table, appendix = (load_recipe(Recipe, ROOT / "nora-paper" / f"{n}.yaml") for n in ("dtd", "appendix"))
    assert (table.loop.batch_size, table.optim.lr, table.loop.steps) == (64, 5e-4, 400)
    assert (appendix.loop.batch_size, appendix.optim.lr, appendix.loop.steps) == (16, 1e-4, 5000)
    for recipe in (table, appendix):
        assert (recipe.method["r"], recipe.method["inner_r"]) == (256, 16)
        assert recipe.data.form == "dtd"
    assert dataclasses.replace(table, loop=appendix.loop, optim=appendix.optim, about="") == dataclasses.replace(
        appendix, about=""
    )


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_a_study(path, offline, tmp_path):
    """Every different recipe of it is sound; the paper's figure is there for each setting of each group."""
    study = start_study(path, tmp_path / "study")
    once = {without_rates(run.recipe): run for run in planned_runs(study)}
    assert len(once) >= 9
    for run in once.values():
        try:
            check(run.recipe, tmp_path / "run")
        except CoreLoraError as error:
            pytest.fail(f"{run.group}, {dict(run.labels)}: {error}")


@pytest.mark.parametrize("path", STUDIES, ids=named)
def test_rates_are_never_tuned_on_test_pictures(path, tmp_path):
    """Where a group tunes, its runs look at validation pictures and its finalists alone at the test."""
    for group in start_study(path, tmp_path / "study").study.groups:
        if group.tune:
            assert group.set["data.test.split"] == "val", group.name
            assert group.finalists.set["data.test.split"] == "test", group.name


def test_published_figures_are_found(tmp_path):
    """NoRA on DTD, from the paper's Table 3."""

    class Leader:
        setting = (("method", "NoRA"),)

        def average(self, figure):
            return 0.5

    study = start_study(ROOT / "studies" / "nora-table-03.yaml", tmp_path / "study")
    groups = {g.name: g for g in study.study.groups}
    for name, figure in (("DTD, 4 shots", "65.2"), ("DTD, 16 shots", "74.3")):
        columns = published_columns(ROOT / "studies", groups[name], [Leader()])
        assert list(columns["published dtd, %"].values()) == [figure]
        assert list(columns["measured dtd"].values()) == ["50.00"]


@pytest.mark.skipif(not DTD.is_dir(), reason="the shared data is not beside this repository")
def test_ten_textures_by_the_recipes_own_settings(tmp_path):
    """The real pictures, by the settings that the recipe's text names."""
    split = SHARED / "vision" / "splits" / "split_zhou_DescribableTextures.json.gz"
    changes = [f"data.train.path={DTD / 'images'}", f"data.test.path={DTD / 'images'}", f"images.split_file={split}"]
    for name in ("head", "nora"):
        recipe = load_recipe(Recipe, ROOT / "dtd-efficientnet" / f"{name}.yaml", changes)
        facts = check(recipe, tmp_path)
        assert facts.parameters > 3_000_000
    # Stem, top, 16 projections, 15 expansions; narrower than 32: the stem (27 wide), three of each (16 to 24 channels).
    assert facts.clipped == "rank 32 is clipped to the smaller side of 7 of 33 layers"


def test_paths_in_recipes_are_the_users():
    """No recipe names a folder that only one machine has."""
    for path in RECIPES + STUDIES:
        assert not [line for line in path.read_text().splitlines() if ": /" in line], path
