"""What `method` means: corelora's names, PEFT's names, full fine-tuning, and mistakes named with the right word."""

import pytest
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, VeraConfig

from corelora import CoreLoraConfig
from corelora.errors import CoreLoraError
from corelora.registry import METHODS
from corelora.train.methods import adapter_config, is_full, method_names, needs_stats, problems


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_bare_name_is_coreloras_where_it_has_it(name):
    config = adapter_config({"name": name, "r": 4, "stats": "weight"}, "CAUSAL_LM")
    assert isinstance(config, CoreLoraConfig)
    assert (config.method, config.r, config.task_type) == (name, 4, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("name", "kind", "field", "value"),
    [
        ("peft:lora", LoraConfig, "use_dora", False),
        ("dora", LoraConfig, "use_dora", True),
        ("rslora", LoraConfig, "use_rslora", True),
        ("peft:pissa", LoraConfig, "init_lora_weights", "pissa"),
        ("olora", LoraConfig, "init_lora_weights", "olora"),
        ("vera", VeraConfig, "r", 256),
        ("peft:vera", VeraConfig, "r", 256),
        ("loha", LoHaConfig, "alpha", 8),
    ],
)
def test_pefts_names(name, kind, field, value):
    config = adapter_config({"name": name, "target_modules": ["q_proj"]}, "CAUSAL_LM")
    assert type(config) is kind
    assert getattr(config, field) == value


def test_every_name_is_understood():
    """No name on the list is unknown, and both tables are on it."""
    names = method_names()
    assert {"full", "nlora", "lora", "peft:lora", "peft:pissa", "dora", "adalora", "lokr", "boft", "ia3"} <= set(names)
    assert "corelora" not in names
    for name in names:
        assert not any("unknown method" in p for p in problems({"name": name})), name


def test_full_has_no_adapter_and_no_settings():
    assert adapter_config({"name": "full"}, "CAUSAL_LM") is None
    assert is_full({"name": "full"})
    assert problems({"name": "full", "r": 8}) == ["method.r: full fine-tuning has no settings."]


def test_adalora_knows_the_length_of_the_run():
    config = adapter_config({"name": "adalora"}, "CAUSAL_LM", total_steps=70)
    assert isinstance(config, AdaLoraConfig)
    assert config.total_step == 70
    assert adapter_config({"name": "adalora", "total_step": 9}, "CAUSAL_LM", total_steps=70).total_step == 9


def test_heads_train_whole_and_carry_no_adapter():
    for name in ("nlora", "peft:lora"):
        config = adapter_config({"name": name}, "SEQ_CLS", heads=("pooler", "classifier"))
        assert set(config.modules_to_save) == {"pooler", "classifier"}
        assert "pooler" in config.exclude_modules
    own = adapter_config({"name": "nlora", "modules_to_save": ["x"]}, "SEQ_CLS", heads=("classifier",))
    assert own.modules_to_save == ["x"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({}, "method.name is missing"),
        ({"name": "nlra"}, "Did you mean 'nlora'"),
        ({"name": "peft:lor"}, "unknown method"),
        ({"name": "peft:corelora"}, "unknown method"),
        ({"name": "nlora", "inner_rank": 4}, "'method.inner_rank' for nlora"),
        ({"name": "nlora", "dropot": 0.1}, "Did you mean 'dropout'"),
        ({"name": "dora", "lora_alph": 4}, "Did you mean 'lora_alpha'"),
        ({"name": "vera", "r": 4, "projection_prng_ky": 1}, "Did you mean 'projection_prng_key'"),
        ({"name": "nlora", "task_type": "X"}, "unknown key 'method.task_type'"),
        ({"name": "peft:lora", "use_dora": True, "layers_pattern": "x"}, "layers_to_transform"),
    ],
)
def test_mistakes_name_the_right_word(method, words):
    found = problems(method)
    assert len(found) == 1
    assert words in found[0]
    with pytest.raises(CoreLoraError):
        adapter_config(method, "CAUSAL_LM")


def test_all_mistakes_at_once():
    found = problems({"name": "nlora", "r": 0, "dropout": 3, "bias": "some"})
    assert len(found) == 3
    found = problems({"name": "nlora", "rr": 1, "alfa": 2})
    assert len(found) == 2


def test_who_needs_statistics():
    assert needs_stats({"name": "nora"})
    assert needs_stats({"name": "pissa", "outer": "awsvd"})
    assert not needs_stats({"name": "nora", "stats": "weight"})
    assert not needs_stats({"name": "nlora"})
    assert not needs_stats({"name": "dora"})
