"""vLLM as a writer of replies, where it is installed: `--backend vllm`.

A corelora adapter is a plain LoRA to it: the model is exported once (corelora.export_lora) and the LoRA handed to every
request, so that one engine could serve several.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from corelora.errors import CoreLoraError
from corelora.run.generate import Reply, Writing


class VllmWriter:
    """Writes a batch with a vLLM engine.

    Args:
        engine: what `vllm_engine` made: (LLM, LoRA request or None).
        seed: of drawn replies.
    """

    def __init__(self, engine: Any, seed: int) -> None:
        self.llm, self.lora = engine
        self.seed = seed

    def __call__(self, prompts: Sequence[str], writing: Writing, ids: Sequence[str]) -> list[Reply]:
        """The replies, in the order of the prompts."""
        vllm = load_vllm()
        wanted = vllm.SamplingParams(
            max_tokens=writing.max_new_tokens,
            temperature=writing.temperature,
            stop=list(writing.stops) or None,
            seed=self.seed if writing.temperature else None,
        )
        made = self.llm.generate(list(prompts), wanted, lora_request=self.lora, use_tqdm=False)
        outputs = [request.outputs[0] for request in made]
        return [Reply(o.text.strip(), o.finish_reason == "stop") for o in outputs]


def vllm_engine(model: str, lora_folder: str | None, rank: int, dtype: str = "auto") -> tuple[Any, Any]:
    """An engine for a base model, and the request that names its LoRA.

    Args:
        model: folder or hub name of the base.
        lora_folder: an exported plain LoRA, or None.
        rank: of that LoRA.
        dtype: of the weights.

    Raises:
        CoreLoraError: vLLM is not installed.
    """
    vllm = load_vllm()
    if lora_folder is None:
        return vllm.LLM(model=model, dtype=dtype), None
    request = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 1, lora_folder)
    return vllm.LLM(model=model, dtype=dtype, enable_lora=True, max_lora_rank=rank), request


def load_vllm() -> Any:
    """The package vllm.

    Raises:
        CoreLoraError: it is not installed.
    """
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError:
        raise CoreLoraError("--backend vllm needs vLLM: pip install vllm (on a GPU machine)") from None
