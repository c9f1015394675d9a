"""Out of memory ends with changes that would fit, computed; the estimate follows the recipe."""

import pytest
import torch

from corelora.errors import CoreLoraError
from corelora.train import memory
from corelora.train import run as run_module
from corelora.train.memory import changes_that_fit, explain, step_memory
from corelora.train.models import load_model_config
from corelora.train.out_of_memory import is_out_of_memory
from corelora.train.run import memory_advice, train
from train.helpers import make_recipe, run_of, save_llama, sums, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer: a step on tensors without values costs by the operation, whatever its size."""
    made = tmp_path_factory.mktemp("memory")
    save_llama(made / "model", num_hidden_layers=1)
    write_rows(made / "train.jsonl", sums(70))
    write_rows(made / "test.jsonl", sums(4))
    return made


@pytest.fixture(scope="module")
def estimates():
    """What was simulated already, by all that an estimate depends on."""
    return {}


@pytest.fixture(autouse=True)
def _simulated_once(estimates, monkeypatch):
    """Changes that are proposed are looked for in most tests here, among the same ones: each is simulated once."""

    def once(recipe, config, device):
        key = repr((recipe, config.to_dict(), device))
        if key not in estimates:
            estimates[key] = step_memory(recipe, config, device)
        return estimates[key]

    monkeypatch.setattr(memory, "step_memory", once)


def sizes(folder, **parts):
    recipe = make_recipe(folder, **{"loop": {"batch_size": 64, **parts.pop("loop", {})}, **parts})
    return recipe, load_model_config(recipe.model)


def peak(folder, **parts):
    return memory.step_memory(*sizes(folder, **parts), "cpu").peak


def test_the_estimate_follows_the_recipe(folder):
    """Each change that should make a step smaller does."""
    whole = peak(folder)
    assert peak(folder, loop={"batch_size": 8}) < whole
    assert peak(folder, loop={"checkpointing": True}) < whole
    assert peak(folder, model={"dtype": "bfloat16"}) < whole
    assert peak(folder, data={"max_length": 32}) < whole
    full = {"name": "full"}
    assert step_memory(*sizes(folder, method=full), "cpu").trained > step_memory(*sizes(folder), "cpu").trained
    assert peak(folder, optim={"name": "sgd"}, method=full) < peak(folder, method=full)


def test_quantised_weights_are_counted_smaller(folder):
    plain = step_memory(*sizes(folder), "cpu").weights
    eight = step_memory(*sizes(folder, model={"quantize": "8bit"}), "cpu").weights
    four = step_memory(*sizes(folder, model={"quantize": "4bit"}), "cpu").weights
    linear = 1 * (4 * 32 * 32 + 3 * 32 * 48)  # weights in linear layers, the output excepted
    assert plain - eight == 3 * linear
    assert plain - four == pytest.approx((4 - 4.127 / 8) * linear, abs=1)


def test_changes_that_fit_come_largest_first(folder):
    recipe, config = sizes(folder)
    before = step_memory(recipe, config, "cpu").peak
    found = changes_that_fit(recipe, config, "cpu", before - 1)
    peaks = [c.peak for c in found]
    assert peaks == sorted(peaks)
    assert all(p < before for p in peaks)
    settings = [c.settings for c in found]
    assert ("loop.checkpointing=true",) in settings
    assert ("model.dtype=bfloat16",) in settings
    assert ("loop.batch_size=32", "loop.accumulate=2") in settings


def test_the_batch_is_the_largest_that_fits(folder):
    """Checked against the estimate itself: this one fits, the next larger divisor does not."""
    recipe, config = sizes(folder)
    space = peak(folder, loop={"batch_size": 8}) + 1000
    [change] = [c for c in changes_that_fit(recipe, config, "cpu", space) if "batch_size" in c.settings[0]]
    assert change.settings == ("loop.batch_size=8", "loop.accumulate=8")
    assert change.peak == space - 1000
    assert peak(folder, loop={"batch_size": 16}) > space


def test_methods_that_would_be_refused_are_not_proposed(folder):
    """Another method keeps the recipe's keys, as --set does; PEFT's own are not corelora's."""
    for method, wanted in (({"name": "peft:lora", "lora_alpha": 8}, False), ({"name": "slora", "r": 4}, True)):
        recipe = make_recipe(folder, method={"target_modules": ["q_proj"], **method})
        settings = {s for made, _ in memory._candidates(recipe) for s in made}
        assert ("method.name=inttune" in settings) is wanted


