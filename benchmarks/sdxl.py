"""Training steps of an SDXL-size UNet with adapters, side by side: time, memory, trained parameters.

    python benchmarks/sdxl.py [--tiny] [--steps 20] [--methods lora nora ...]

Random weights in bfloat16 from SDXL's own shapes, 1024 x 1024 pixels (latents of 128 x 128), batch 1, recomputed
activations, AdamW. The methods take turns, a step each, in one process; one JSON line a method.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from corelora import CoreLoraConfig
from corelora.diffusion.subject import Subject

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
TINY: dict[str, Any] = {
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
METHODS: dict[str, dict[str, Any]] = {
    "base": {},
    "PEFT LoRA": {"r": 64, "lora_alpha": 64},
    "lora": {"r": 64},
    "slora": {"r": 64},
    "nlora": {"r": 64},
    "nora": {"r": 64, "inner_r": 32, "stats": "weight"},
    "inttune": {"r": 64},
}


def adapted(name: str, shape: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model with fresh weights and the method's adapter; `base` trains its input's gradient only."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**shape).to(dtype)
    model: Any = Subject(unet, {}, DDPMScheduler()).to(device)
    settings = {**METHODS[name], "target_modules": LAYERS}
    if name == "PEFT LoRA":
        model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    elif name != "base":
        small = {"on_small_layer": "clip"}
        model = get_peft_model(model, CoreLoraConfig(method=name, **settings, **small), autocast_adapter_dtype=False)
    model.gradient_checkpointing_enable()
    return model.train()


def batch(shape: dict[str, Any], device: str) -> dict[str, torch.Tensor]:
    """One picture's latents, noise, text and sizes."""
    side, wide = shape["sample_size"], shape["cross_attention_dim"]
    pooled = shape["projection_class_embeddings_input_dim"] - 6 * shape["addition_time_embed_dim"]
    latents = torch.randn(1, 4, side, side, device=device)
    return {
        "latents": latents,
        "noise": torch.randn_like(latents),
        "timesteps": torch.randint(1000, (1,), device=device),
        "weights": torch.ones(1, device=device),
        "prompt": torch.randn(1, 77, wide, device=device),
        "pooled": torch.randn(1, pooled, device=device),
        "sizes": torch.full((1, 6), 1024.0, device=device),
    }


class Runner:
    """One method's model, optimizer, times and peak."""

    def __init__(self, name: str, shape: dict[str, Any], device: str, dtype: torch.dtype) -> None:
        self.name, self.device = name, device
        began = time.perf_counter()
        self.model = adapted(name, shape, device, dtype)
        self.start = time.perf_counter() - began
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        self.times: list[float] = []
        self.peak = 0

    def step(self, inputs: dict[str, torch.Tensor]) -> None:
        """One training step, timed."""
        inputs = {**inputs, "latents": inputs["latents"].clone().requires_grad_(not self.trained)}
        self._synchronize(reset=True)
        began = time.perf_counter()
        self.model(**inputs)["loss"].backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._synchronize()
        self.times.append(time.perf_counter() - began)
        if self.device == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    def _synchronize(self, reset: bool = False) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            if reset:
                torch.cuda.reset_peak_memory_stats()

    def result(self, base: float | None) -> dict[str, Any]:
        """What came out, without the first two steps."""
        times = sorted(self.times[2:])
        median = statistics.median(times)
        return {
            "method": self.name,
            "trained": sum(p.numel() for p in self.trained),
            "seconds": round(median, 4),
            "spread": [round(times[0], 4), round(times[-1], 4)],
            "over_base": None if base is None else round(median / base, 4),
            "start_seconds": round(self.start, 2),
            "steps": len(times),
        }


def alone(name: str, shape: dict[str, Any], inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> int:
    """Peak bytes of a GPU with this method's model only on it."""
    gc.collect()
    torch.cuda.empty_cache()
    runner = Runner(name, shape, "cuda", dtype)
    for _ in range(2):
        runner.step(inputs)
    return runner.peak


def main() -> int:
    """Measure, a JSON line a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, dtype = (TINY if arguments.tiny else SDXL), (torch.bfloat16 if device == "cuda" else torch.float32)
    inputs = batch(shape, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "dtype": str(dtype), "side": 8 * shape["sample_size"]}
    print(json.dumps({"kind": "run", **about}), flush=True)
    peaks = {n: alone(n, shape, inputs, dtype) for n in arguments.methods} if device == "cuda" else {}
    runners = [Runner(n, shape, device, dtype) for n in arguments.methods]
    for _ in range(arguments.steps + 2):
        for runner in runners:
            runner.step(inputs)
    base = next((statistics.median(r.times[2:]) for r in runners if r.name == "base"), None)
    for runner in runners:
        peak = {"peak_gib": round(peaks[runner.name] / 2**30, 3)} if peaks else {}
        print(json.dumps({"kind": "result", **runner.result(base), **peak}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
