"""Steps as CUDA graphs, on a GPU: `make test-gpu`. What needs none is in test_graphs.py."""

import pytest
import torch

from train.helpers import make_recipe, save_bert, write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = {
    "nlora": {"name": "nlora", "r": 4},
    "inttune": {"name": "inttune", "r": 4},
    "nora": {"name": "nora", "r": 8, "inner_r": 4},
    "lora": {"name": "peft:lora", "r": 4},
    "dora": {"name": "dora", "r": 4},
    "vera": {"name": "vera", "r": 8},
    "adalora": {"name": "adalora", "init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 2},
    "lokr": {"name": "lokr", "r": 4},
    "lora_fa": {"name": "lora_fa", "r": 4},
    "lora_xs": {"name": "lora_xs", "r": 8},
    "full": {"name": "full"},
}


def both(folder, tmp_path, **parts):
    from corelora.train.run import train

    loop = parts.pop("loop", {})
    made = {}
    for graphs in ("off", "on"):
        recipe = make_recipe(folder, loop={"steps": 20, "fast": "auto", "graphs": graphs, **loop}, **parts)
        made[graphs] = train(recipe, tmp_path / graphs)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_one_loss_curve(folder, tmp_path, method, dtype):
    """Every kind of method, twenty steps: the losses of a recorded run are the plain run's."""
    rate = 1e-2 if method == "full" else 0.1
    made = both(folder, tmp_path, method=METHODS[method], model={"dtype": dtype}, optim={"lr": rate})
    close = {"float32": 2e-3, "bfloat16": 3e-2}[dtype]
    assert made["on"]["train_loss"] == pytest.approx(made["off"]["train_loss"], abs=close)
    assert made["on"]["test_loss"] == pytest.approx(made["off"]["test_loss"], abs=close)
    assert made["on"]["test_loss"] < 4.6  # it learns: 4.62 at the start


def test_accumulation_and_autocast(folder, tmp_path):
    made = both(folder, tmp_path, loop={"accumulate": 3, "precision": "bfloat16"}, optim={"lr": 1e-2})
    assert made["on"]["test_loss"] == pytest.approx(made["off"]["test_loss"], abs=2e-2)


@pytest.mark.parametrize("method", ["nlora", "inttune"])
def test_a_classifier(folder, tmp_path, method):
    """Masks that look both ways, a head, two widths and a last batch that is smaller."""
    save_bert(folder / "bert")
    rows = [{"sentence": ("good " if n % 2 else "bad ") * (1 + n % 25), "label": n % 2} for n in range(42)]
    write_rows(folder / "labels.jsonl", rows)
    source = {"path": str(folder / "labels.jsonl")}
    data = {"train": source, "test": source, "form": "sst2", "max_length": 128}
    made = both(
        folder, tmp_path, task="classify", model={"name": str(folder / "bert"), "dtype": "float32"}, data=data,
        method=METHODS[method] | {"target_modules": "all-linear"}, loop={"steps": 40, "batch_size": 8},
    )  # fmt: skip
    assert made["on"]["test_loss"] == pytest.approx(made["off"]["test_loss"], abs=1e-3)


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("method", ["nlora", "inttune", "lora", "full"])
def test_ligers_kernels_give_the_same_losses(folder, tmp_path, method, graphs):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    from corelora.train.run import train

    made = {}
    for liger in (False, True):
        loop = {"steps": 20, "fast": "auto", "graphs": graphs, "liger": liger}
        recipe = make_recipe(folder, method=METHODS[method], model={"dtype": "float32"}, optim={"lr": 1e-2}, loop=loop)
        made[liger] = train(recipe, tmp_path / str(liger))
    assert made[True]["train_loss"] == pytest.approx(made[False]["train_loss"], abs=5e-3)
    assert made[True]["test_loss"] == pytest.approx(made[False]["test_loss"], abs=5e-3)
