"""Training with the tools people have: Trainer, TRL, gradient checkpointing, torch.compile, mixed batches."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft_models import METHODS, SAFE_SPREAD, config, ids, layers, llama, logits, loss_of, train, trained
from transformers import Trainer, TrainingArguments

import corelora
from corelora.errors import CoreLoraError


def _rows(n: int = 12) -> Dataset:
    x = ids(n, 6, seed=7).tolist()
    return Dataset.from_dict({"input_ids": x, "labels": x, "attention_mask": [[1] * 6] * n})


def _arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-2,
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "seed": 3,
        "disable_tqdm": True,
    }
    return TrainingArguments(**settings | changes)


def _model(method):
    torch.manual_seed(5)
    return get_peft_model(llama(), config(method))


@pytest.mark.parametrize("method", ["nlora", "inttune", "nora", "slora"])
def test_trainer_resumes_where_it_stopped(method, tmp_path):
    rows = _rows()
    whole = _model(method)
    Trainer(model=whole, args=_arguments(tmp_path / "a"), train_dataset=rows).train()
    again = _model(method)
    with torch.no_grad():  # a resumed run must not depend on where its factors began
        for p in again.parameters():
            if p.requires_grad:
                p.add_(0.1)
    trainer = Trainer(model=again, args=_arguments(tmp_path / "a"), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    torch.testing.assert_close(logits(again.eval()), logits(whole.eval()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["nlora", "nora"])
def test_load_best_model_at_end(method, tmp_path):
    rows = _rows()
    model = _model(method)
    arguments = _arguments(
        tmp_path, max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r]
    assert losses[0] > losses[-1] + 1e-3  # it learns, and "best" is asked to mean the largest: the first, not the last
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("method", ["nlora", "inttune", "nora"])
def test_trl_sft_trainer(method, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {w: i for i, w in enumerate(["<pad>", "<eos>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    rows = Dataset.from_dict({"text": ["a b c d e", "f g h i j"] * 4})
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=5e-2, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", max_length=16, disable_tqdm=True,
    )  # fmt: skip
    check = corelora.GradientCheckCallback(steps=2)
    trainer = SFTTrainer(
        model=llama(), args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config(method),
        callbacks=[check],
    )  # fmt: skip
    trainer.train()
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "nlora", "inttune", "nora", "pissa"])
def test_gradient_checkpointing(method, reentrant):
    """The same gradients with and without."""
    model = trained(method).train()
    twin = copy.deepcopy(model)
    loss_of(model, ids()).backward()
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss_of(twin, ids()).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compile_one_layer_without_a_graph_break(method):
    layer = layers(trained(method).train())[0]
    x = torch.randn(3, 16, requires_grad=True)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # fullgraph: a break is an error
    found = compiled(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    weight = next(p for p in layer.parameters() if p.requires_grad)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (expected, found)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nlora", "nora"])
def test_compiled_model_equals_eager(method):
    """A whole model, loss and gradients, traced and differentiated; code generation is left to the next test."""
    model = trained(method).train()
    expected = loss_of(model, ids())
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = loss_of(compiled, ids())
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_inductor_on_one_layer():
    layer = layers(trained("nlora").train())[0]
    x = torch.randn(3, 16)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-5, rtol=1e-5)


# -- an adapter for each sample ----------------------------------------------------------------------------------------


def _two(method="nlora", other="nora"):
    model = trained(method)
    model.add_adapter("second", config(other))
    model.set_adapter("second")
    train(model, lambda: loss_of(model, ids(seed=9)), lr=5e-2)
    return model.eval()


@pytest.mark.parametrize(("method", "other"), [("nlora", "nora"), ("inttune", "lora"), ("pissa", "slora")])
def test_mixed_batch(method, other):
    model = _two(method, other)
    x = ids(4)
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = logits(model, x)
    with model.disable_adapter():
        alone["__base__"] = logits(model, x)
    names = ["second", "__base__", "default", "second"]
    mixed = logits(model, x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], atol=1e-5, rtol=0)
    assert (alone["default"] - alone["second"]).abs().max() > SAFE_SPREAD


def test_mixed_batch_with_beams():
    model = _two()
    x = ids(3, 4)
    settings = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4, "eos_token_id": None}
    names = ["default", "second", "__base__"]
    mixed = model.generate(input_ids=x, adapter_names=names, **settings)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(input_ids=x, **settings)[row])
    with model.disable_adapter():
        assert torch.equal(mixed[2], model.generate(input_ids=x, **settings)[2])


def test_mixed_batch_refusals():
    model = _two()
    with pytest.raises(CoreLoraError, match="no adapter is called 'third'"):
        logits(model, ids(1), adapter_names=["third"])
    with pytest.raises(CoreLoraError, match="3 names for a batch of 2"):
        logits(model, ids(2), adapter_names=["second"] * 3)
    model.train()
    with pytest.raises(CoreLoraError, match=r"call model\.eval"):
        logits(model, ids(1), adapter_names=["second"])


def test_mixed_batch_on_a_merged_model():
    """PEFT's LoRA unmerges here; so do we, and the weights are the base's again."""
    model = _two()
    model.set_adapter("default")
    expected = logits(model)
    model.merge_adapter()
    mixed = logits(model, ids(), adapter_names=["default", "default"])
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=0)


# -- other doors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_convert_to_lora(method):
    from peft import convert_to_lora, set_peft_model_state_dict

    model = trained(method)
    expected = logits(model)
    lora_config, state = convert_to_lora(model, rank=8)
    plain = get_peft_model(llama(), lora_config)
    set_peft_model_state_dict(plain, state)
    # rank 8 holds every delta here: r = 4, and 2r where a start is subtracted from trained outer factors
    torch.testing.assert_close(logits(plain.eval()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["nlora", "nora"])
def test_dropout_only_in_training(method):
    model = trained(method, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_injected_model_has_no_wrapper_and_trains():
    model = inject_adapter_in_model(config("nora", task_type=None), llama())
    losses = train(model, lambda: loss_of(model, ids()), steps=3)
    assert losses[-1] < losses[0]
