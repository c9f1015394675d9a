"""CLIP and SigLIP on few pictures: the loss falls, and every piece is what the papers say."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForZeroShotImageClassification, CLIPConfig, CLIPModel

from corelora import CoreLoraConfig
from corelora.errors import CoreLoraError
from corelora.train.clip_few_shot import class_logits, prompt_tokens
from corelora.train.dry_run import check, plan
from corelora.train.methods import wanted_stats
from corelora.train.progress import read_metrics
from corelora.train.run import train
from corelora.train.tasks import TASKS
from train.helpers import save_tokenizer, trainer_of
from vision.helpers import DTD, TEXTURES, make_recipe, save_classifier, save_clip

TASK = TASKS["clip_few_shot"]
ADAPTED = ["q_proj", "k_proj", "v_proj"]


def towers(request, name):
    """The folder of a tiny model."""
    return request.getfixturevalue(name)


@pytest.mark.parametrize("method", ["nora", "lora", "nlora"])
@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_it_learns(model, method, pictures, request, tmp_path):
    """From a random model to above chance on pictures that it has not seen."""
    settings = {"name": method, "r": 8, "target_modules": ADAPTED} | ({"inner_r": 8} if method == "nora" else {})
    loop = {"steps": 60, "log_every": 5}
    recipe = make_recipe(towers(request, model), pictures, method=settings, loop=loop, optim={"lr": 1e-2})
    results = train(recipe, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert results["test_accuracy"] > 0.6  # a third is chance
    assert results["test_accuracy"] > results["zero_shot_accuracy"]
    assert set(results["classes"]) == set(TEXTURES)
    mean = sum(c["accuracy"] * c["pictures"] for c in results["classes"].values()) / 24
    assert mean == pytest.approx(results["test_accuracy"])
    assert json.loads((tmp_path / "results.json").read_text())["classes"] == results["classes"]


def test_a_prompt_that_is_too_long_is_found_before_the_weights(clip, pictures, tmp_path):
    recipe = make_recipe(clip, pictures, images={"templates": [80 * "a" + " {}"]})
    with pytest.raises(CoreLoraError, match=r"has \d+ tokens, the text tower reads 48"):
        plan(recipe, tmp_path)


def test_both_towers_learn_and_the_scale_does_not(clip, pictures, tmp_path):
    """Each q, k, v of both towers has an adapter that moved."""
    train(make_recipe(clip, pictures), tmp_path)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = {re.sub(r".*(text|vision)_model\.encoder\.layers\.(\d).*?([qkv])_proj.*", r"\1 \2 \3", n) for n in saved}
    assert layers == {f"{t} {n} {p}" for t in ("text", "vision") for n in (0, 1) for p in "qkv"}
    begun_at_zero = [tensor for name, tensor in saved.items() if name.endswith("core_b.weight")]
    assert len(begun_at_zero) == 12
    assert all(0 < tensor.abs().max() < 1 for tensor in begun_at_zero)
    assert not [n for n in saved if "logit" in n]


def test_the_adapter_loads_in_plain_transformers_and_peft(clip, pictures, tmp_path):
    """The saved folder gives the accuracy that the run reported, and its processor reads pictures."""
    from transformers import AutoImageProcessor, AutoTokenizer

    recipe = make_recipe(clip, pictures, loop={"steps": 30}, optim={"lr": 1e-2})
    results = train(recipe, tmp_path)
    folder = tmp_path / "adapter"
    base = AutoModelForZeroShotImageClassification.from_pretrained(clip)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        [f"a photo of a {k}." for k in sorted(TEXTURES)], padding=True, return_tensors="pt"
    )
    processor, right, count = AutoImageProcessor.from_pretrained(folder), 0, 0
    from PIL import Image

    for n, kind in enumerate(sorted(TEXTURES)):
        shown = [Image.open(p) for p in sorted((pictures / "test" / kind).glob("*.png"))]
        values = processor(images=shown, return_tensors="pt")["pixel_values"]
        ids = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        with torch.no_grad():
            answers = model(pixel_values=values, **ids).logits_per_image.argmax(dim=1)
        right, count = right + int((answers == n).sum()), count + len(shown)
    assert right / count == pytest.approx(results["test_accuracy"])


@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_zero_shot_is_the_pretrained_models(model, pictures, request, tmp_path):
    """Measured before training, without the adapter, even where that does not start at nothing."""
    folder = towers(request, model)
    method = {"name": "nlora", "variant": "published", "r": 4, "target_modules": ADAPTED}
    trainer = trainer_of(make_recipe(folder, pictures, method=method, loop={"steps": 1}), tmp_path)
    trainer.train()
    base = AutoModelForZeroShotImageClassification.from_pretrained(folder).eval()
    right = 0
    for batch in trainer.get_eval_dataloader():
        labels = batch.pop("labels")
        with torch.no_grad():
            right += int((base(**batch).logits_per_image.argmax(dim=1) == labels).sum())
    assert trainer.zero_shot == pytest.approx(right / 24)


@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_one_template_gives_the_models_own_logits(model, request):
    """SigLIP's are shifted by its bias, which no softmax sees."""
    folder = towers(request, model)
    base = AutoModelForZeroShotImageClassification.from_pretrained(folder).eval()
    processor = TASK.load_processor(make_recipe(folder, folder))
    tokens = prompt_tokens(["one", "another text", "three"], processor.tokenizer, base.config)
    with torch.no_grad():
        out = base(pixel_values=torch.randn(4, 3, 32, 32), **tokens)
    made = class_logits(out.image_embeds, out.text_embeds, 1, float(base.logit_scale.detach().exp()))
    torch.testing.assert_close(made.softmax(dim=1), out.logits_per_image.softmax(dim=1))


