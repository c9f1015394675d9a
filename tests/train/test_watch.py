"""Before and in the first steps: the sample, the stop token, modules that don't learn."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, TrainerCallback

from corelora.errors import CoreLoraError
from corelora.train.adalora import adalora_of
from corelora.train.run import train
from corelora.train.tasks import TASKS, Rows
from corelora.train.watch import LearningCheck, first_steps, marked, owner
from train.helpers import make_recipe, save_tokenizer, trainer_of


def test_what_is_trained_is_marked():
    pieces = [("question ", False), ("answer", True), (" next ", False), ("end", True)]
    assert marked(pieces, colour=False) == "question [[answer]] next [[end]]"
    assert marked(pieces, colour=True) == "question \033[32manswer\033[0m next \033[32mend\033[0m"


def test_the_sample_is_shown_before_the_first_step(folder, tmp_path, capsys):
    train(make_recipe(folder, loop={"steps": 1}, data={"shuffle": False}), tmp_path)
    shown = capsys.readouterr().err
    assert shown.index("train: 40 rows") < shown.index("[[") < shown.index("training:")
    text = shown[shown.rindex("[[") : shown.rindex("]]")].replace(" ", "")
    assert text == "[[Itis0.</s>"  # the first row: 0 + 0


STOPS = PretrainedConfig(eos_token_id=1)  # of a model's config


@pytest.fixture
def rows():
    """Rows as the task gets them: prompt 7 8, reply 9, stop 1."""

    def make(*labels):
        return Rows(dataset=Dataset.from_list([{"input_ids": [7, 8, 9, 1], "labels": list(row)} for row in labels]))

    return make


def test_a_stop_token_that_is_not_trained_is_an_error(rows, tmp_path):
    task, tokenizer = TASKS["instruct"], save_tokenizer(tmp_path)
    assert task.row_problems(rows([-100, -100, 9, 1]), tokenizer, STOPS) == []
    [problem] = task.row_problems(rows([-100, -100, 9, -100], [-100, 8, 9, -100]), tokenizer, STOPS)
    assert "none of the first 2 rows trains a stop token ('</s>')" in problem
    tokenizer.eos_token = None
    [problem] = task.row_problems(rows([-100, -100, 9, 1]), tokenizer, PretrainedConfig(eos_token_id=None))
    assert "the tokenizer has none" in problem


def test_a_stop_token_of_the_settings_for_generation(rows, tmp_path):
    """Some chat models name the token that ends a turn only there."""
    task, tokenizer = TASKS["instruct"], save_tokenizer(tmp_path)
    config, made = PretrainedConfig(eos_token_id=1, name_or_path=str(tmp_path)), rows([-100, -100, 9, 4])
    assert task.row_problems(made, tokenizer, config)
    GenerationConfig(eos_token_id=[1, 4]).save_pretrained(tmp_path)
    assert task.row_problems(made, tokenizer, config) == []


def test_rows_that_are_cut_do_not_count_for_the_stop_token(tmp_path):
    """The longest rows were cut and lost it; the shorter ones decide."""
    task, tokenizer = TASKS["instruct"], save_tokenizer(tmp_path)
    cut, whole = {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}, {"input_ids": [7, 1], "labels": [7, 1]}
    assert task.row_problems(Rows(dataset=Dataset.from_list([cut, whole])), tokenizer, STOPS) == []
    bad = {"input_ids": [7, 8], "labels": [7, 8]}
    assert task.row_problems(Rows(dataset=Dataset.from_list([cut, bad])), tokenizer, STOPS)


class Freeze(TrainerCallback):
    """Puts trained values back after each step: gradients without movement."""

    def __init__(self, words):
        self.words = words

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {n: p.detach().clone() for n, p in model.named_parameters() if self.words in n}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if name in self.kept:
                parameter.data.copy_(self.kept[name])


def trainer_for(folder, tmp_path, **parts):
    return trainer_of(make_recipe(folder, **parts), tmp_path)


@pytest.mark.parametrize("name", ["nlora", "peft:lora", "full"])
def test_modules_that_do_not_move_are_named(folder, tmp_path, name):
    method = {"name": name} | ({} if name == "full" else {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    trainer = trainer_for(folder, tmp_path, method=method)
    trainer.callback_handler.callbacks.insert(0, Freeze("layers.1.self_attn.q_proj"))
    with pytest.raises(CoreLoraError, match=r"after 3 steps 1 of \d+ trained modules have not moved: .*1.self_attn.q_"):
        trainer.train()


def test_nothing_moving_is_said_so(folder, tmp_path):
    trainer = trainer_for(folder, tmp_path)
    trainer.callback_handler.callbacks.insert(0, Freeze(""))
    with pytest.raises(CoreLoraError, match="after 3 steps nothing has moved"):
        trainer.train()


@pytest.mark.parametrize("name", ["nlora", "peft:lora"])
def test_a_module_without_a_gradient_is_named(folder, tmp_path, name):
    trainer = trainer_for(folder, tmp_path, method={"name": name, "r": 4, "target_modules": ["q_proj", "v_proj"]})
    layer = trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    layer.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(CoreLoraError, match=r"no gradient.*layers.0.self_attn.v_proj"):
        trainer.train()


@pytest.mark.parametrize("warmup", [0, 0.5])
@pytest.mark.parametrize("name", ["nlora", "inttune", "lora", "dora", "vera", "full"])
def test_healthy_runs_pass(folder, tmp_path, name, warmup):
    """Zero starts and warm-ups that begin at a rate of zero are no mistakes."""
    method = {"name": name} | ({} if name == "full" else {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    trainer = trainer_for(folder, tmp_path, method=method, optim={"warmup": warmup})
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_module_that_was_never_called_is_no_mistake(folder):
    """An expert that no token was sent to."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    base.unused = torch.nn.Linear(3, 3)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "unused"], r=2))
    check = LearningCheck(1)
    check.on_train_begin(None, None, None, model=model)
    ids = torch.tensor([[8, 9, 10, 11]])
    model(input_ids=ids, labels=ids).loss.backward()
    check.on_pre_optimizer_step(None, None, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    check.on_step_end(None, None, None)
    assert not check.modules
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_nothing_trained_is_an_error(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model").requires_grad_(False)
    with pytest.raises(CoreLoraError, match="nothing of this model is trained"):
        LearningCheck().on_train_begin(None, None, None, model=model)


def test_adalora_moves_its_budget(folder, tmp_path):
    """PEFT's budget shrinks only where somebody calls it with the step."""
    method = {"name": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "target_modules": "all-linear"}
    trainer = trainer_for(folder, tmp_path, method=method, loop={"steps": 8})
    assert adalora_of(trainer.model) is not None
    trainer.train()
    ranks = trainer.model.peft_config["default"].rank_pattern
    kept = [sum(mask) for mask in ranks.values()]
    assert kept
    assert sum(kept) < 6 * len(kept)


def test_which_callbacks_watch(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert [type(c).__name__ for c in first_steps(base)] == ["LearningCheck"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("base_model.model.a.q_proj.lora_A.default.weight", "base_model.model.a.q_proj"),
        ("base_model.model.a.q_proj.vera_lambda_b.default", "base_model.model.a.q_proj"),
        ("base_model.model.classifier.modules_to_save.default.dense.weight", "base_model.model.classifier"),
        ("model.norm.weight", "model.norm"),
    ],
)
def test_owners(name, wanted):
    assert owner(name) == wanted
