"""One process of several: python -m accelerate.commands.launch ... ranks_child.py FOLDER LAUNCH NAME ...

Trains FOLDER/NAME.yaml into FOLDER/LAUNCH/NAME for each name, on a CPU, and writes what it saw there to seen.json. For
NAME:again, what a finished run left is broken off at its last checkpoint (a copy goes to NAME-before), and train is
called once more.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from corelora.recipe import Recipe, load_recipe
from corelora.train import run

torch.set_num_threads(1)


def stand_in_for_gpus():
    """accelerate shards a model only where it sees GPUs; its code is the same on gloo and a CPU, so it is told so."""
    made = run.training_arguments

    def arguments(*args):
        settings = made(*args)
        assert settings.world_size == 2  # the processes have met
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return settings

    run.training_arguments = arguments


def without_shared_memory():
    """DeepSpeed compiles an operation of its own for sums between processes on a CPU, for a minute; gloo has them."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def watch(seen):
    """Note how the model is held when its training ends."""
    ran = run.run_trainer

    def run_trainer(trainer, *args):
        metrics = ran(trainer, *args)
        parameters = list(trainer.model_wrapped.parameters())
        shards = [isinstance(p, DTensor) or getattr(p, "ds_tensor", p).numel() < _size(p) for p in parameters]
        seen.update(processes=trainer.accelerator.num_processes, sharded=any(shards))
        return metrics

    run.run_trainer = run_trainer


def break_off(done):
    """Take a run's results and adapter away and damage its newest checkpoint; every process waits for that."""
    if PartialState().is_main_process:
        shutil.copytree(done, done.with_name(f"{done.name}-before"))
        (done / "results.json").unlink()
        shutil.rmtree(done / "adapter")
        newest = max((done / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        (newest / "trainer_state.json").write_text("{")
    PartialState().wait_for_everyone()


def _size(parameter):
    return getattr(parameter, "ds_numel", parameter.numel())


if __name__ == "__main__":
    folder, seen = Path(sys.argv[1]), {}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        stand_in_for_gpus()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        without_shared_memory()
    watch(seen)
    for asked in sys.argv[3:]:
        name, _, again = asked.partition(":")
        if again:
            break_off(folder / sys.argv[2] / name)
        recipe = load_recipe(Recipe, folder / f"{name}.yaml")
        run.train(recipe, folder / sys.argv[2] / name)
        if PartialState().is_main_process:
            (folder / sys.argv[2] / name / "seen.json").write_text(json.dumps(seen))
        unset_hf_deepspeed_config()  # else ZeRO-3 is on as long as this run's arguments live
