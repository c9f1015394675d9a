"""What the programs that load a plain LoRA take, as data; and the target names and zero layers that follow from it.

What each server is known to take: vLLM allocates slots of fixed ranks and is started with the
largest; all of them read linear layers only, find layers by the last part of their names, and drop or refuse whole
modules and biases that were trained along. Plain PEFT takes everything that its own LoRA layers can hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from corelora.errors import CoreLoraError, unknown_name
from corelora.layers import view_of

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One reader of plain LoRA folders.

    Attributes:
        name: what the user writes.
        ranks: the ranks that it takes; empty: any.
        linear_only: it reads linear layers only, no convolution, embedding or GPT-2's Conv1D.
        extras: it reads modules and biases that were trained along.
        short_names: every layer of an adapted type is in the file, as zeros if need be, so that endings name targets.
        lines: how to start it; {path} and {rank} are filled in.
    """

    name: str
    ranks: tuple[int, ...] = ()
    linear_only: bool = True
    extras: bool = False
    short_names: bool = True
    lines: tuple[str, ...] = ()

    def rank_for(self, rank: int) -> int:
        """The smallest rank that this server takes and that holds `rank`.

        Raises:
            CoreLoraError: there is none.
        """
        fitting = [r for r in self.ranks if r >= rank] if self.ranks else [rank]
        if not fitting:
            raise CoreLoraError(
                f"the plain LoRA has rank {rank}, but {self.name} takes at most {self.ranks[-1]}: cut it with "
                f"rank={self.ranks[-1]}, export for_='peft', or export merged weights"
            )
        return fitting[0]

    def targets(self, model: nn.Module, adapted: Iterable[str]) -> tuple[list[str], list[str]]:
        """(target_modules, names of layers to fill with zeros) for the adapted layers of a model without adapters.

        A target is the shortest ending that catches nothing else; where there is none, names in full.

        Args:
            model: the model that will be loaded, plain.
            adapted: names of the adapted layers.
        """
        adapted, modules = set(adapted), dict(model.named_modules())
        types = {_type(name) for name in adapted}
        written = adapted | {
            name for name, m in modules.items() if self.short_names and _type(name) in types and _is_plain_linear(m)
        }
        chosen: set[str] = set()
        for name in sorted(written):
            if not caught(name, chosen):
                chosen.add(_target(name, written, modules))
        return sorted(chosen), sorted(written - adapted)

    def usage(self, path: Path, rank: int) -> list[str]:
        """Lines that tell how to load the folder."""
        return [line.format(path=path, rank=rank) for line in self.lines]


def caught(name: str, targets: set[str]) -> bool:
    """Whether PEFT's target_modules would catch a module of this name."""
    return any(name == t or name.endswith(f".{t}") for t in targets)


def clashes(adapted: Iterable[str]) -> list[str]:
    """Adapted layers that SGLang can't tell apart: it keeps one of each last part of a name for a `layers.<number>`
    (experts, numbered too, it knows)."""
    kept: dict[tuple[str, ...], str] = {}
    found: set[str] = set()
    for name in sorted(n for n in adapted if re.search(r"layers\.\d+\.", n)):
        *path, last = name.split(".")
        first = kept.setdefault((*filter(str.isdigit, path), last), name)
        if first != name:
            found |= {first, name}
    return sorted(found)


def _target(name: str, written: set[str], modules: Iterable[str]) -> str:
    """The shortest ending that catches no layer but those that are written; the name itself where there is none."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        ending = ".".join(parts[-n:])
        if parts[-n].isdigit():
            return name
        if all(m in written for m in modules if caught(m, {ending})):
            return ending
    return name


def _type(name: str) -> tuple[str, ...]:
    """A layer's name without the numbers: layers of one type differ in these alone. A vision tower's `q_proj` is of
    another type than the language model's: SGLang keeps both under one layer number, where zeros would win."""
    return tuple("#" if part.isdigit() else part for part in name.split("."))


def _is_plain_linear(module: nn.Module) -> bool:
    view = view_of(module)
    return view is not None and view.kind == "linear"


_VLLM = "vLLM: vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules adapter={path}"
_SGLANG = "SGLang: python -m sglang.launch_server --model-path BASE --lora-paths adapter={path} --max-lora-rank {rank}"
_LLAMACPP = "llama.cpp: python convert_lora_to_gguf.py {path} --base BASE"

SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Server(name="all", ranks=VLLM_RANKS, lines=(_VLLM,)),
        Server(name="peft", linear_only=False, extras=True, short_names=False),
        Server(name="vllm", ranks=VLLM_RANKS, lines=(_VLLM,)),
        Server(name="sglang", lines=(_SGLANG,)),
        Server(name="tgi", lines=("TGI: text-generation-launcher --model-id BASE --lora-adapters adapter={path}",)),
        Server(name="llamacpp", lines=(_LLAMACPP,)),
        Server(name="ollama", lines=("Ollama, in a Modelfile: FROM BASE, then ADAPTER {path}",)),
    )
}


def server_named(name: str) -> Server:
    """The server of this name.

    Raises:
        CoreLoraError: there is none; the message names the nearest.
    """
    if name not in SERVERS:
        raise CoreLoraError(unknown_name("target of an export (for_)", name, SERVERS))
    return SERVERS[name]
