"""The task dreambooth on tiny pipelines: loss, rows, stops, pictures, and the adapter in plain diffusers."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from corelora.diffusion.parts import find_parts
from corelora.diffusion.pictures import class_pictures, contact_sheet, paint
from corelora.diffusion.rows import SubjectRows, code, collate, cut, picture_files, read_all
from corelora.diffusion.subject import Subject
from corelora.errors import CoreLoraError
from corelora.evaluate.page import report
from corelora.recipe import Recipe, load_recipe
from corelora.recipe.schema import ModelPart
from corelora.recipe.subject import SubjectPart
from corelora.run.models import cache_root
from corelora.train.dry_run import check
from corelora.train.run import train
from diffusion.helpers import make_recipe, save_pictures
from train.helpers import trainer_of

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "dreambooth"
METHODS = {
    "nora": {"name": "nora", "r": 8, "inner_r": 4, "target_modules": ["to_q", "to_v"]},
    "lora": {"name": "lora", "r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1"]},
    "peft": {"name": "peft:lora", "r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"]},
    "inttune": {"name": "inttune", "r": 8, "target_modules": ["to_q", "to_v", "proj_in"]},
    "lora_sb": {"name": "lora_sb", "r": 4, "target_modules": ["to_q", "to_v", "conv1"]},
}


# -- the loss -------------------------------------------------------------------------------------------------------


def tiny_subject(prediction: str = "epsilon", min_snr: float | None = None) -> tuple[Subject, dict]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    shape = (3, 4, 8, 8)
    batch = {
        "latents": torch.randn(shape),
        "noise": torch.randn(shape),
        "timesteps": torch.tensor([1, 500, 998]),
        "weights": torch.tensor([1.0, 1.0, 0.5]),
        "prompt": torch.randn(3, 5, 8),
    }
    return Subject(unet, {}, DDPMScheduler(prediction_type=prediction), min_snr), batch


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_the_loss_is_the_formula(prediction, min_snr):
    """Noisy latents and targets are diffusers' own; weights are min(SNR, gamma) over SNR, or SNR + 1 for velocity."""
    subject, batch = tiny_subject(prediction, min_snr)
    schedule = DDPMScheduler(prediction_type=prediction)
    noisy = schedule.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    target = batch["noise"]
    if prediction == "v_prediction":
        target = schedule.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
    predicted = subject.unet(noisy, batch["timesteps"], batch["prompt"]).sample
    rows = ((predicted - target) ** 2).mean(dim=(1, 2, 3))
    alpha = schedule.alphas_cumprod[batch["timesteps"]]
    snr = alpha / (1 - alpha)
    weights = batch["weights"].clone()
    if min_snr is not None:
        weights *= torch.minimum(snr, torch.tensor(min_snr)) / (snr + (prediction == "v_prediction"))
    out = subject(**batch)
    torch.testing.assert_close(out["rows"], rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["loss"], (rows * weights).mean(), rtol=1e-4, atol=1e-6)


# -- rows -----------------------------------------------------------------------------------------------------------


def rows_of(root, seed=0, prior=False):
    recipe, parts = make_recipe(root), find_parts(ModelPart(name=str(root / "xl")))
    paths = picture_files(str(root / "pictures"))
    own = code(parts, recipe, paths, "a photo of sks", 32)
    other = code(parts, recipe, paths[:2], "a photo", 32) if prior else None
    return SubjectRows(own, other, seed, 1000)


def test_noise_follows_from_seed_pass_and_row(root):
    """The same again, another in the next pass, with another seed, in another row."""
    rows = rows_of(root)
    first = rows[1]["own"]["noise"]
    assert torch.equal(rows[1]["own"]["noise"], first)
    assert not torch.equal(rows[2]["own"]["noise"], first)
    assert not torch.equal(rows_of(root, seed=1)[1]["own"]["noise"], first)
    rows.set_epoch(1)
    assert not torch.equal(rows[1]["own"]["noise"], first)
    rows.set_epoch(0)
    assert torch.equal(rows[1]["own"]["noise"], first)


