"""A loss or gradient that is not finite stops the run before the update, by step and module."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from corelora.errors import CoreLoraError
from corelora.train.finite import advice, all_finite, first_bad_gradient, first_bad_output, gradient_norm, plain
from train.helpers import make_recipe, trainer_of


class Break(TrainerCallback):
    """Spoils a module's output, or its gradient, from one step on."""

    def __init__(self, module, step, *, gradient):
        self.module, self.step, self.gradient, self.now = module, step, gradient, False
        self.before = None
        module.register_forward_hook(self.spoil)

    def spoil(self, module, args, output):
        if not self.now:
            return None
        if self.gradient:
            output.register_hook(lambda grad: grad * float("inf"))
            return None
        return output + float("nan")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.now = state.global_step + 1 >= self.step
        if self.now:
            self.before = {n: p.detach().clone() for n, p in model.named_parameters()}


def broken_run(folder, tmp_path, *, gradient, **parts):
    """A trainer whose layer 1 up_proj breaks at step 4."""
    trainer = trainer_of(make_recipe(folder, **parts), tmp_path)
    model = trainer.model
    spoiler = Break(model.get_submodule("base_model.model.model.layers.1.mlp.up_proj"), 4, gradient=gradient)
    trainer.add_callback(spoiler)
    return trainer, model, spoiler


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_run_stops_before_the_update(folder, tmp_path, gradient, accumulate):
    """Step and module are named, nothing moved, the last checkpoint is there."""
    loop = {"save_every": 2, "accumulate": accumulate}
    trainer, model, spoiler = broken_run(folder, tmp_path, gradient=gradient, loop=loop)
    with pytest.raises(CoreLoraError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 4: ")
    assert ("a gradient is not finite" if gradient else "the loss is nan") in message
    # An infinite gradient at a layer's output reaches its own factors and everything below; the first in the model's
    # order is named. A loss is traced forward, to the module that broke.
    assert "first in model.layers.0" in message if gradient else "first in model.layers.1.mlp.up_proj" in message
    assert "checkpoint-2" in message
    assert "--set optim.lr=" in message
    assert all(torch.equal(p, spoiler.before[n]) for n, p in model.named_parameters())
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in kept.values())


def test_advice_begins_with_what_the_recipe_makes_likely(folder):
    recipe = make_recipe(
        folder,
        loop={"precision": "float16"},
        optim={"lr": 1e-2, "warmup": 0, "max_grad_norm": 0, "rates": {"B": 16}},
        method={"name": "nlora", "variant": "published"},
    )
    found = advice(recipe)
    assert "float16" in found[0]
    assert "method.start=subtract" in found[1]
    assert "max_grad_norm" in found[2]
    assert any("optim.lr=2.5e-03" in a for a in found)
    assert any("warmup" in a for a in found)
    assert any("optim.rates" in a for a in found)
    assert advice(make_recipe(folder)) == ["a lower learning rate: --set optim.lr=2.5e-04"]


def test_finite_values_pass():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    parameters = list(model.parameters())
    assert all_finite([torch.tensor(1.0)], gradient_norm(parameters))
    assert not all_finite([torch.tensor(1.0), torch.tensor(float("inf"))], gradient_norm(parameters))
    assert first_bad_gradient(model) is None
    model.bias.grad[0] = float("nan")
    assert not all_finite([torch.tensor(1.0)], gradient_norm(parameters))
    assert all_finite([torch.tensor(1.0)])
    assert first_bad_gradient(model) == "bias"
    nothing = gradient_norm(list(nn.Linear(2, 2).parameters()))  # no gradient yet
    assert all_finite([torch.tensor(0.0)], nothing)


@pytest.mark.parametrize("clipped", [1e-3, 1e6])
def test_the_norm_that_was_looked_at_is_the_one_that_clips(folder, tmp_path, monkeypatch, clipped):
    """Weights after three steps, and the norms that are logged, are those of Trainer's own clipping, bit for bit."""
    made = []
    for ours in (True, False):
        recipe = make_recipe(folder, optim={"max_grad_norm": clipped}, loop={"steps": 3, "log_every": 1})
        trainer = trainer_of(recipe, tmp_path / str(ours))
        with monkeypatch.context() as patch:
            if not ours:
                patch.delattr(type(trainer).__mro__[1], "_clip_grad_norm")
                patch.delattr(type(trainer).__mro__[1], "floating_point_ops")
            trainer.train()
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        weights = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        made.append((norms, weights, trainer.state.total_flos))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(a, b) for a, b in zip(made[0][1], made[1][1], strict=True))
    assert made[0][2] == made[1][2] > 0


def test_a_weight_that_is_not_finite_is_found(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    batch = {"input_ids": torch.tensor([[8, 9, 10]])}
    assert first_bad_output(model, [batch]) is None
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("inf")
    assert first_bad_output(model, [batch]) == "model.layers.0.self_attn.k_proj"
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("module.base_model.model.a.q.lora_A.default.weight", "a.q.lora_A"),
        ("_orig_mod.base_model.model.a.q.corelora_core.default.weight", "a.q.corelora_core"),
        ("a.b", "a.b"),
    ],
)
def test_names_are_the_models_own(name, wanted):
    assert plain(name) == wanted
