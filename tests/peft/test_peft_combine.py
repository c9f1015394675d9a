"""add_weighted_adapter: the new adapter's delta is the weighted sum of the others'."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from peft_models import config, ids, layers, llama, logits, loss_of, train, trained

from corelora.errors import CoreLoraError


def _with_two(method, **changes):
    """A model with two trained adapters of one method on the same seed."""
    model = trained(method, **changes)
    model.add_adapter("second", config(method, **changes))
    model.set_adapter("second")
    train(model, lambda: loss_of(model, ids(seed=9)), lr=5e-2)
    return model.eval()


def _expected(layer, weights):
    """The weighted sum of the deltas, in the weight's layout."""
    return sum(w * layer.get_delta_weight(n) for n, w in weights.items() if n in layer.cores)


def _close(model, weights, name, atol=1e-5):
    for layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight(name), _expected(layer, weights), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("combination", ["auto", "linear"])
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("inttune", {}),
        ("inttune", {"variant": "published"}),
        ("inttune", {"sampling": "random", "slice_scale": "orthonormal"}),
        ("lora_xs", {}),
        ("nora", {}),
        ("nora", {"variant": "published", "alpha": 2.0}),
        ("lora_mini", {}),
    ],
)
def test_cores_add_where_outer_factors_are_shared(method, changes, combination, tmp_path):
    model = _with_two(method, **changes)
    weights = {"default": 0.7, "second": -0.4}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=combination)
    _close(model, weights, "sum")
    assert {layer.cores["sum"].spec.r for layer in layers(model)} == {4}  # the ranks stay
    assert model.active_adapters == ["second"]
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=0)
    losses = train(model, lambda: loss_of(model, ids()), steps=3)
    assert losses[-1] < losses[0]  # it can be trained on


@pytest.mark.parametrize("method", ["lora", "nlora", "pissa", "slora", "inttune"])
def test_cat_is_exact_for_any_method(method):
    model = _with_two(method)
    weights = {"default": 0.5, "second": 1.5}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    _close(model, weights, "sum")


def test_auto_falls_back_to_cat_and_mixes_methods():
    model = trained("nlora")
    model.add_adapter("second", config("nora", target_modules=["q_proj", "up_proj"], r=3))
    model.set_adapter("second")
    train(model, lambda: loss_of(model, ids()))
    weights = {"default": 1.0, "second": 2.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    _close(model, weights, "sum")
    ranks = {layer.key.rsplit(".", 1)[-1]: layer.cores["sum"].spec.r for layer in layers(model)}
    assert ranks["k_proj"] == 8  # nlora's exact pair has rank 2r
    assert ranks["q_proj"] == 9  # and NoRA's is k = 1
    assert len([layer for layer in layers(model) if "sum" in layer.cores]) == 14


def test_svd_is_the_best_approximation():
    model = _with_two("slora")
    weights = {"default": 1.0, "second": 1.0}
    model.add_weighted_adapter(list(weights), [1.0, 1.0], "cut", combination_type="svd", svd_rank=3)
    for layer in layers(model):
        full = _expected(layer, weights)
        error = torch.linalg.matrix_norm(layer.get_delta_weight("cut") - full)
        tail = torch.linalg.svdvals(full.double())[3:].norm()  # Eckart and Young
        assert error.item() == pytest.approx(tail.item(), rel=1e-3, abs=1e-6)
        assert layer.cores["cut"].spec.r == 3


def test_a_changed_scale_counts():
    model = _with_two("inttune")
    before = {layer.key: layer.get_delta_weight("default").clone() for layer in layers(model)}
    for layer in layers(model):
        layer.set_scale("default", 0.25)
    model.add_weighted_adapter(["default"], [2.0], "sum")
    for layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight("sum"), 0.5 * before[layer.key], atol=1e-6, rtol=1e-4)


def test_others_stay_as_they_were():
    model = _with_two("nora")
    first, state = logits(model), copy.deepcopy(model.state_dict())
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    assert torch.equal(logits(model), first)
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value)
    model.delete_adapter("sum")
    assert torch.equal(logits(model), first)


def test_refusals():
    model = _with_two("nlora")
    with pytest.raises(CoreLoraError, match="trains its outer factors, so cores can't be added: use 'cat' or 'svd'"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type="linear")
    with pytest.raises(CoreLoraError, match=r"(?s)3 problems.*unknown adapter 'secnd'. Did you mean 'second'.*already"):
        model.add_weighted_adapter(["secnd"], [1, 1], "default")
    with pytest.raises(CoreLoraError, match=r"unknown combination_type 'sdv'. Did you mean 'svd'"):
        model.add_weighted_adapter(["second"], [1], "sum", combination_type="sdv")
    with pytest.raises(CoreLoraError, match="svd_rank is for combination_type 'svd'"):
        model.add_weighted_adapter(["second"], [1], "sum", svd_rank=2)
    assert list(model.peft_config) == ["default", "second"]
    model = trained("inttune")
    model.add_adapter("second", config("inttune", sampling="random"))
    with pytest.raises(CoreLoraError, match="outer factors of 'default' and 'second' differ"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type="linear")