def test_a_batch_with_a_prior(root):
    """The subject's rows come first, then as many of the class, with its weight and its prompt."""
    rows = rows_of(root, prior=True)
    batch = collate([rows[0], rows[1]], prior_weight=0.25)
    assert batch["latents"].shape == (4, 4, 16, 16)
    assert batch["weights"].tolist() == [1, 1, 0.25, 0.25]
    assert torch.equal(batch["prompt"][0], batch["prompt"][1])
    assert not torch.equal(batch["prompt"][0], batch["prompt"][2])
    assert torch.equal(batch["latents"][2], batch["latents"][2])
    assert batch["sizes"].shape == (4, 6)


def test_the_middle_square_and_its_ids():
    """Height, width, top, left, target height, target width; the middle is kept."""
    wide = Image.new("RGB", (300, 100))
    wide.paste((255, 0, 0), (100, 0, 200, 100))
    pixels, ids = cut(wide, 64)
    assert ids == [100, 300, 0, 64, 64, 64]
    assert pixels.shape == (3, 64, 64)
    assert float(pixels[0, :, 4:-4].min()) > 0.99
    assert float(pixels[1].max()) < -0.99


@pytest.mark.parametrize("model", ["xl", "sd"])
def test_conditions_are_the_pipelines(root, model):
    """Prompt, pooled prompt and time ids are what diffusers' pipeline gives its UNet for the same picture."""
    parts = find_parts(ModelPart(name=str(root / model)))
    coded = code(parts, make_recipe(root, model), picture_files(str(root / "pictures"))[:1], "sks at sea", 32)
    pipeline = parts.pipeline()
    made = pipeline.encode_prompt(
        "sks at sea", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(coded.prompt, made[0][0])
    assert (coded.pooled is None) == (model == "sd")
    if model == "xl":
        torch.testing.assert_close(coded.pooled, made[2][0])
        width = pipeline.text_encoder_2.config.projection_dim
        ids = pipeline._get_add_time_ids((48, 40), (3, 0), (32, 32), torch.float32, text_encoder_projection_dim=width)
        assert coded.sizes.tolist() == ids.tolist()


def test_the_latents_are_the_pictures(root):
    """Decoded as a pipeline does, they are what the VAE makes of the picture."""
    parts = find_parts(ModelPart(name=str(root / "sd")))
    paths = picture_files(str(root / "pictures"))[:1]
    coded = code(parts, make_recipe(root, "sd"), paths, "sks", 32)
    vae = parts.load("vae")
    with torch.no_grad():
        pixels, _ = cut(Image.open(paths[0]), 32)
        wanted = vae.encode(pixels[None]).latent_dist
        torch.testing.assert_close(coded.mean / vae.config.scaling_factor, wanted.mean)
        torch.testing.assert_close(coded.deviation / vae.config.scaling_factor, wanted.std)


def test_pictures_that_cannot_be_used(root, tmp_path):
    """Every one by its file, before anything is loaded; folders without any; other mistakes in the same message."""
    save_pictures(tmp_path / "p")
    (tmp_path / "p" / "0.png").write_bytes(b"no picture")
    whole = (tmp_path / "p" / "1.png").read_bytes()
    (tmp_path / "p" / "1.png").write_bytes(whole[: len(whole) // 2])
    recipe = make_recipe(root, data={"train": {"path": str(tmp_path / "p")}, "form": "gsm8k"}, method={"name": "full"})
    with pytest.raises(CoreLoraError) as caught:
        check(recipe, tmp_path / "run")
    text = str(caught.value)
    for message in ("0.png is not a picture", "1.png is broken", "form 'subject', not 'gsm8k'", "'full' has none"):
        assert message in text
    assert text.startswith("recipe: 4 problems")
    assert "config.json" not in text  # its model is sound
    (tmp_path / "empty").mkdir()
    for which in ("train", "test"):
        with pytest.raises(CoreLoraError, match=rf"data\.{which}\.path: no pictures"):
            check(make_recipe(root, data={which: {"path": str(tmp_path / "empty")}}), tmp_path / "run")
    with pytest.raises(CoreLoraError, match="subject is missing"):
        check(make_recipe(root, subject=None), tmp_path / "run")


def test_every_kind_of_picture_is_taken(tmp_path):
    """By what its name says, so that one that Pillow can't read is named; captions and hidden files are none."""
    picture = Image.new("RGB", (8, 8))
    names = ("a.png", "b.tif", "c.gif", "d.avif", "e.JPG")
    for name in names:
        picture.save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves")
    assert [p.name for p in picture_files(str(tmp_path))] == list(names)
    (tmp_path / "f.heic").write_bytes(b"?")
    (tmp_path / "g.png").symlink_to("nowhere.png")
    with pytest.raises(CoreLoraError) as caught:
        read_all(picture_files(str(tmp_path)))
    assert "f.heic is not a picture" in str(caught.value)
    assert "g.png there is no such file" in str(caught.value)


def test_nothing_is_kept_of_a_pipeline_that_changed(root, tmp_path, monkeypatch):
    """One name, another folder; one folder, other weights."""
    paths = [p.absolute() for p in picture_files(str(root / "pictures"))[:1]]
    made = []
    for place in ("one", "two"):
        shutil.copytree(root / "sd", tmp_path / place / "sd")
        monkeypatch.chdir(tmp_path / place)
        recipe = make_recipe(Path(), "sd")
        vae = find_parts(recipe.model).load("vae")
        if place == "two":
            vae.quant_conv.weight.data.mul_(2)
            vae.save_pretrained("sd/vae")
        made.append(code(find_parts(recipe.model), recipe, paths, "sks", 32).mean)
        vae.quant_conv.weight.data.mul_(3)
        vae.save_pretrained("sd/vae")
        made.append(code(find_parts(recipe.model), recipe, paths, "sks", 32).mean)
    assert not any(torch.equal(a, b) for a, b in combinations(made, 2))


def test_a_pipeline_that_is_none(root, tmp_path):
    with pytest.raises(CoreLoraError, match="no Stable Diffusion pipeline"):
        check(make_recipe(root, "nothing"), tmp_path / "run")


def test_what_does_not_fit_the_pipeline(root, tmp_path):
    """A side that its VAE can't make, prompts that are longer than it reads; a scheduler of another kind."""
    subject = {"size": 33, "class_prompt": "a" * 40, "validation_prompts": ["sks", "b" * 50]}
    with pytest.raises(CoreLoraError) as caught:
        check(make_recipe(root, subject=subject), tmp_path / "run")
    for message in ("multiple of 2", "32, not 33", "class_prompt has 42 tokens", "validation_prompts[1] has 52 tokens"):
        assert message in str(caught.value)
    shutil.copytree(root / "sd", tmp_path / "flow")
    config = tmp_path / "flow" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "sample"}))
    with pytest.raises(CoreLoraError, match="predicts 'sample'"):
        find_parts(ModelPart(name=str(tmp_path / "flow")))


