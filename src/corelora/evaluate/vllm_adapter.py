"""An adapter as vLLM takes it: a folder with a plain LoRA, and the rank that the engine is started with.

A corelora adapter is exported once (corelora.export_lora) and kept beside the results; a plain LoRA of PEFT's goes as
it is. What vLLM would refuse, or read wrongly without a word, is refused before anything is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType
from transformers import AutoModelForCausalLM

from corelora.config import CoreLoraConfig
from corelora.data.cache import key_of
from corelora.errors import CoreLoraError
from corelora.evaluate.subject import Subject
from corelora.export import export_lora
from corelora.servers import SERVERS, VLLM_RANKS
from corelora.train.models import load_model, load_model_config, model_source

WAY_OUT = "take --backend transformers"

# Settings of PEFT's LoRA that vLLM reads, or that say nothing about the weights in the file. It reads no others: a
# rank_pattern or alpha_pattern, for one, would be served with the wrong scale.
_SERVED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Starts that leave the base weights as they are; PiSSA, OLoRA and their kin change them when PEFT loads the adapter.
_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")


def adapter_problem(folder: Path) -> str | None:
    """Why vLLM can't serve an adapter, as far as its config tells.

    Args:
        folder: of a corelora or PEFT adapter.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, CoreLoraConfig):
        return None  # its export says what a plain LoRA can't hold
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != PeftType.LORA.value or not isinstance(config, LoraConfig):
        return f"{folder} holds an adapter of type {kind}, and vLLM serves plain LoRA only: {WAY_OUT}"
    plain = LoraConfig()
    odd = [
        f.name
        for f in fields(LoraConfig)
        if f.name not in _SERVED and getattr(config, f.name) != getattr(plain, f.name)
    ]
    if config.init_lora_weights not in _BASE_KEPT:
        odd.append(f"init_lora_weights={config.init_lora_weights}")
    if config.r > VLLM_RANKS[-1]:
        odd.append(f"rank {config.r}, more than {VLLM_RANKS[-1]}")
    return f"{folder} holds a LoRA that vLLM does not serve ({', '.join(odd)}): {WAY_OUT}" if odd else None


def plain_lora(subject: Subject, say: Callable[[str], None]) -> tuple[Path, int]:
    """A folder with the subject's adapter as a plain LoRA, and the rank to start vLLM with (max_lora_rank).

    Args:
        subject: with an adapter that `adapter_problem` has nothing against.
        say: takes lines for the user.

    Raises:
        CoreLoraError: no plain LoRA that vLLM takes can hold the adapter; the base can't be read.
    """
    assert subject.adapter is not None
    folder = subject.adapter
    if isinstance(PeftConfig.from_pretrained(str(folder)), CoreLoraConfig):
        folder = subject.folder / "eval" / f"vllm-lora-{_key(subject)[:12]}"
        if not folder.is_dir():  # it appears whole or not at all
            say(f"writing the adapter as a plain LoRA for vLLM: {folder}")
            _export(subject, folder)
            gc.collect()  # a cycle would keep the base's memory, which vLLM asks for next
            torch.cuda.empty_cache()  # PEFT reads an adapter's file onto the GPU where there is one
    config = LoraConfig.from_pretrained(str(folder))
    return folder, SERVERS["vllm"].rank_for(config.r)


def _export(subject: Subject, folder: Path) -> None:
    """Write the folder, on the CPU, with the base in the type that it is evaluated in."""
    base = load_model(subject.model, load_model_config(subject.model), AutoModelForCausalLM, checkpointing=False)
    try:
        export_lora(subject.adapter, folder, for_="vllm", base_model=base)
    except CoreLoraError as error:
        raise CoreLoraError(f"{error}\nOr {WAY_OUT}.") from None


def _key(subject: Subject) -> str:
    """Everything that an export depends on: the adapter's files, and the base that its start is made from."""
    assert subject.adapter is not None
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _weights(model_source(subject.model))]
    config = (subject.adapter / "adapter_config.json").read_text(encoding="utf-8")
    return key_of(subject.fingerprint, config, asdict(subject.model), files)


def _weights(source: str) -> list[Path]:
    """The weights in a model's folder; none for a hub name, whose revision is in the key."""
    return sorted(Path(source).glob("*.safetensors"))
