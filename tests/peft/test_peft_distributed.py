"""Sharded and replicated training in two gloo processes follows one process; ZeRO-3's gathering by its contract."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import config, layers, llama, logits
from peft_ranks import STEPS, alone
from safetensors.torch import save_file

import corelora
import corelora.storage
from corelora.storage import readable
from processes import TWO_RANKS

HERE = Path(__file__).parent


CASES = ["ddp:nora", "fsdp2:nlora", "fsdp2:inttune", "fsdp2:nora", "fsdp1:nlora", "fsdp1:nora"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, driver):
    """A folder with what two ranks saw, one file a case; they are started once for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {"GLOO_SOCKET_IFNAME": "lo"}
    done = driver.call(*TWO_RANKS, HERE / "peft_ranks.py", folder, *CASES, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_follow_one_process(case, ranks, tmp_path):
    """Loss within 1e-5 over the steps, and the gathered adapter file loads and gives the same logits."""
    task, method = case.split(":")
    losses, state = torch.load(ranks / f"{task}-{method}.pt")
    expected_losses, expected = alone(method)
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert losses[-1] != losses[0]
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4, msg=key)
    found = []
    for tensors in (state, expected):
        config(method, sampling="random").save_pretrained(tmp_path)
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
        found.append(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)
    assert (found[0] - logits(llama())).abs().max() > 1e-3


def test_base_weights_are_read_inside_the_gathering_context(monkeypatch):
    """ZeRO-3 keeps shards between forward passes: PEFT's context must be open whenever a start reads W."""
    depth, seen = [0], []

    @contextlib.contextmanager
    def gather(parameters, **kwargs):
        seen.append([tuple(p.shape) for p in parameters])
        depth[0] += 1
        yield
        depth[0] -= 1

    read = corelora.storage.BaseWeight.native

    def native(self):
        assert depth[0] > 0, "a base weight was read outside the context"
        return read(self)

    monkeypatch.setattr(corelora.storage, "gather_params_ctx", gather)
    monkeypatch.setattr(corelora.storage.BaseWeight, "native", native)
    model = get_peft_model(llama(), config("nora"))
    model.add_adapter("second", config("nlora", sampling="leverage"))
    assert len(seen) >= 28
    assert all(shapes and all(len(shape) <= 2 for shape in shapes) for shapes in seen)
    layer = layers(model)[0]
    with readable(layer):
        assert layer.weight_access.full().shape == (16, 16)


def test_a_sharded_weight_is_not_read_live():
    """A ZeRO-3 parameter is marked with ds_id: its slices are held, for W is not whole when a factor needs them."""
    base = llama()
    for parameter in base.parameters():
        parameter.ds_id = 0
    held = layers(get_peft_model(base, config("nlora")))[0]
    live = layers(get_peft_model(llama(), config("nlora")))[0]
    assert not any(f.is_live for f in held.factors("default").values())
    assert any(f.is_live for f in live.factors("default").values())
    x = torch.randn(2, 16)
    for layer in (held, live):
        layer.corelora_core["default"].weight.data.fill_(0.1)
    torch.testing.assert_close(held(x), live(x))
