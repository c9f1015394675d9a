"""Optimizers by name, and rates of their own for A, core, B and head."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from corelora import CoreLoraConfig
from corelora.errors import CoreLoraError
from corelora.recipe.schema import OptimPart
from corelora.train.arguments import training_arguments
from corelora.train.models import load_model_config
from corelora.train.optim import factor_groups, make_optimizer, parameter_groups, problems, rate_problems
from train.helpers import make_recipe, trainer_of


def tiny_bert(adapter):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return get_peft_model(BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)), adapter)


@pytest.mark.parametrize(
    ("method", "groups"),
    [
        ("nlora", {"A", "core", "B"}),
        ("lora", {"A", "B"}),
        ("inttune", {"core"}),
        ("lora_mini", {"core_a", "core_b"}),
        ("lora_fa", {"B"}),
    ],
)
def test_factors_of_corelora_are_told_apart(folder, method, groups):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = get_peft_model(model, CoreLoraConfig(method=method, r=4, target_modules="all-linear"))
    found = factor_groups(model)
    assert set(found.values()) == groups
    for name, group in found.items():
        assert f"corelora_{group}" in name
    assert len(found) == sum(p.requires_grad for p in model.parameters())


def test_factors_of_peft_and_heads_are_told_apart():
    lora = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], use_dora=True)
    found = factor_groups(tiny_bert(lora))
    assert set(found.values()) == {"A", "B", "head", "other"}
    assert {g for n, g in found.items() if "classifier" in n} == {"head"}
    assert {g for n, g in found.items() if "magnitude" in n} == {"other"}


def test_a_head_without_an_adapter_is_told_apart():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = factor_groups(BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)))
    assert {n for n, g in found.items() if g == "head"} == {"classifier.weight", "classifier.bias"}


def test_rates_are_multiples_of_the_learning_rate():
    model = tiny_bert(CoreLoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    part = OptimPart(lr=0.1, rates={"core": 3.0, "B": 0.5, "head": 2.0}, weight_decay=0.01)
    bias = "base_model.model.classifier.modules_to_save.default.bias"
    decayed = {n for n, _ in model.named_parameters()} - {bias}
    groups = parameter_groups(part, model, decayed)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    for name, (rate, decay) in rates.items():
        wanted = {"corelora_core": 0.3, "corelora_B": 0.05, "classifier": 0.2, "corelora_A": 0.1}
        assert rate == pytest.approx(next(v for word, v in wanted.items() if word in name))
        assert decay == (0.0 if name == bias else 0.01)


def rates_by_factor(method, rates):
    """The rate of each trained factor, by its slot's name."""
    model = tiny_bert(CoreLoraConfig(r=4, inner_r=2, target_modules=["query"], **method))
    groups = parameter_groups(OptimPart(lr=0.1, rates=rates), model, set())
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)].split("corelora_")[1].split(".")[0]: g["lr"] for g in groups for p in g["params"]}


def test_inner_factors_take_rates_of_their_own_and_else_the_cores():
    nora = {"method": "nora", "outer": "svd"}
    assert rates_by_factor(nora, {"core_b": 4.0}) == pytest.approx({"core_a": 0.1, "core_b": 0.4})
    assert rates_by_factor(nora, {"core": 2.0, "core_b": 4.0}) == pytest.approx({"core_a": 0.2, "core_b": 0.4})
    both = rates_by_factor(nora | {"position": "both", "start": "subtract"}, {"core_a": 3.0})
    assert both == pytest.approx({"core_a": 0.3, "core_b": 0.1, "core2_a": 0.3, "core2_b": 0.1})


def test_inner_rates_need_a_nested_core():
    model = tiny_bert(CoreLoraConfig(method="inttune", r=4, target_modules=["query"]))
    assert "Trained here: core" in rate_problems(OptimPart(lr=0.1, rates={"core_a": 2.0}), model)[0]


