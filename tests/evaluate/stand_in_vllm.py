"""A stand-in for the package vllm: the part of its interface that is used, on transformers and plain PEFT.

Its signatures are vLLM's, so a keyword that vLLM does not know is a TypeError. It reads a LoRA folder as vLLM does: one
rank, one scale, no more of the config.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

__version__ = "0.0-stand-in"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(kw_only=True)
class SamplingParams:
    """How one reply is written."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None


@dataclass
class LoRARequest:
    """Which adapter."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """An engine; `made` holds all of them with what they were given."""

    made: list[LLM] = []

    def __init__(
        self,
        model,
        *,
        tokenizer=None,
        tokenizer_revision=None,
        revision=None,
        trust_remote_code=False,
        dtype="auto",
        seed=None,
        enable_lora=False,
        max_lora_rank=16,
        max_model_len=None,
    ):
        assert max_lora_rank in RANKS
        assert Path(model).is_dir(), "a folder or a hub name, and no test reads the hub"
        self.options = {k: v for k, v in locals().items() if k != "self"}
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.asked = []
        self.served = None
        type(self).made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        """One reply a prompt, each by itself."""
        if lora_request is not None and self.served is None:
            self._serve(lora_request)
        assert len(prompts) == len(sampling_params)
        self.asked.append((prompts, sampling_params, lora_request))
        return [self._reply(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _serve(self, request):
        assert self.options["enable_lora"]
        assert request.lora_int_id > 0
        config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] <= self.options["max_lora_rank"]
        assert not config["modules_to_save"]
        self.served = request
        self.model = PeftModel.from_pretrained(self.model, request.lora_path).eval()

    def _reply(self, ids, wanted):
        ends = sorted({self.tokenizer.eos_token_id, *(wanted.stop_token_ids or ())})
        options = {"do_sample": False}
        if wanted.temperature:
            torch.manual_seed(wanted.seed)
            options = {"do_sample": True, "temperature": wanted.temperature, "top_p": 1.0, "top_k": 0}
        if wanted.stop:
            options |= {"stop_strings": wanted.stop, "tokenizer": self.tokenizer}
        with torch.no_grad():
            made = self.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=wanted.max_tokens,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
                repetition_penalty=wanted.repetition_penalty,
                **options,
            )
        new = made[0, len(ids) :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        ended = new[-1] in ends or any(s in text for s in wanted.stop or ())
        return SimpleNamespace(
            outputs=[SimpleNamespace(text=text, token_ids=tuple(new), finish_reason="stop" if ended else "length")]
        )
