"""The task dreambooth on tiny pipelines: loss, rows, stops, pictures, and the adapter in plain diffusers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from corelora.cli import main
from corelora.diffusion.export import LAYOUTS, original_name
from corelora.diffusion.parts import find_parts
from corelora.diffusion.pictures import class_pictures, contact_sheet, paint
from corelora.diffusion.rows import SubjectRows, code, collate, cut, picture_files
from corelora.diffusion.subject import Subject
from corelora.errors import CoreLoraError
from corelora.recipe import Recipe, load_recipe
from corelora.recipe.schema import ModelPart
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
    (tmp_path / "empty").mkdir()
    with pytest.raises(CoreLoraError, match="no pictures"):
        check(make_recipe(root, data={"train": {"path": str(tmp_path / "empty")}}), tmp_path / "run")
    with pytest.raises(CoreLoraError, match="subject is missing"):
        check(make_recipe(root, subject=None), tmp_path / "run")


def test_a_pipeline_that_is_none(root, tmp_path):
    with pytest.raises(CoreLoraError, match="no Stable Diffusion pipeline"):
        check(make_recipe(root, "nothing"), tmp_path / "run")


def test_missing_class_pictures_alone_are_made(root):
    """By the model itself, each from its own seed; what is there stays."""
    parts = find_parts(ModelPart(name=str(root / "xl")))
    paths = class_pictures(parts, "a cat", 2, 32, steps=1)
    before = [p.stat().st_mtime_ns for p in paths]
    content = paths[1].read_bytes()
    paths[1].unlink()
    again = class_pictures(parts, "a cat", 3, 32, steps=1)
    assert again[0].stat().st_mtime_ns == before[0]
    assert len(again) == 3
    assert all(p.is_file() for p in again)
    assert again[1].read_bytes() == content


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
    assert {p.name for p in (tmp_path / "validation").iterdir()} == {"000003.png", "000006.png"}
    assert json.loads((tmp_path / "adapter" / "pipeline.json").read_text())["is_xl"] is True
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert keys
    assert all(".unet." in k for k in keys)


@pytest.mark.slow
def test_the_subject_is_learned(root, tmp_path):
    """The loss on the test draws, which training never sees, falls well below the untrained model's."""
    recipe = make_recipe(root, loop={"steps": 150}, optim={"lr": 5e-3, "schedule": "constant"}, method=METHODS["lora"])
    before = trainer_of(recipe, tmp_path / "before").evaluate()["eval_loss"]
    after = train(recipe, tmp_path / "after")["test_loss"]
    assert after < 0.9 * before


@pytest.mark.slow
def test_a_stop_changes_nothing(root, tmp_path):
    """Gone on with from step 3: the same weights, bit for bit; validation pictures draw none of its random numbers."""
    parts = {"subject": {"validation_prompts": ["sks"], "validate_every": 2, "class_prompt": "a", "class_images": 2}}
    run(root, tmp_path / "whole", **parts)
    run(root, tmp_path / "cut", **parts)
    shutil.rmtree(tmp_path / "cut" / "adapter")
    (tmp_path / "cut" / "results.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    run(root, tmp_path / "cut", **parts)
    whole, cut_off = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert whole.keys() == cut_off.keys()
    assert all(torch.equal(whole[k], cut_off[k]) for k in whole)


LOADER = """
import sys
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
torch.set_num_threads(1)
folder, out, xl = sys.argv[1:4]
pipe = (StableDiffusionXLPipeline if xl == "xl" else StableDiffusionPipeline).from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
pictures = []
for weights in [None, *sys.argv[4:]]:
    if weights:
        pipe.load_lora_weights(weights)
    noise = torch.Generator().manual_seed(5)
    made = pipe("sks", height=32, width=32, num_inference_steps=3, generator=noise, output_type="np")
    pictures.append(torch.from_numpy(made.images[0]))
    if weights:
        pipe.unload_lora_weights()
torch.save(torch.stack(pictures), out)
assert "corelora" not in sys.modules
"""


def painted(folder, out, kind, *weights):
    """Pictures by plain diffusers, without and with each LoRA, in a process that does not know corelora."""
    words = [sys.executable, "-W", "ignore", "-c", LOADER, str(folder), str(out), kind, *map(str, weights)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), [("xl", "nora"), ("xl", "lora"), ("sd", "peft"), ("sd", "inttune")])
def test_in_plain_diffusers(root, tmp_path, model, method):
    """Exported in both layouts, loaded without corelora: the same picture from the same noise as with our adapter."""
    trained = {"text_encoder": model == "sd" and method == "inttune"}
    method = {**METHODS[method]}
    if trained["text_encoder"]:
        method["target_modules"] = [*method["target_modules"], "q_proj", "v_proj"]
    run(
        root,
        tmp_path / "run",
        model=str(model),
        method=method,
        optim={"lr": 2e-2},
        subject=trained,
        data={"test": None},
    )
    parts = find_parts(ModelPart(name=str(root / model)))
    encoders = {n: parts.load(n) for n in parts.encoders} if trained["text_encoder"] else {}
    subject = Subject(parts.load("unet"), encoders, parts.load("scheduler"))
    PeftModel.from_pretrained(subject, str(tmp_path / "run" / "adapter")).eval()
    pipeline = parts.pipeline(unet=subject.unet, **{n: subject.get_submodule(n) for n in subject.encoder_names})
    generator = torch.Generator().manual_seed(5)
    ours = pipeline("sks", height=32, width=32, num_inference_steps=3, generator=generator, output_type="np").images[0]
    for layout in LAYOUTS:
        assert main(["export", str(tmp_path / "run"), str(tmp_path / layout), "--for", layout]) == 0
    base, *theirs = painted(root / model, tmp_path / "pictures.pt", model, *(tmp_path / n for n in LAYOUTS))
    moved = float((torch.from_numpy(ours) - base).abs().max())
    assert moved > 1e-3  # the adapter does something
    for layout, picture in zip(LAYOUTS, theirs, strict=True):
        assert float((torch.from_numpy(ours) - picture).abs().max()) < 0.02 * moved + 1e-5, layout


def test_kohya_names_of_sdxl():
    """Against names as the original code has them (sd-scripts' and ComfyUI's tables)."""
    for name, original in {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.norm": "input_blocks.4.1.norm",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.2": "output_blocks.3.1.transformer_blocks.1.ff.net.2",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
    }.items():
        assert original_name(name) == original


def test_what_cannot_be_exported(root, tmp_path):
    """No pipeline beside the adapter; a method that is no LoRA."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "out"), "--for", "kohya"]) == 2
    find_parts(ModelPart(name=str(root / "xl"))).save(tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "out"), "--for", "kohya"]) == 2
    assert not (tmp_path / "out").exists()


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
