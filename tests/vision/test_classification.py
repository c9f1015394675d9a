"""Classifiers of pictures: transformers and convolutions, adapters and heads, and what is saved."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from corelora import export_lora
from corelora.errors import CoreLoraError
from corelora.merged import export_merged
from corelora.train.dry_run import check, plan
from corelora.train.methods import clipped_ranks
from corelora.train.progress import read_metrics
from corelora.train.run import train
from corelora.train.tasks import TASKS
from corelora.tuner_layer import CoreLoraLayer
from corelora.vision.norms import FrozenBatchNorm2d, freeze_batch_norms
from train.helpers import trainer_of
from vision.helpers import CLASSIFIERS, TEXTURES, make_recipe, save_classifier

TASK = TASKS["image_classification"]
TARGETS = {
    "vit": ["q_proj", "k_proj", "v_proj"],
    "resnet": ["convolution"],
    "convnext": ["pwconv1", "pwconv2"],
    "efficientnet": ["stem", "expand", "project", "top"],
}
METHODS = {
    "lora": {"name": "lora", "r": 4},
    "nlora": {"name": "nlora", "r": 4},
    "nora": {"name": "nora", "r": 8, "inner_r": 4},
    "lora_sb": {"name": "lora_sb", "r": 8},
    "inttune": {"name": "inttune", "r": 8},
    "peft:lora": {"name": "peft:lora", "r": 4},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny classifiers."""
    return {kind: save_classifier(tmp_path_factory.mktemp(kind), kind) for kind in CLASSIFIERS}


def recipe_of(models, pictures, kind, method="nora", **parts):
    """A recipe over a tiny classifier; layers smaller than the rank are clipped."""
    given = METHODS.get(method, {"name": method})
    if method in METHODS:
        given = {**given, "target_modules": TARGETS[kind]}
        given |= {} if method.startswith("peft") else {"on_small_layer": "clip"}
    return make_recipe(models[kind], pictures, task="image_classification", method=given, **parts)