def test_settings_without_sense():
    """Each by its key."""
    part = SubjectPart(
        prompt="a", class_prompt="a", class_images=0, prior_weight=-1.0, size=0, min_snr=0.0, validate_every=0
    )
    text = "\n".join(part.problems())
    for key in (
        "class_prompt",
        "class_images",
        "prior_weight",
        "size",
        "min_snr",
        "validate_every needs",
        "every must",
    ):
        assert key in text
    assert "prompt must say" in SubjectPart(prompt=" ").problems()[0]


def test_missing_class_pictures_alone_are_made(root):
    """By the model itself, each the same whichever others are there; what is there stays."""
    parts = find_parts(ModelPart(name=str(root / "xl")))
    paths = class_pictures(parts, "a cat", 6, 32, steps=2)
    content = [p.read_bytes() for p in paths]
    before = paths[0].stat().st_mtime_ns
    for n in (1, 2, 5):
        paths[n].unlink()
    again = class_pictures(parts, "a cat", 7, 32, steps=2)
    assert again[0].stat().st_mtime_ns == before
    assert [p.read_bytes() for p in again[:6]] == content
    assert again[6].is_file()
    assert len({*content, again[6].read_bytes()}) == 7


# -- whole runs -----------------------------------------------------------------------------------------------------


def run(root, output, **parts):
    recipe = make_recipe(root, **parts)
    return recipe, train(recipe, output)


