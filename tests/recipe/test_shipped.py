"""Every recipe and study that ships, dry-run: keys, methods, targets, ranks, forms and columns fit, without a network.

Configs are the models' own shapes with one layer; rows have the columns of the hub's sets.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import transformers

from corelora.compare.devices import without_rates
from corelora.compare.published import belongs
from corelora.compare.session import planned_runs, start_study
from corelora.errors import CoreLoraError
from corelora.recipe import Recipe, load_recipe
from corelora.recipe.schema import SourcePart
from corelora.train import dry_run, models, tasks
from corelora.train.dry_run import check

ROOT = Path(__file__).resolve().parents[2] / "recipes"
OTHER_TASKS = {"vision", "diffusion"}  # tested where those tasks are
NOT_RECIPES = {"accelerate"}


def files(studies: bool) -> list[Path]:
    """Recipes, or studies; a file that only others build on has no method or no data of its own."""
    found = []
    for path in sorted(ROOT.rglob("*.yaml")):
        folder = path.relative_to(ROOT).parts[0]
        if folder not in OTHER_TASKS | NOT_RECIPES and (folder == "studies") == studies:
            found.append(path)
    return found


def is_base(path: Path) -> bool:
    """Whether other recipes name this file as theirs."""
    return any(
        f"base: {path.name}" in p.read_text() or f"/{path.name}" in p.read_text() for p in path.parent.rglob("*.yaml")
    )


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


LLAMA = {"architecture": transformers.LlamaConfig, "hidden_act": "silu"}
SHAPES = {
    "meta-llama/Llama-2-7b-hf": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "huggyllama/llama-7b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "meta-llama/Meta-Llama-3-8B": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "mistralai/Mistral-7B-v0.1": {
        "architecture": transformers.MistralConfig, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "google/gemma-7b": {
        "architecture": transformers.GemmaConfig, "hidden_size": 3072, "intermediate_size": 24576,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    },
    "microsoft/deberta-v3-base": {
        "architecture": transformers.DebertaV2Config, "hidden_size": 768, "intermediate_size": 3072,
        "num_attention_heads": 12, "relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "vocab_size": 128100,
    },
    "FacebookAI/roberta-large": {
        "architecture": transformers.RobertaConfig, "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "vocab_size": 50265,
    },
}  # fmt: skip

TEXT = "some text"
TURNS = [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}]
PAIR = {"sentence1": TEXT, "sentence2": TEXT, "label": 1, "idx": 0}
ROWS = {
    "meta-math/MetaMathQA": {"type": "x", "query": TEXT, "original_question": TEXT, "response": TEXT},
    "m-a-p/CodeFeedback-Filtered-Instruction": {"query": TEXT, "answer": TEXT, "resource": "x", "lang": "python"},
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": {"idx": "1", "conversations": TURNS},
    "zwhe99/commonsense_170k": {"instruction": TEXT, "input": "", "output": TEXT, "answer": "true"},
    **{
        f"{task}_{part}.jsonl": {"instruction": TEXT, "input": "", "output": TEXT, "answer": "true"}
        for task in ("arc_easy", "boolq", "obqa")
        for part in ("train", "test")
    },
    "openai/gsm8k": {"question": TEXT, "answer": TEXT},
    "nyu-mll/glue cola": {"sentence": TEXT, "label": 1, "idx": 0},
    "nyu-mll/glue sst2": {"sentence": TEXT, "label": 1, "idx": 0},
    "nyu-mll/glue mrpc": PAIR,
    "nyu-mll/glue rte": PAIR,
    "nyu-mll/glue stsb": {**PAIR, "label": 2.5},
    "nyu-mll/glue qnli": {"question": TEXT, "sentence": TEXT, "label": 1, "idx": 0},
    "nyu-mll/glue qqp": {"question1": TEXT, "question2": TEXT, "label": 1, "idx": 0},
    "nyu-mll/glue mnli": {"premise": TEXT, "hypothesis": TEXT, "label": 1, "idx": 0},
}


def one_layer(part, **settings):
    """The model's config with one layer; a name that is not known here is a mistake of the recipe."""
    if part.name.startswith("package:"):
        config = real_config(part, **settings)
        config.num_hidden_layers = 1
        return config
    if part.name not in SHAPES:
        raise CoreLoraError(f"model.name: the test knows no shapes of {part.name!r}")
    shape = dict(SHAPES[part.name])
    return shape.pop("architecture")(num_hidden_layers=1, **shape, **settings)


real_config = models.load_model_config


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A recipe as it is, but for rows with the set's columns in a file and a config from here."""
    monkeypatch.setattr(tasks, "load_model_config", one_layer)
    monkeypatch.setattr(dry_run, "load_model_config", one_layer)
    monkeypatch.setattr(tasks.TASKS["instruct"], "processor_problems", lambda recipe: [])  # tokenizers are on the hub

    def source(given: SourcePart | None) -> SourcePart | None:
        if given is None or given.path.startswith("built-in:"):
            return given
        name = f"{given.path} {given.subset}" if given.path == "nyu-mll/glue" else given.path
        assert name in ROWS, f"the test knows no columns of {name!r}"
        path = tmp_path / f"{name.replace('/', '-').replace(' ', '-')}.jsonl"
        path.write_text(json.dumps(ROWS[name]) + "\n")
        return SourcePart(path=str(path))

    def changed(recipe: Recipe) -> Recipe:
        data = dataclasses.replace(recipe.data, train=source(recipe.data.train), test=source(recipe.data.test))
        return dataclasses.replace(recipe, data=data, model=dataclasses.replace(recipe.model, start_from=None))

    return changed


@pytest.mark.parametrize("path", [p for p in files(studies=False) if not is_base(p)], ids=named)
def test_a_recipe(path, offline, tmp_path):
    """Nothing is wrong with it; it says what it is for and where its settings come from."""
    recipe = load_recipe(Recipe, path)
    assert recipe.about
    assert check(offline(recipe), tmp_path / "run").trained > 0


@pytest.mark.parametrize("path", [p for p in files(studies=True) if not is_base(p)], ids=named)
def test_a_study(path, offline, tmp_path):
    """Every different recipe of it; published figures are there, for some setting of each group, one row for each."""
    study = start_study(path, tmp_path / "study")
    once = {without_rates(run.recipe): run for run in planned_runs(study)}
    for run in once.values():
        try:
            check(offline(run.recipe), tmp_path / "run")
        except CoreLoraError as error:
            pytest.fail(f"{run.group}, {dict(run.labels)}: {error}")
    for group in study.study.groups:
        if group.published is not None:
            data = json.loads((study.where / group.published.file).read_text())
            assert set(group.published.columns) <= set(data["columns"])
            compared = [{a: v for a, v in r.labels.items() if a not in group.tune} for r in study.first[group.name]]
            counts = [sum(belongs(row, {**own, **group.published.where}) for row in data["rows"]) for own in compared]
            assert max(counts) == 1, f"{group.name}: {counts} rows of {group.published.file} are one of its settings"


def test_the_start_from_mnli():
    """MRPC, RTE and STS-B of RoBERTa-large begin where the run of MNLI with the same method writes."""
    folder = ROOT / "nlora-paper" / "glue" / "roberta-large"
    for method in ("nlora", "slora"):
        written = load_recipe(Recipe, folder / f"mnli-{method}.yaml").output
        for task in ("mrpc", "rte", "stsb"):
            assert load_recipe(Recipe, folder / f"{task}-{method}.yaml").model.start_from == written
