"""What the papers say about cost, to stand beside what is measured here."""

from __future__ import annotations

# Seconds of training on MetaMathQA, LLaMA-2-7B, r = 128, batch 4, on L20 GPUs. NLoRA paper, sections 4.1 and 4.3 (its
# text gives LoRA's time as 25,142.26 and 25,142.27; IntTune's 85.2 % of it is 85.3 % by the seconds it prints).
TRAINING_SECONDS = {"peft_lora": 25142.26, "slora": 27690.03, "nlora": 25323.34, "inttune": 21439.26}

# Seconds to start the adapters of the same model. NLoRA paper, Table 5.
START_SECONDS = {"peft_lora": 12.69, "slora": 14.21, "nlora": 25.35, "peft_pissa_exact": 106903.20}


def published_ratio(seconds: dict[str, float], name: str) -> float | None:
    """A published time over LoRA's in the same table, None where the paper has none.

    Args:
        seconds: one of the tables above.
        name: of a peer or method; both paths of a method are the same method.
    """
    own = seconds.get(name.partition(":")[0])
    return None if own is None else own / seconds["peft_lora"]
