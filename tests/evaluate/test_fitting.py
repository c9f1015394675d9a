"""Batch sizes that nobody asked for: from the model's shapes and the device's memory."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig

from corelora.evaluate.fitting import cache_bytes, most_replies

GIB = 2**30
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
)
GROUPED = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (LLAMA_2_7B, 2 * 32 * 4096),
        (GROUPED, 2 * 30 * 3 * 64),
        (GPT2Config(), 2 * 12 * 768),
    ],
    ids=["llama", "grouped", "gpt2"],
)
def test_keys_and_values_of_a_token(config, size):
    """Counted by hand: two of them, layers, heads, width; in bfloat16."""
    assert cache_bytes(config, 2) == 2 * size


@pytest.mark.parametrize("memory", [24 * GIB, 80 * GIB])
def test_what_fits(memory):
    """The cache of a whole batch stays within half of the memory, and so much is used."""
    made = most_replies(LLAMA_2_7B, 2, memory, 200)
    taken = made * (512 + 200) * cache_bytes(LLAMA_2_7B, 2)
    assert 0.4 * memory < taken <= 0.5 * memory


def test_the_ends():
    """A small model on a large GPU is not given more than helps; one that hardly fits still gets some."""
    assert most_replies(GROUPED, 2, 1000 * GIB, 64) == 2048
    assert most_replies(LLAMA_2_7B, 2, GIB, 512) == 8
