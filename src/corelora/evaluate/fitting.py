"""How many samples are evaluated at one time where the user does not say.

What a reply takes beside the weights is its keys and values. A step of generation costs the host the same for one reply
as for a thousand, so few large batches are several times as fast as many small ones on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

PROMPT = 512  # tokens that a prompt is taken to have; longer ones share what is left of the memory
SHARE = 0.5  # of the memory beside the weights, for keys and values; the rest is for what a step makes and drops
MOST, LEAST, ON_CPU, ONE_PASS = 2048, 8, 16, 256
SCHEDULED = 1024  # with vLLM, which packs them itself: a stopped evaluation makes no more than so many again


def cache_bytes(config: Any, item: int) -> int:
    """Bytes of keys and values that a language model keeps for one token.

    Args:
        config: the model's.
        item: bytes of a number.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * item


def most_replies(config: Any, item: int, memory: float, new_tokens: int) -> int:
    """Replies that can be written at one time, between 8 and 2,048.

    Args:
        config: the model's.
        item: bytes of a number of the cache.
        memory: bytes of the device that the weights leave.
        new_tokens: of a reply, at most.
    """
    each = (PROMPT + new_tokens) * cache_bytes(config, item)
    return int(min(MOST, max(LEAST, SHARE * memory // each)))


def samples_at_a_time(model: Any, writes: bool, new_tokens: int) -> int:
    """Samples of a batch on the model's device; the same again on the same machine, whatever else runs on it.

    Args:
        model: loaded.
        writes: replies are written; else a sample is one pass through the model.
        new_tokens: of a reply, at most.
    """
    if model.device.type != "cuda":
        return ON_CPU  # more gain nothing: the cache, copied at every token, then costs more than the weights
    if not writes:
        return ONE_PASS
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total = torch.cuda.get_device_properties(model.device).total_memory
    return most_replies(model.config, model.dtype.itemsize, total - weights, new_tokens)