@pytest.mark.parametrize("model", ["clip", "siglip"])
def test_weights_in_bfloat16(model, pictures, request, tmp_path):
    """And the paper's own start of NoRA, which moves the first output."""
    folder = towers(request, model)
    method = {"name": "nora", "variant": "published", "r": 8, "inner_r": 4, "target_modules": ADAPTED}
    recipe = make_recipe(folder, pictures, method=method, model={"dtype": "bfloat16"}, loop={"steps": 3})
    assert 0 < train(recipe, tmp_path)["train_loss"] < 8


def test_several_templates_are_averaged():
    """A class is the mean of its prompts' directions, again of norm 1."""
    texts, images = F.normalize(torch.randn(6, 5), dim=-1), F.normalize(torch.randn(2, 5), dim=-1)
    expected = [images @ F.normalize((texts[2 * n] + texts[2 * n + 1]) / 2, dim=0) * 7 for n in range(3)]
    torch.testing.assert_close(class_logits(images, texts, 2, 7.0), torch.stack(expected, dim=1))


def test_several_templates_train(clip, pictures, tmp_path):
    """The whole path."""
    images = {"templates": ["a photo of a {}.", "a texture, {}."]}
    results = train(make_recipe(clip, pictures, images=images, loop={"steps": 2}), tmp_path)
    assert 0 <= results["test_accuracy"] <= 1


def test_texts_as_each_tower_was_trained_to_see_them(clip, siglip):
    """CLIP's are padded to the longest, with a mask; SigLIP's to their full length, without."""
    texts = ["a", "a longer one"]
    made = {}
    for folder in (clip, siglip):
        recipe = make_recipe(folder, folder)
        made[folder] = prompt_tokens(texts, TASK.load_processor(recipe).tokenizer, TASK.load_config(recipe))
    assert made[clip]["input_ids"].shape == made[clip]["attention_mask"].shape == (2, 13)
    assert made[clip]["attention_mask"].sum(dim=1).tolist() == [2, 13]
    assert list(made[siglip]) == ["input_ids"]
    assert made[siglip]["input_ids"].shape == (2, 48)


def test_prompts_that_are_too_long_are_named(clip, pictures, tmp_path):
    """All of them, before any weight is read."""
    recipe = make_recipe(clip, pictures, images={"templates": ["a photo of the thing that people call a {} at night."]})
    with pytest.raises(CoreLoraError, match=r"3 problems(.|\n)*'a photo of the .* banded .*' has \d+ tokens"):
        train(recipe, tmp_path)


def test_a_cut_run_goes_on_bit_for_bit(clip, pictures, tmp_path):
    """Crops, their epochs, dropout and the order of the pictures: a run in two parts ends as one in one part does."""
    method = {"name": "nora", "r": 8, "inner_r": 4, "target_modules": ADAPTED, "dropout": 0.1}
    loop = {"steps": 14, "batch_size": 8, "save_every": 3, "log_every": 1, "keep": 9}  # 5 batches an epoch
    recipe = make_recipe(clip, pictures, method=method, images={"augment": "strong"}, loop=loop)
    whole = train(recipe, tmp_path / "whole")
    for cut in (3, 6, 12):
        folder = tmp_path / f"cut{cut}"
        (folder / "checkpoints").mkdir(parents=True)
        for name in ("recipe.yaml", "versions.json"):
            (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        (tmp_path / "whole" / "checkpoints" / f"checkpoint-{cut}").rename(folder / "checkpoints" / f"checkpoint-{cut}")
        again = train(recipe, folder)
        ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, tmp_path / "whole"))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        keys = ("train_loss", "test_loss", "test_accuracy", "zero_shot_accuracy", "classes")
        assert {k: again[k] for k in keys} == {k: whole[k] for k in keys}