def test_a_rate_for_nothing_is_an_error():
    model = tiny_bert(CoreLoraConfig(method="inttune", r=4, target_modules=["query"]))
    part = OptimPart(lr=0.1, rates={"B": 2.0, "core": 2.0})
    assert len(rate_problems(part, model)) == 1
    with pytest.raises(CoreLoraError, match=r"optim.rates.B: no parameter.*Trained here: core"):
        parameter_groups(part, model, set())


def optimizer(folder, tmp_path, optim, method=None):
    """The optimizer that a run of this recipe makes."""
    recipe = make_recipe(folder, optim=optim, **({"method": method} if method else {}))
    return trainer_of(recipe, tmp_path).create_optimizer()


def test_lora_plus_trains_b_faster(folder, tmp_path):
    made = optimizer(folder, tmp_path, {"name": "lora_plus", "lr": 1e-3})
    assert isinstance(made, torch.optim.AdamW)
    assert {g["lr"] for g in made.param_groups} == {1e-3, 16e-3}
    made = optimizer(folder, tmp_path, {"name": "lora_plus", "lr": 1e-3, "rates": {"B": 4}})
    assert {g["lr"] for g in made.param_groups} == {1e-3, 4e-3}


@pytest.mark.parametrize(
    ("name", "kind", "figures"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "lr": 1e-3}),
        ("rmsprop", torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-6, "momentum": 0, "lr": 1e-3}),
        ("sgd", torch.optim.SGD, {"lr": 1e-3}),
        ("adafactor", None, {"lr": 1e-3}),
    ],
)
@pytest.mark.parametrize("rates", [{}, {"core": 2.0}])
def test_optimizers_by_name(folder, tmp_path, name, kind, figures, rates):
    betas = [0.8, 0.95] if "adam" in name else None
    made = optimizer(folder, tmp_path, {"name": name, "lr": 1e-3, "betas": betas, "eps": 1e-6, "rates": rates})
    assert kind is None or type(made) is kind
    for key, value in figures.items():
        assert made.param_groups[0][key] == value
    if rates:
        assert {g["lr"] for g in made.param_groups} == {1e-3, 2e-3}


def test_rmsprop_without_eps_has_pytorchs(folder, tmp_path):
    """The NLoRA paper's appendix D names no numbers."""
    group = optimizer(folder, tmp_path, {"name": "rmsprop"}).param_groups[0]
    assert (group["alpha"], group["eps"], group["momentum"], group["centered"]) == (0.99, 1e-8, 0, False)


def test_lora_fa_is_pefts(folder, tmp_path):
    method = {"name": "peft:lora", "r": 4, "target_modules": ["q_proj"]}
    made = optimizer(folder, tmp_path, {"name": "lora_fa", "lr": 1e-3}, method)
    assert type(made).__name__ == "LoraFAOptimizer"
    assert "lora_fa projects" in problems(OptimPart(name="lora_fa", lr=1.0), {"name": "nlora"})[0]


def test_without_groups_transformers_makes_it(folder, tmp_path):
    recipe = make_recipe(folder)
    arguments = training_arguments(recipe, load_model_config(recipe.model), tmp_path)
    assert make_optimizer(recipe.optim, arguments, torch.nn.Linear(2, 2), set()) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adamv"}, "Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"name": "lomo", "rates": {"B": 2.0}}, "takes no groups"),
        ({"name": "lora_fa", "rates": {"B": 2.0}}, "lora_fa trains B only"),
        ({"name": "rmsprop", "betas": [0.9, 0.99]}, "rmsprop takes none"),
        ({"name": "sgd", "eps": 1e-6}, "optim.eps: sgd takes none"),
        ({"name": "lora_fa", "betas": [0.9, 0.99]}, "optim.betas: lora_fa takes none"),
    ],
)
def test_mistakes(settings, words):
    found = problems(OptimPart(lr=1e-3, **settings), {"name": "peft:lora"})
    assert len(found) == 1
    assert words in found[0]
