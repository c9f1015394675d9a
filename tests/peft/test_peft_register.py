"""Registration: one enum member, once, in this process and in others; and a model that carries it travels."""

from __future__ import annotations

import enum
import multiprocessing

import pytest
import torch
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft_models import config, llama, logits, trained
from test_peft_files import child

import corelora
from corelora.enums import grow
from corelora.peft_plugin import CoreLoraModel, register


class Toy(str, enum.Enum):  # noqa: UP042
    """Written as PEFT writes its PeftType."""

    ONE = "ONE"


def test_grow_adds_a_full_member():
    member = grow(Toy, "TWO")
    assert grow(Toy, "TWO") is member  # a second time does nothing
    assert Toy.TWO is Toy["TWO"] is Toy("TWO") is member
    assert (member.name, member.value, member == "TWO", isinstance(member, Toy)) == ("TWO", "TWO", True, True)
    assert list(Toy) == ["ONE", "TWO"]
    assert len(Toy) == 2
    assert "TWO" in Toy.__members__
    assert member in Toy
    assert {member: 1}["TWO"] == 1
    assert repr(member) == "<Toy.TWO: 'TWO'>"
    with pytest.raises(ValueError, match="'THREE' is not a valid Toy"):
        Toy("THREE")


def test_peft_knows_the_type():
    for _ in range(2):
        register()
    member = PeftType.CORELORA
    assert member is PeftType("CORELORA")
    assert member.value == "CORELORA"
    assert list(PeftType).count("CORELORA") == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is corelora.CoreLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["CORELORA"] is CoreLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "corelora_"


def test_once_under_reload_in_a_new_process(driver):
    assert child(driver, "registered_once").strip() == "registered CORELORA CORELORA"


def _spawned(model, queue):
    torch.set_num_threads(1)
    queue.put(logits(model).tolist())


@pytest.mark.slow
def test_a_model_goes_to_a_spawned_worker():
    """Unpickling imports corelora, which registers the type: no import by the worker's own code."""
    model = trained("nlora")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_spawned, args=(model, queue))
    process.start()
    found = torch.tensor(queue.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(found, logits(model))


def test_a_config_pickles():
    import pickle

    given = config("nora", r=3)
    assert pickle.loads(pickle.dumps(given)).to_dict() == given.to_dict()


def test_lora_still_works_beside_it():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    assert torch.equal(logits(model.eval()), logits(llama()))