def test_weights_get_smaller_together_with_their_arithmetic(folder):
    """bfloat16 weights under float32 arithmetic would be refused."""
    recipe, config = sizes(folder, loop={"precision": "float32"})
    settings = [c.settings for c in changes_that_fit(recipe, config, "cpu", 10**12)]
    assert ("model.dtype=bfloat16", "loop.precision=auto") in settings


def test_where_one_is_not_enough_they_are_put_together(folder):
    recipe, config = sizes(folder)
    alone = peak(folder, loop={"batch_size": 1, "accumulate": 64})  # the largest effect that one change has here
    [change] = changes_that_fit(recipe, config, "cpu", alone - 1)
    assert len(change.settings) > 2
    assert change.peak < alone
    keys = [s.partition("=")[0] for s in change.settings]
    assert len(keys) == len(set(keys))
    assert changes_that_fit(recipe, config, "cpu", 1000) == []


def test_the_message(folder):
    recipe, config = sizes(folder)
    text = explain(recipe, config, "cpu", step_memory(recipe, config, "cpu").peak - 1)
    assert text.startswith("out of memory: this recipe takes about 0.0")
    assert "\n  - --set " in text
    assert "use a smaller model" in explain(recipe, config, "cpu", 1000)


def test_recorded_steps_hold_what_they_made(folder, monkeypatch):
    """Beside the passes that are not recorded; on a CPU there are no graphs."""
    recipe, config = sizes(folder)
    plain = step_memory(recipe, config, "cuda")
    monkeypatch.setattr(memory, "has_graphs", lambda recipe: True)
    graphs = step_memory(recipe, config, "cuda")
    assert graphs.peak - plain.peak == plain.activations + plain.logits > 0
    assert step_memory(recipe, config, "cpu").peak < graphs.peak


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes don't match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, wanted):
    assert is_out_of_memory(error) is wanted


def test_a_model_moves_only_where_room_is_left(monkeypatch):
    """800 bytes of parameters and buffers need more than 1000."""
    model = torch.nn.BatchNorm1d(50, dtype=torch.float32)
    model.num_batches_tracked = None
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "room", lambda device: 1001)
    assert memory.fits(model, cpu)
    monkeypatch.setattr(memory, "room", lambda device: 1000)
    assert not memory.fits(model, cpu)


def test_a_run_out_of_memory_ends_with_advice(folder, tmp_path, monkeypatch):
    """A step that really asks for more than there is."""
    recipe, _ = sizes(folder, loop={"steps": 2})
    real = run_module.build_model

    def greedy(run):
        model = real(run)
        model.get_submodule("base_model.model.lm_head").register_forward_hook(lambda *args: torch.empty(2**60))
        return model

    monkeypatch.setattr(run_module, "build_model", greedy)
    space = peak(folder) - 1
    monkeypatch.setattr(memory, "room", lambda device: space)
    with pytest.raises(CoreLoraError, match=r"(?s)^out of memory.*What would fit.*--set loop.batch_size=32 "):
        train(recipe, tmp_path)


def test_other_errors_pass(folder, tmp_path):
    recipe = make_recipe(folder)
    run = run_of(recipe, tmp_path)
    with pytest.raises(RuntimeError, match="something else"), memory_advice(run):
        raise RuntimeError("something else")
