"""A model whose parameters are sharded over all ranks by ``fully_shard``, and its state."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from ...masks.mapping import Masks
from ...sharding import local_part
from . import distributed
from .errors import TrainingError


def shard(model: nn.Module, masks: Masks, device: torch.device) -> None:
    """Shard the parameters over all ranks: those of each child with a mask by themselves, so that one child
    at a time is gathered.

    Raises:
        TrainingError: this PyTorch does not average the gradients.
    """
    mesh = init_device_mesh(device.type, (distributed.ranks(),))
    _check_average(mesh, device)
    masked = set(masks)
    for child in model.children():
        if not masked.isdisjoint(child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _check_average(mesh: DeviceMesh, device: torch.device) -> None:
    """Raise ``TrainingError`` unless gradients are averaged: with gloo, some versions of PyTorch add them up
    (github.com/pytorch/pytorch/issues/162338)."""
    one = nn.Linear(1, mesh.size(), bias=False, device=device)
    fully_shard(one, mesh=mesh)
    try:
        one(torch.ones(1, 1, device=device)).sum().backward()
        what_it_does = "adds them up"
        if bool((local_part(cast(Tensor, one.weight.grad)) == 1).all()):
            return
    except RuntimeError as error:  # an older gloo has no average
        what_it_does = str(error).splitlines()[0]
    raise TrainingError(
        f"PyTorch {torch.__version__} does not average gradients of sharded parameters on these devices "
        f"({what_it_does}): use --parallel ddp, or a newer PyTorch"
    )


def sharded_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return this rank's part of the state, for ``torch.distributed.checkpoint``."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def load_sharded_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state that has the form of :func:`sharded_state`."""
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Return the model's ``state_dict`` with whole tensors on rank 0, and an empty one on the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
