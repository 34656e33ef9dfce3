"""A model whose parameters are sharded over all ranks by ``fully_shard``, and its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from ...masks.mapping import Masks
from . import distributed


def shard(model: nn.Module, masks: Masks, device: torch.device) -> None:
    """Shard the parameters over all ranks: those of each child with a mask by themselves, so that one child
    at a time is gathered."""
    mesh = init_device_mesh(device.type, (distributed.ranks(),))
    masked = set(masks)
    for child in model.children():
        if not masked.isdisjoint(child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


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
