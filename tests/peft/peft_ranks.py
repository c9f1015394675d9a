"""Two gloo processes on a CPU: `torchrun --nproc-per-node=2 peft_ranks.py FOLDER TASK:METHOD ...`. The first writes."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from peft_models import config, ids, layers, llama, loss_of
from torch import nn

STEPS, LR = 3, 1e-2


def _model(method: str) -> nn.Module:
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, config(method, sampling="random"))


def _train(model: nn.Module, rank: int, world: int) -> list[float]:
    """SGD on a batch of four that is shared out over the ranks; the mean loss before each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    losses = []
    for step in range(STEPS):
        x = ids(4, seed=step).chunk(world)[rank]
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def alone(method: str) -> tuple[list[float], dict]:
    """One process: what the others must follow."""
    model = _model(method)
    losses = _train(model, 0, 1)
    return losses, {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}


def ddp(model: nn.Module) -> nn.Module:
    """DistributedDataParallel, with a check of what it leaves out of its broadcast."""
    frozen = {
        f"{k}.{n}"
        for k, m in model.named_modules()
        if m in layers(model)
        for n, _ in m.named_buffers()
        if n.startswith("corelora_")
    }
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert frozen
    assert frozen <= set(wrapped.parameters_to_ignore)
    broadcast = {id(b) for b in wrapped.modules_buffers}
    ours = {id(b) for m in layers(model) for n, b in m.named_buffers() if n.startswith("corelora_")}
    assert not broadcast & ours
    return wrapped


def fsdp2(model: nn.Module) -> nn.Module:
    """fully_shard on each decoder layer and on the whole."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    """FullyShardedDataParallel with PEFT's wrapping rule: decoder layers, and each trained factor by itself."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and weight is not None and weight.requires_grad

    rules = [
        partial(lambda_auto_wrap_policy, lambda_fn=leaf),
        partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
    ]
    policy = partial(_or_policy, policies=rules)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def _state(task: str, model: nn.Module) -> dict:
    """The adapter's state as PEFT saves it, gathered from the shards."""
    if task == "fsdp1":
        from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            full = model.state_dict()
        return get_peft_model_state_dict(model.module, state_dict=full)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    inner = model.module if task == "ddp" else model
    full = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True))
    return get_peft_model_state_dict(inner, state_dict=full)


def _main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    for case in cases:
        task, method = case.split(":")
        model = globals()[task](_model(method))
        losses = _train(model, rank, 2)
        state = _state(task, model)
        if rank == 0:
            torch.save((losses, state), Path(folder) / f"{task}-{method}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
