"""Adapters as LoRA files: in plain diffusers the picture from the same noise is ours, in both layouts."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from corelora import CoreLoraConfig
from corelora.cli import main
from corelora.diffusion.export import LAYOUTS, OUT, kohya_keys, original_name
from corelora.diffusion.parts import find_parts
from corelora.diffusion.subject import Subject
from corelora.recipe.schema import ModelPart
from diffusion.helpers import our_picture, plain_pictures

UNET = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "v_proj"]
RANDOM = {"r": 4, "init_weights": False}  # no method starts at zero then
CASES = {
    "xl-nora": ("xl", CoreLoraConfig(method="nora", r=8, inner_r=4, stats="weight", target_modules=UNET)),
    "xl-lora": ("xl", CoreLoraConfig(method="lora", target_modules=[*UNET, "conv1", "time_emb_proj"], **RANDOM)),
    "xl-text": ("xl", CoreLoraConfig(method="nlora", target_modules=UNET + TEXT, **RANDOM)),
    "sd-text": ("sd", CoreLoraConfig(method="inttune", target_modules=["to_v", "proj_in", *TEXT, "fc1"], **RANDOM)),
    "sd-peft": (
        "sd",
        LoraConfig(
            r=4,
            lora_alpha=1,
            use_rslora=True,
            init_lora_weights=False,
            target_modules=UNET + TEXT,
            rank_pattern={"to_q": 2, "q_proj": 3},
            alpha_pattern={"to_v": 2, "v_proj": 3},
        ),
    ),
}


def save_adapter(root, folder, kind, config):
    """Factors that change something, on the UNet and on the text encoders where the config wants them."""
    parts = find_parts(ModelPart(name=str(root / kind)))
    trains_text = TEXT[0] in config.target_modules
    encoders = {name: parts.load(name) for name in parts.encoders if trains_text}
    torch.manual_seed(1)
    model = get_peft_model(Subject(parts.load("unet"), encoders, parts.load("scheduler")), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    parts.save(folder)


@pytest.fixture(scope="module")
def exported(driver, root):
    """Ours and plain diffusers' pictures by name; those come from one process that does not know corelora."""
    ours = {}
    for name, (kind, config) in CASES.items():
        save_adapter(root, root / "adapters" / name, kind, config)
        ours[name] = our_picture(root, root / "adapters" / name, kind)
        for layout in LAYOUTS:
            words = ["export", root / "adapters" / name, root / f"{name}-{layout}", "--for", layout]
            assert main([str(w) for w in words]) == 0
    plain = plain_pictures(driver, root, [f"{name}-{layout}" for name in CASES for layout in LAYOUTS])
    return SimpleNamespace(ours=ours, plain=plain)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_the_same_picture(exported, name, layout):
    """The file's picture is ours to a thousandth of what the adapter changes."""
    moved = float((exported.ours[name] - exported.plain[f"{CASES[name][0]}-none"]).abs().max())
    assert moved > 1e-2
    apart = float((exported.ours[name] - exported.plain[f"{name}-{layout}"]).abs().max())
    assert apart < 1e-3 * moved + 1e-5


@pytest.mark.slow
def test_keys_and_alphas(exported, root):
    """Every adapted layer once; one rank, which is alpha; text keys as programs know them."""
    for name in CASES:
        plain, kohya = (load_file(root / f"{name}-{layout}" / OUT) for layout in LAYOUTS)
        ranks = {t.shape[0] for k, t in plain.items() if k.endswith("lora_A.weight")}
        assert len(ranks) == 1
        assert {float(t) for k, t in kohya.items() if k.endswith(".alpha")} == {float(r) for r in ranks}
        texts = [k for k in plain if k.startswith("text_encoder")]
        assert bool(texts) == ("q_proj" in CASES[name][1].target_modules)
        assert all(".text_model.encoder.layers." in k for k in texts)
        parts = {k.split("_")[1] for k in kohya}
        assert parts == ({"unet"} if not texts else {"unet", "te"} if name.startswith("sd") else {"unet", "te1", "te2"})


@pytest.mark.slow
def test_a_smaller_rank(exported, root, tmp_path, capsys):
    """Cut by an SVD, with its error; the base can be named."""
    words = ["export", root / "adapters" / "xl-lora", tmp_path / "cut", "--for", "kohya", "--rank", "2", "--json"]
    capsys.readouterr()
    assert main([str(w) for w in [*words, "--base", root / "xl", "--no-check"]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rank"], report["checked"]) == (2, False)
    assert 0.05 < report["truncation"] < 1
    downs = [t for k, t in load_file(tmp_path / "cut" / OUT).items() if k.endswith("lora_down.weight")]
    assert {t.shape[0] for t in downs} == {2}
    assert {t.dim() for t in downs} == {2, 4}


def test_every_layer_of_sdxl():
    """All linear layers and convolutions inside SDXL's blocks come back from kohya's keys under diffusers' names."""
    shape = {
        "sample_size": 8,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and "block" in n}
    assert len(layers) > 700
    pairs = {f"unet.{n}": (torch.full((1, 1), float(k)), torch.ones(1, 1)) for k, n in enumerate(layers)}
    read, _ = StableDiffusionXLPipeline.lora_state_dict(kohya_keys(pairs, is_xl=True), unet_config=unet.config)
    found = {}
    for key, down in read.items():
        if ".down." in key or ".lora_A." in key:
            name = re.sub(r"processor\.(to_\w+)_lora", r"\1", key.split(".down.")[0]).split(".lora")[0]
            found[re.sub(r"to_out$", "to_out.0", name)] = float(down)
    assert found == {name: float(down) for name, (down, _) in pairs.items()}


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA adapters can't be written"),
        ({"peft_type": "LORA", "use_dora": True}, "DoRA adapters are more"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "pissa's adapters are more"),
        ({"peft_type": "LORA"}, "no LoRA factors"),
    ],
)
def test_what_no_lora_file_holds(root, tmp_path, capsys, config, message):
    """Said in one sentence; nothing is left behind."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"other": torch.zeros(1)}, folder / "adapter_model.safetensors")
    find_parts(ModelPart(name=str(root / "xl"))).save(folder)
    assert main(["export", str(folder), str(tmp_path / "out"), "--for", "kohya"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_folders_are_told_apart(root, tmp_path, capsys):
    """No pipeline beside the adapter; a subject's adapter for a server of text; a rank of none."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "a"), out, "--for", "kohya"]) == 2
    assert "not the adapter of a diffusion model" in capsys.readouterr().err
    find_parts(ModelPart(name=str(root / "xl"))).save(tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), out]) == 2
    assert "add --for diffusers or --for kohya" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "a"), out, "--for", "kohya", "--rank", "0"]) == 2
    assert "--rank must be at least 1" in capsys.readouterr().err