@pytest.mark.parametrize("method", [*METHODS, "head", "full"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_method_learns(kind, method, models, pictures, tmp_path):
    """The loss falls on linear layers and convolutions; the saved result loads and answers."""
    loop = {"steps": 25, "log_every": 5}
    recipe = recipe_of(models, pictures, kind, method, loop=loop, optim={"lr": 1e-2})
    results = train(recipe, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    assert list(results["classes"]) == sorted(TEXTURES)
    whole = method in ("head", "full")
    folder = tmp_path / ("model" if whole else "adapter")
    loaded = answers(folder if whole else models[kind], None if whole else folder, pictures)
    assert loaded == pytest.approx(results["test_accuracy"])


def answers(base, adapter, pictures, processor=None):
    """Accuracy on the test pictures of what was saved, by plain transformers and PEFT."""
    from PIL import Image

    model = AutoModelForImageClassification.from_pretrained(
        base, num_labels=len(TEXTURES), ignore_mismatched_sizes=True
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    processor = AutoImageProcessor.from_pretrained(processor or adapter or base)
    right = []
    for n, kind in enumerate(sorted(TEXTURES)):
        shown = [Image.open(p) for p in sorted((pictures / "test" / kind).glob("*.png"))]
        with torch.no_grad():
            logits = model.eval()(**processor(images=shown, return_tensors="pt")).logits
        right += (logits.argmax(dim=1) == n).tolist()
    return sum(right) / len(right)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_next_steps_work(kind, models, pictures, tmp_path):
    """What a run ends with: its adapter as a plain LoRA, and merged, from the folder alone."""
    recipe = recipe_of(models, pictures, kind, "nlora", loop={"steps": 8}, optim={"lr": 1e-2})
    expected = train(recipe, tmp_path / "run")["test_accuracy"]
    export_lora(tmp_path / "run" / "adapter", tmp_path / "lora", for_="peft")
    export_merged(tmp_path / "run" / "adapter", tmp_path / "merged")
    assert answers(models[kind], tmp_path / "lora", pictures, tmp_path / "run" / "adapter") == pytest.approx(expected)
    assert answers(tmp_path / "merged", None, pictures) == pytest.approx(expected)


def test_above_chance_on_pictures_that_it_has_not_seen(models, pictures, tmp_path):
    """A convolutional body with adapters, from random weights."""
    loop = {"steps": 60, "batch_size": 18}
    recipe = recipe_of(models, pictures, "resnet", "lora", loop=loop, optim={"lr": 1e-2})
    assert train(recipe, tmp_path)["test_accuracy"] > 0.6


@pytest.mark.skipif(torch.cuda.is_available(), reason="convolutions of a GPU are left as they are")
def test_convolutions_lie_as_a_cpu_likes_them(models, pictures, tmp_path):
    model = trainer_of(recipe_of(models, pictures, "efficientnet"), tmp_path).model
    weights = [m.weight for m in model.get_base_model().modules() if type(m) is nn.Conv2d and m.kernel_size != (1, 1)]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize("part", [{"model": {"dtype": "bfloat16"}}, {"loop": {"precision": "bfloat16"}}], ids=str)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_other_types(kind, part, models, pictures, tmp_path):
    """Weights in bfloat16, and arithmetic in bfloat16 over weights in float32."""
    part = {**part, "loop": {"steps": 2, **part.get("loop", {})}}
    results = train(recipe_of(models, pictures, kind, "nlora", **part), tmp_path)
    assert 0 < results["train_loss"] < 3


@pytest.mark.parametrize("kind", ["vit", "efficientnet"])
def test_recomputed_activations(kind, models, pictures, tmp_path):
    """Equal results where the model has them, one sentence where it has not."""
    recipes = [recipe_of(models, pictures, kind, "lora", loop={"steps": 3, "checkpointing": c}) for c in (False, True)]
    if kind == "efficientnet":
        with pytest.raises(CoreLoraError, match=r"loop\.checkpointing: EfficientNetLiteForImageClassification can't"):
            train(recipes[1], tmp_path)
        return
    plain, again = (train(r, tmp_path / str(n)) for n, r in enumerate(recipes))
    assert again["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_only_the_head_trains(models, pictures, tmp_path):
    """Frozen features: the body that is saved is the one that was loaded, its running statistics included."""
    results = train(recipe_of(models, pictures, "resnet", "head", optim={"lr": 1e-2}), tmp_path)
    before = load_file(models["resnet"] / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    changed = {
        name for name, tensor in after.items() if before[name].shape != tensor.shape or not tensor.equal(before[name])
    }
    assert changed == {"classifier.1.weight", "classifier.1.bias"}
    assert results["trained_parameters"] == sum(after[n].numel() for n in changed)


def test_full_fine_tuning_moves_the_statistics(models, pictures, tmp_path):
    """Only there: the whole model is saved."""
    train(recipe_of(models, pictures, "resnet", "full"), tmp_path)
    before = load_file(models["resnet"] / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    means = [n for n in after if n.endswith("running_mean")]
    assert means
    assert not any(after[n].equal(before[n]) for n in means)


def test_frozen_batch_norms_keep_names_and_answers():
    """In training mode too, and after it was asked for again."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4)))
    net[1][0].running_mean.normal_()
    x, names = torch.randn(2, 3, 8, 8), list(net.state_dict())
    expected = net.eval()(x)
    assert freeze_batch_norms(net) == 1
    assert torch.equal(net.train()(x), expected)
    assert isinstance(net[1][0], FrozenBatchNorm2d)
    assert list(net.state_dict()) == names
    assert torch.equal(net(x), expected)


def test_a_new_head_begins_anew_whatever_its_size(models, pictures, tmp_path):
    """A pretrained head of three classes is not one of these three."""
    config = AutoConfig.from_pretrained(models["vit"], num_labels=3)
    torch.manual_seed(1)
    old = AutoModelForImageClassification.from_config(config)
    old.save_pretrained(tmp_path / "three")
    AutoImageProcessor.from_pretrained(models["vit"]).save_pretrained(tmp_path / "three")
    recipe = recipe_of({"vit": tmp_path / "three"}, pictures, "vit")
    model = trainer_of(recipe, tmp_path / "run").model
    head = model.get_submodule("base_model.model.classifier.modules_to_save.default")
    assert not torch.equal(head.weight, old.classifier.weight)
    assert head.bias.abs().sum() == 0
    assert model.config.id2label == dict(enumerate(sorted(TEXTURES)))


def test_a_cut_run_goes_on_bit_for_bit(models, pictures, tmp_path):
    """With crops and batch norms."""
    loop = {"steps": 8, "batch_size": 8, "save_every": 3, "log_every": 1, "keep": 9}
    recipe = recipe_of(models, pictures, "efficientnet", "nlora", images={"augment": "light"}, loop=loop)
    whole = train(recipe, tmp_path / "whole")
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "versions.json"):
        (cut / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "whole" / "checkpoints" / "checkpoint-6").rename(cut / "checkpoints" / "checkpoint-6")
    again = train(recipe, cut)
    assert again["test_loss"] == whole["test_loss"]
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (cut, tmp_path / "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_crops_differ_from_epoch_to_epoch(models, pictures, tmp_path):
    """And the first epoch's come again in a second run."""
    loop = {"steps": 6, "batch_size": 12, "save_every": 100}  # three batches an epoch
    seen = []
    for run in ("a", "b"):
        recipe = recipe_of(models, pictures, "vit", "lora", images={"augment": "light"}, loop=loop)
        trainer = trainer_of(recipe, tmp_path / run)
        epochs = []
        made = trainer.data_collator._draw
        trainer.data_collator._draw = lambda row, c=trainer.data_collator, e=epochs, m=made: e.append(c.epoch) or m(row)
        trainer.train()
        seen.append(epochs)
    assert seen[0] == seen[1] == [0] * 36 + [1] * 36


@pytest.mark.parametrize("method", ["nlora", "nora", "inttune"])
def test_ranks_are_clipped_where_asked_for(method, models, pictures, tmp_path):
    """A rank over a convolution's smaller side is an error that names it, or clipped."""
    recipe = recipe_of(models, pictures, "efficientnet", method)
    recipe.method["r"] = 12
    recipe.method.pop("on_small_layer")
    with pytest.raises(
        CoreLoraError, match=r"r = 12 exceeds the smaller side of 3 targeted weight\(s\): .*stem \[8, 27\]"
    ):
        check(recipe, tmp_path)
    recipe.method["on_small_layer"] = "clip"
    model = trainer_of(recipe, tmp_path).model
    ranks = [m.cores["default"].spec.r for m in model.modules() if isinstance(m, CoreLoraLayer)]
    assert sorted(ranks) == [8, 8, 8, 12, 12, 12, 12]
    assert clipped_ranks(model) == "rank 12 is clipped to the smaller side of 3 of 7 layers"
    assert clipped_ranks(model) in plan(recipe, tmp_path / "other")


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("peft")])
def test_depthwise_convolutions_can_be_adapted(method, models, pictures, tmp_path):
    """Nine or 25 wide, so that a larger rank is clipped; each step goes through the dense update."""
    recipe = recipe_of(models, pictures, "efficientnet", method, loop={"steps": 40, "log_every": 8}, optim={"lr": 1e-2})
    recipe.method["target_modules"] = ["depthwise"]
    results = train(recipe, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    assert answers(models["efficientnet"], tmp_path / "adapter", pictures) == pytest.approx(results["test_accuracy"])


def test_targets_that_match_nothing_are_named(models, pictures, tmp_path):
    """With the nearest."""
    recipe = recipe_of(models, pictures, "efficientnet")
    recipe.method["target_modules"] = ["steem"]
    with pytest.raises(CoreLoraError, match="steem"):
        check(recipe, tmp_path)


def test_head_in_classify_too(tmp_path):
    """The same baseline on a text model."""
    from train.helpers import make_recipe as text_recipe
    from train.helpers import save_bert, write_rows

    save_bert(tmp_path / "bert")
    write_rows(
        tmp_path / "t.jsonl", [{"sentence": f"{'good' if n % 2 else 'bad'} {n}", "label": n % 2} for n in range(24)]
    )
    data = {"train": {"path": str(tmp_path / "t.jsonl")}, "test": None, "form": "sst2"}
    recipe = text_recipe(
        tmp_path, task="classify", model={"name": str(tmp_path / "bert")}, data=data, method={"name": "head"}
    )
    results = train(recipe, tmp_path / "run")
    assert results["trained_parameters"] == 2 * 32 + 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