def test_a_run_leaves_pictures_and_an_adapter(root, tmp_path):
    """With a prior, validation as it goes, a contact sheet; only adapters trained."""
    subject = {"class_prompt": "a photo", "class_images": 2, "validation_prompts": ["sks at sea"], "validate_every": 3}
    _, results = run(root, tmp_path, subject=subject)
    assert results["contact_sheet"] == "contact-sheet.png"
    assert Image.open(tmp_path / "contact-sheet.png").size == (4 * 256, 2 * (256 + 34))
    assert 'src="data:image/png;base64,' in report(tmp_path).read_text()
    assert {p.name for p in (tmp_path / "validation").iterdir()} == {"000003.png", "000006.png"}
    assert json.loads((tmp_path / "adapter" / "pipeline.json").read_text())["is_xl"] is True
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert keys
    assert all(".unet." in k for k in keys)


@pytest.mark.slow
def test_the_subject_is_learned(root, tmp_path):
    """The loss on the test draws, fixed ones that training never sees, falls well below the untrained model's."""
    recipe = make_recipe(root, loop={"steps": 100}, optim={"lr": 1e-2, "schedule": "constant"}, method=METHODS["lora"])
    before = trainer_of(recipe, tmp_path / "before").evaluate()["eval_loss"]
    after = train(recipe, tmp_path / "after")["test_loss"]
    assert after < 0.9 * before


@pytest.mark.slow
def test_text_encoders_train_in_bfloat16(root, tmp_path):
    """Both of SDXL's, with NoRA on statistics of all three, min-SNR and recomputed activations; the UNet's too."""
    method = {"name": "nora", "r": 8, "inner_r": 4, "target_modules": ["to_q", "q_proj"]}
    subject = {"text_encoder": True, "min_snr": 5.0}
    recipe = make_recipe(root, method=method, subject=subject, loop={"steps": 2, "checkpointing": True})
    recipe.model.dtype = "bfloat16"
    trainer = trainer_of(recipe, tmp_path)
    names = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    owners = {n.split(".")[2] for n in names}
    assert not any(
        "text_encoder.encoder.layers.1." in n for n in names
    )  # SDXL does not read its first one's last layer
    assert any("text_encoder_2.text_model.encoder.layers.1." in n for n in names)
    assert owners == {"unet", "text_encoder", "text_encoder_2"}
    trainer.train()
    moved = {
        n.split(".")[2] for n, p in trainer.model.named_parameters() if n in names and not torch.equal(p, names[n])
    }
    assert moved == owners
    stats = [load_file(p) for p in (cache_root() / "data" / "stats").glob("*/stats.safetensors")]
    assert any({k.partition("/")[2].split(".")[0] for k in found} == owners for found in stats)


def test_a_contact_sheet(tmp_path):
    rows = [("one", [Image.new("RGB", (9, 9), "red")]), ("two", [Image.new("RGB", (9, 9), "blue")] * 2)]
    contact_sheet(rows, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (2 * 290, 512, 3)
    assert pixels[100, 100].tolist() == [255, 0, 0]
    assert pixels[-100, -100].tolist() == [0, 0, 255]


def test_one_noise_one_picture(root):
    """A seed is a picture, whatever is drawn beside it."""
    pipeline = find_parts(ModelPart(name=str(root / "sd"))).pipeline()
    two = paint(pipeline, ["a", "a"], [3, 4], 32, steps=1)
    one = paint(pipeline, ["a"], [4], 32, steps=1)
    assert np.abs(np.asarray(two[1], int) - np.asarray(one[0], int)).max() <= 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared pictures are not beside this checkout")
def test_real_pictures(root, tmp_path):
    """The DreamBooth set's dog, rotated by EXIF or not, becomes latents."""
    recipe = make_recipe(root, data={"train": {"path": str(SHARED / "dog")}, "test": None}, loop={"steps": 2})
    assert train(recipe, tmp_path)["rows"]["train"]["pictures"] == len(list((SHARED / "dog").glob("*.jpg")))


RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "diffusion").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_that_ships(path, root, tmp_path):
    """Nothing is wrong with it on a tiny pipeline of its kind, in ranks that fit that."""
    words = [f"model.name={root / ('sd' if 'sd15' in path.stem else 'xl')}", f"data.train.path={root / 'pictures'}"]
    recipe = load_recipe(Recipe, path, [*words, "model.dtype=float32", "method.on_small_layer=clip"])
    assert recipe.about
    assert check(recipe, tmp_path / "run").trained > 0