def test_input_statistics_are_of_both_towers(clip, pictures, tmp_path):
    """NoRA's start needs them for each layer."""
    from corelora.train.run import collect
    from train.helpers import run_of

    recipe = make_recipe(clip, pictures)
    run = run_of(recipe, tmp_path)
    wanted = wanted_stats(recipe.method)
    assert wanted is not None
    stats = collect(run, TASK.load_model(recipe, run.config, run.processor, None), wanted)
    assert len(stats.mean_abs) == 12
    texts = run.collator([run.rows["train"].dataset[0]])["attention_mask"]
    counts = {n.split("_model")[0]: c for n, c in stats.tokens.items()}
    assert counts["vision"] == 2 * 6 * 17  # pictures of 16 patches and a class token
    assert counts["text"] == 2 * int(texts.sum())  # padding does not count


def test_bad_pictures_and_few_shots_come_before_the_weights(clip, pictures, tmp_path, monkeypatch):
    """All at once, from `--dry-run` too."""
    monkeypatch.setattr(TASK, "load_model", lambda *a: pytest.fail("weights were read"))
    recipe = make_recipe(clip, pictures, images={"shots": 13}, optim={"name": "adamm"})
    for look in (check, plan):
        with pytest.raises(CoreLoraError) as caught:
            look(recipe, tmp_path)
        for said in ("class 'banded' has 12 pictures, fewer than the 13", "class 'dotted'", "'adamm'"):
            assert said in str(caught.value)


def test_a_head_alone_is_refused(clip, pictures, tmp_path):
    """Two towers have none."""
    with pytest.raises(CoreLoraError, match="head trains a new head alone, and this task's model has none"):
        check(make_recipe(clip, pictures, method={"name": "head"}), tmp_path)


def test_a_text_tower_that_reads_past_the_texts(pictures, tmp_path):
    """A tokenizer that does not end texts: every class would have one text, and nothing would be learned."""
    folder = save_clip(tmp_path / "clip")
    save_tokenizer(folder)  # without the stop token
    with pytest.raises(CoreLoraError, match=r"'a photo of a banded\.' and .* the same features; does its tokenizer"):
        train(make_recipe(folder, pictures), tmp_path / "run")


def test_full_fine_tuning_leaves_the_scale(clip, pictures, tmp_path):
    """Everything else trains."""
    results = train(make_recipe(clip, pictures, method={"name": "full"}, loop={"steps": 2}), tmp_path)
    before, after = (CLIPModel.from_pretrained(f) for f in (clip, tmp_path / "model"))
    assert torch.equal(before.logit_scale, after.logit_scale)
    assert results["trained_parameters"] == results["parameters"] - 1


def test_the_first_bad_output_is_named(clip, pictures, tmp_path):
    """A loss that is not finite stops the run, and says where it came from."""
    trainer = trainer_of(make_recipe(clip, pictures), tmp_path)
    model = trainer.model.base_model.model
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(CoreLoraError, match="first in visual_projection"):
        trainer.train()


def test_a_model_of_another_kind_is_refused(pictures, tmp_path):
    """Its config is not one of two towers."""
    from vision.helpers import save_classifier

    with pytest.raises(CoreLoraError):
        check(make_recipe(save_classifier(tmp_path / "vit", "vit"), pictures), tmp_path / "run")


def test_parameters_as_published():
    """NoRA's CLIP ViT-B/16 with outer rank 256 and inner rank 16: 0.59M (DESIGN: 589,824)."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"patch_size": 16, "image_size": 224}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
        assert sum(p.numel() for p in model.parameters()) == 149_620_737  # openai/clip-vit-base-patch16
        config = CoreLoraConfig(method="nora", r=256, inner_r=16, target_modules=ADAPTED, stats="weight")
        adapted = get_peft_model(model, config)
    assert adapted.get_nb_trainable_parameters()[0] == 589_824


@pytest.mark.skipif(not DTD.is_dir(), reason="the shared data is not beside this repository")
def test_ten_textures_of_dtd(clip, tmp_path):
    """Real pictures through a tiny CLIP: the loss falls."""
    data = {
        "train": {"path": str(DTD / "train.jsonl")},
        "test": {"path": str(DTD / "test.jsonl"), "split": "train"},
        "form": "dtd",
        "columns": {"picture": "file", "label": "classname"},
    }
    recipe = make_recipe(
        clip,
        DTD,
        data=data,
        images={"shots": 4},
        loop={"steps": 40, "batch_size": 40, "log_every": 5},
        optim={"lr": 1e-2},
    )
    results = train(recipe, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    assert results["rows"]["train"] == {"rows": 40, "classes": 10}
    assert results["test_accuracy"] > 0.1


def test_a_model_without_two_towers_is_told_by_its_type(pictures, tmp_path):
    (tmp_path / "vit").mkdir()
    recipe = make_recipe(save_classifier(tmp_path / "vit", "vit"), pictures)
    with pytest.raises(CoreLoraError) as caught:
        check(recipe, tmp_path / "run")
    message = str(caught.value)
    assert "model.name: vit is no type of model that the task clip_few_shot trains: align, " in message
    assert ", siglip, " in message
    assert "Config" not in message
