"""Run in another process by the tests: `python peft_child.py TASK ARGUMENTS`. Prints or saves what is compared."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def reload_all(folder: str) -> None:
    """Load each adapter folder of `folder` under another seed and save its logits."""
    torch.manual_seed(12345)
    from peft import PeftModel
    from peft_models import llama, logits

    found = {}
    for path in sorted(Path(folder).iterdir()):
        torch.rand(7)
        found[path.name] = logits(PeftModel.from_pretrained(llama(), path).eval())
    torch.save(found, Path(folder) / "logits.pt")


def without_corelora(folder: str) -> None:
    """What PEFT says about an adapter folder when corelora was never imported."""
    from peft import PeftConfig

    try:
        PeftConfig.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, error)
    assert "corelora" not in sys.modules


def registered_once() -> None:
    """Import, reload, and register again."""
    import importlib

    from peft import PeftType

    import corelora
    import corelora.peft_plugin

    first = PeftType.CORELORA
    importlib.reload(corelora)
    corelora.peft_plugin.register()
    assert PeftType.CORELORA is first
    assert list(PeftType).count("CORELORA") == 1
    print("registered", PeftType("CORELORA").value, PeftType["CORELORA"].name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
