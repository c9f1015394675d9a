"""A cache of its own for each test, tokenizers made on the spot, and the shared data where it exists."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that everything is cached in."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CORELORA_CACHE", str(folder))
    return folder


def byte_tokenizer(merges=(), **settings) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each pair of texts in `merges`; no begin token; a chat template."""
    special = ["<|pad|>", "<|stop|>", "<|begin|>", "<|end|>"]
    words = [*special, *BYTES, *(a + b for a, b in merges)]
    raw = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **{"pad_token": "<|pad|>", "eos_token": "<|stop|>", **settings}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As LLaMA-2's: a begin token, and a blank that is put before every text."""
    special = ["<unk>", "<s>", "</s>"]
    words = [*special, "▁", *(chr(c) for c in range(33, 127)), "\n"]
    raw = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    raw.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tokenizer():
    """The byte tokenizer without merges."""
    return byte_tokenizer()


def write_lines(path: Path, rows) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shared_data() -> Path | None:
    """The folder with benchmark data, where this machine has it."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("CORELORA_SHARED_DATA") or default).resolve()
    return folder if folder.is_dir() else None
