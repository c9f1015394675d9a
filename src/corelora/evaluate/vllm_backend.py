"""vLLM as a writer of replies, where it is installed: `--backend vllm`.

No torch model is loaded for it: an engine reads the base itself and gets the adapter as a plain LoRA beside it
(vllm_adapter.py). Prompts are made into tokens here and replies are read from tokens here, with the same tokenizer, end
tokens and stop texts as with transformers, so that the two back ends differ in arithmetic alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from corelora.errors import CoreLoraError
from corelora.evaluate.job import Settings
from corelora.evaluate.subject import Subject, model_facts
from corelora.evaluate.vllm_adapter import WAY_OUT, adapter_problem, plain_lora
from corelora.recipe.schema import ModelPart
from corelora.run.generate import Reply, Writing, cut_reply, end_tokens
from corelora.train.models import DTYPES, load_model_config, load_tokenizer, model_source


@dataclass(frozen=True)
class Engine:
    """A vLLM engine and what its requests need.

    Attributes:
        llm: vllm.LLM with the base.
        lora: the LoRARequest that names the adapter, or None.
        generation: the base's GenerationConfig.
    """

    llm: Any
    lora: Any
    generation: Any


class VllmWriter:
    """Writes a batch with a vLLM engine.

    Args:
        engine: as `load_engine` made it.
        tokenizer: of the base.
        settings: whose seed drawn replies have.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings

    def __call__(self, prompts: Sequence[str], writing: Writing, ids: Sequence[str]) -> list[Reply]:
        """The replies, in the order of the prompts.

        Raises:
            CoreLoraError: vLLM refuses them; a prompt is longer than the model's context, say.
        """
        # As tokens: given as text, vLLM would put a begin token before a chat template's own.
        tokens = self.tokenizer(list(prompts), add_special_tokens=writing.special_tokens)["input_ids"]
        ends = end_tokens(self.engine.generation, self.tokenizer)
        with _said_plainly("vLLM can't write the replies"):
            made = self.engine.llm.generate(
                [{"prompt_token_ids": given} for given in tokens],
                [self._sampling(writing, ends, name) for name in ids],
                lora_request=self.engine.lora,
            )
        outputs = [request.outputs[0] for request in made]
        return [cut_reply(self.tokenizer, list(o.token_ids), ends, writing.stops) for o in outputs]

    def _sampling(self, writing: Writing, ends: list[int], name: str) -> Any:
        """One sample's SamplingParams; those that are given leave generation_config.json unread, so it is read here."""
        return load_vllm().SamplingParams(
            max_tokens=writing.max_new_tokens,
            temperature=writing.temperature,
            top_p=1.0,
            top_k=-1,
            min_p=self.engine.generation.min_p or 0.0,
            repetition_penalty=self.engine.generation.repetition_penalty or 1.0,
            stop=list(writing.stops) or None,
            stop_token_ids=ends,
            # A seed a sample: with one for all, several replies to one prompt would be the same reply.
            seed=self.settings.seed_of([name]) if writing.temperature else None,
        )


def vllm_problems(subject: Subject) -> list[str]:
    """What stands against `--backend vllm` for a subject, before anything is loaded.

    Args:
        subject: what is to be evaluated.
    """
    problems = []
    try:
        load_vllm()
    except CoreLoraError as error:
        problems.append(str(error))
    if subject.model.quantize is not None:
        problems.append(f"model.quantize: {subject.model.quantize} is not done with vLLM: {WAY_OUT}")
    adapter = None if subject.adapter is None else adapter_problem(subject.adapter)
    return problems if adapter is None else [*problems, adapter]


def load_engine(subject: Subject, seed: int, say: Callable[[str], None]) -> tuple[Engine, Any, dict[str, Any]]:
    """(engine, tokenizer, what a result says about them) for a subject.

    Args:
        subject: that `vllm_problems` has nothing against.
        seed: of the engine.
        say: takes lines for the user.

    Raises:
        CoreLoraError: the adapter can't become a plain LoRA; the model can't be read, by us or by vLLM.
    """
    vllm, part = load_vllm(), subject.model
    dtype = _dtype(subject)
    generation, tokenizer = _generation(part), load_tokenizer(part)
    options: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "seed": seed}
    if part.revision is not None:
        options |= {"revision": part.revision, "tokenizer_revision": part.revision}
    if part.trust_remote_code:
        options["trust_remote_code"] = True
    lora, rank = None, None
    if subject.adapter is not None:
        folder, rank = plain_lora(subject, say)
        lora = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 1, str(folder.resolve()))
        options |= {"enable_lora": True, "max_lora_rank": rank}
    with _said_plainly(f"vLLM can't load {part.name!r}"):
        llm = vllm.LLM(model=model_source(part), **options)
    facts = model_facts(subject, False, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    facts |= {"backend": "vllm", "vllm": vllm.__version__, "lora_rank": rank}
    return Engine(llm, lora, generation), tokenizer, facts


def load_vllm() -> Any:
    """The package vllm.

    Raises:
        CoreLoraError: it is not installed, or can't be imported.
    """
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise CoreLoraError(f"--backend vllm needs vLLM ({error}): pip install vllm (on a GPU machine)") from None


def _dtype(subject: Subject) -> torch.dtype:
    """The weights' type; "auto" is the file's own, as with transformers, where vLLM's would make 16 bits of 32.

    Raises:
        CoreLoraError: one that vLLM has no LoRA for.
    """
    own = load_model_config(subject.model).dtype
    dtype = DTYPES.get(subject.model.dtype) or (own if isinstance(own, torch.dtype) else torch.float32)
    if dtype == torch.float32 and subject.adapter is not None and torch.cuda.is_available():
        raise CoreLoraError(f"on a GPU vLLM's LoRA takes 16 bits only: add --dtype bfloat16 or float16, or {WAY_OUT}")
    return dtype


def _generation(part: ModelPart) -> GenerationConfig:
    """The model's own settings for generation, as transformers finds them when it loads the model."""
    try:
        return GenerationConfig.from_pretrained(model_source(part), revision=part.revision or "main")
    except OSError:  # many models have no such file
        return GenerationConfig.from_model_config(load_model_config(part))


@contextmanager
def _said_plainly(what: str) -> Iterator[None]:
    """One line for what vLLM raises: it means the user's model, memory or prompts."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise CoreLoraError(f"{what}: {why}. Or {WAY_OUT}") from error
