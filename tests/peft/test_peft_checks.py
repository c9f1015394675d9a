"""The training check: what it calls dead, and the harmless cases that it must not."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import METHODS, config, convnet, ids, layers, llama, loss_of, trained
from torch import nn
from transformers import Trainer, TrainingArguments

import corelora
from corelora.errors import CoreLoraError


def _steps(model, check, loss, steps=3, lr=1e-2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        check.after_backward()
        optimizer.step()


@pytest.mark.parametrize("variant", ["default", "published"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes(method, variant):
    model = get_peft_model(llama(), config(method, variant=variant))
    check = corelora.check_training(model)
    _steps(model, check, lambda: loss_of(model, ids()))
    report = check.report()
    assert report["learning"] == report["factors"]
    assert (report["dead"], report["waiting"], report["unreached"], report["steps"]) == ([], [], [], 3)
    check.raise_if_dead()
    check.close()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("method", "slots"), [("lora", {"A"}), ("nora", {"core_a"}), ("slora", {"A", "core"})])
def test_under_a_zero_partner_factors_wait(method, slots):
    """A under B = 0 and A' under B' = 0 at the first step, and for as long as the learning rate is zero."""
    model = get_peft_model(llama(), config(method))
    check = corelora.check_training(model)
    _steps(model, check, lambda: loss_of(model, ids()), steps=2, lr=0.0)
    assert {name.split(".")[-1].split()[0] for name in check.waiting()} == slots
    assert check.dead() == []
    check.raise_if_dead()
    _steps(model, check, lambda: loss_of(model, ids()), steps=2)
    assert check.waiting() == []
    assert check.report()["learning"] == check.report()["factors"]


def test_reentrant_checkpointing_without_input_gradients_is_dead():
    """PEFT's best-known trap: no input requires a gradient, so reentrant checkpointing cuts the graph."""
    model = get_peft_model(llama(), config("lora"))
    head = model.base_model.model.lm_head.weight.requires_grad_(True)  # the loss still has a graph
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.base_model.model.disable_input_require_grads()
    model.train()
    check = corelora.check_training(model)
    loss_of(model, ids()).backward()
    check.after_backward()
    assert head.grad is not None
    with pytest.raises(CoreLoraError, match=r"28 of 28 trained factors got no gradient .*enable_input_require"):
        check.raise_if_dead()


def test_both_factors_zero_is_dead():
    model = get_peft_model(llama(), config("lora", target_modules=["q_proj"]))
    for layer in layers(model)[:1]:
        layer.corelora_A["default"].weight.data.zero_()
    check = corelora.check_training(model)
    _steps(model, check, lambda: loss_of(model, ids()))
    assert [name.split(" ")[0] for name in check.dead()] == [
        "base_model.model.model.layers.0.self_attn.q_proj.A",
        "base_model.model.model.layers.0.self_attn.q_proj.B",
    ]
    with pytest.raises(CoreLoraError, match=r"2 of 4 trained factors got no gradient in 3 step\(s\): .*q_proj.A"):
        check.raise_if_dead()


class Experts(nn.Module):
    """Two experts; all samples go to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x):
        return self.experts[0](x) + self.experts[2](x[:0]).sum()  # the third one is called with no token


def test_experts_that_no_token_reached_are_harmless():
    model = get_peft_model(Experts(), config("nlora", r=2, target_modules=r"experts\.\d\.0", task_type=None))
    check = corelora.check_training(model)
    _steps(model, check, lambda: model(torch.ones(2, 4)).square().sum())
    assert check.dead() == []
    assert check.unreached() == ["base_model.model.experts.1.0", "base_model.model.experts.2.0"]
    check.raise_if_dead()


class Bypass(nn.Module):
    """Reads its layer's weight without calling the layer, as fused attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.used(x), self.read.weight)


def test_a_bypassed_layer_is_dead():
    model = get_peft_model(
        nn.Sequential(Bypass()), config("lora", r=2, target_modules=["used", "read"], task_type=None)
    )
    check = corelora.check_training(model)
    _steps(model, check, lambda: model(torch.ones(2, 4)).square().sum())
    with pytest.raises(CoreLoraError, match=r"2 of 4 .*0\.read never ran although the module around it did.*exclude"):
        check.raise_if_dead()


def test_nothing_ran():
    model = get_peft_model(convnet(), config("lora", target_modules=["head"], task_type=None))
    check = corelora.check_training(model)
    check.after_backward()
    with pytest.raises(CoreLoraError, match=r"no adapted layer saw any input in 1 step"):
        check.raise_if_dead()


def test_no_adapter_and_a_frozen_one(tmp_path):
    with pytest.raises(CoreLoraError, match="no module of this model carries a corelora adapter"):
        corelora.check_training(llama())
    trained("nora").save_pretrained(tmp_path)
    with pytest.raises(CoreLoraError, match="load it with is_trainable=True"):
        corelora.check_training(PeftModel.from_pretrained(llama(), tmp_path))


def _trainer(model, folder, callback, **changes):
    from datasets import Dataset

    x = ids(8, 6).tolist()
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 3} | changes
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **settings
    )
    rows = Dataset.from_dict({"input_ids": x, "labels": x})
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize("method", ["lora", "nlora", "nora"])
def test_callback_passes_a_warm_up_from_zero(method, tmp_path):
    model = get_peft_model(llama(), config(method))
    callback = corelora.GradientCheckCallback(steps=1)
    _trainer(model, tmp_path, callback).train()
    assert callback.check is None  # it saw enough and let go
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_callback_stops_a_dead_training(tmp_path):
    model = get_peft_model(llama(), config("lora", target_modules=["q_proj", "v_proj"]))
    for layer in layers(model):
        layer.corelora_A["default"].weight.data.zero_()
    with pytest.raises(CoreLoraError, match="8 of 8 trained factors got no gradient in 2 step"):
        _trainer(model, tmp_path, corelora.GradientCheckCallback(steps=2)).train()
