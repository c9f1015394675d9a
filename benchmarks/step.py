"""Time and memory of one training step, side by side: `python benchmarks/step.py [--layers 32] [NAME ...]`.

LLaMA-2-7B shapes with random bfloat16 weights on a GPU (a tiny model in float32 on a CPU, to try the script). All
variants run in one process, in interleaved rounds; ratios are to the frozen base with input gradients. One JSON line a
result. NAME is `base`, `peft_lora`, or a corelora method, with `:reference` for its path in plain modules.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from corelora import CoreLoraConfig
from corelora.kernels.fast import set_fast

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ["base", "peft_lora", "inttune", "nora", "lora", "slora", "nlora"]


class Bench:
    """One model and what is timed on it."""

    def __init__(self, layers: int, reps: int) -> None:
        self.gpu = torch.cuda.is_available()
        self.reps, self.warmup = (reps, 3) if self.gpu else (2, 1)
        self.r, self.k = (128, 32) if self.gpu else (8, 2)
        sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
        if not self.gpu:
            sizes, layers = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}, 2
        config = LlamaConfig(vocab_size=32000 if self.gpu else 320, num_hidden_layers=layers, use_cache=False, **sizes)
        device = "cuda" if self.gpu else "cpu"
        torch.set_default_dtype(torch.bfloat16 if self.gpu else torch.float32)
        with torch.device(device):
            self.model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        self.model.requires_grad_(False)
        shape = (8, 512) if self.gpu else (2, 16)
        self.ids = torch.randint(0, config.vocab_size, shape, device=device)

    def adapted(self, name: str) -> Any:
        """The model with the adapter that `name` says; the frozen model for "base"."""
        method, _, path = name.partition(":")
        set_fast("off" if path == "reference" else "on")
        if method == "base":
            return self.model
        if method == "peft_lora":
            config: Any = LoraConfig(r=self.r, lora_alpha=self.r, target_modules=TARGETS)
        else:
            # Random outer factors for NoRA: the shapes and the cost of AwSVD's, without its decompositions.
            extra: dict[str, Any] = {"inner_r": self.k, "outer": "random"} if method == "nora" else {}
            config = CoreLoraConfig(method=method, r=self.r, target_modules=TARGETS, **extra)
        return get_peft_model(self.model, config, autocast_adapter_dtype=False)

    def step(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Forward, backward and, where something learns, the optimiser."""
        if optimizer is None:
            inputs = model.get_input_embeddings()(self.ids).detach().requires_grad_(True)
            model(inputs_embeds=inputs, labels=self.ids).loss.backward()
            return
        model(input_ids=self.ids, labels=self.ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(self, model: Any, optimizer: torch.optim.Optimizer | None) -> float:
        """Milliseconds of one step: by CUDA events, or the clock on a CPU."""
        if not self.gpu:
            began = time.perf_counter()
            self.step(model, optimizer)
            return 1000 * (time.perf_counter() - began)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.step(model, optimizer)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def run(self, name: str) -> tuple[list[float], float]:
        """(milliseconds of each step, peak GiB) of one variant; the model is plain again afterwards."""
        model = self.adapted(name)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=self.gpu) if learning else None
        model.train()
        for _ in range(self.warmup):
            self.step(model, optimizer)
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        times = [self.timed(model, optimizer) for _ in range(self.reps)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
        if model is not self.model:
            model.unload()
        del model, optimizer, learning
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
        return times, peak


def main() -> None:
    """Read the command line, run, print one JSON line a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--reps", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(arguments.layers, arguments.reps)
    names = arguments.names if "base" in arguments.names else ["base", *arguments.names]
    times: dict[str, list[float]] = {n: [] for n in names}
    peaks: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name in names:
            found, peaks[name] = bench.run(name)
            times[name] += found
    base = statistics.median(times["base"])
    for name in names:
        row = sorted(times[name])
        median = statistics.median(row)
        result = {
            "name": name,
            "ms": round(median, 2),
            "p10": round(row[len(row) // 10], 2),
            "p90": round(row[-1 - len(row) // 10], 2),
            "ratio": round(median / base, 4),
            "gib_over_base": round(peaks[name] - peaks["base"], 3),
            "device": torch.cuda.get_device_name() if bench.gpu else "cpu",
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
