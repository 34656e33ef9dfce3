"""A small network that is trained by one process, or by several that share its parameters (FSDP2).

Every rank sees the same batch, and rank 0 alone has a loss, times the number of ranks: the gradient that is
averaged is then that of one process, to the bit. The rows are uneven, and on 4 ranks some have none.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

import sparseopt_kernels as sk

SHAPE = (3, 8, 8)
CLASSES = 3


@dataclass(frozen=True)
class Case:
    """A training: what is done in it."""

    method: str = "static"
    steps: int = 24
    shard_first: bool = True
    """Whether ``fully_shard`` comes before ``sparsify``."""
    dtype: torch.dtype = torch.float32
    has_ties: bool = False
    """Whether many weights are equal, and stay so."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the optimizer."""
    sparsify: Mapping[str, Any] = field(default_factory=dict)
    fsdp: Callable[[nn.Sequential], Mapping[str, Any]] = lambda model: {}
    """The options of ``fully_shard``."""


METHODS: dict[str, Callable[[sk.Masks], Any]] = {
    "static": lambda masks: None,
    "changed by hand": lambda masks: None,
    "SET": lambda masks: sk.SET(masks, 0.3, 7, stop_at=math.inf),
    "RigL": lambda masks: sk.RigL(masks, 0.3, 7, stop_at=math.inf),
    "RigL corrected": lambda masks: sk.RigL(
        masks, 0.5, 5, stop_at=math.inf, regrow="corrected", skip_step=False
    ),
    "RigL, min_fan_in": lambda masks: sk.RigL(masks, 0.5, 5, stop_at=math.inf, min_fan_in=2),
    "SET, min_fan_in": lambda masks: sk.SET(masks, 0.5, 5, stop_at=math.inf, min_fan_in=1),
    "RigL of some layers": lambda masks: sk.RigL(
        masks.subset(p for name, p in masks.named().items() if name != "9.weight"), 0.3, 7, stop_at=math.inf
    ),
    "GMP": lambda masks: sk.GMP(masks, 0.95, update_every=5, stop_at=20),
}

CASES = {
    "static": Case(steps=200),
    "SET": Case("SET", steps=200),
    "RigL": Case("RigL", steps=200, shard_first=False),
    "RigL corrected": Case("RigL corrected", steps=200),
    "RigL, min_fan_in": Case("RigL, min_fan_in", sparsify={"min_fan_in": 1}),
    "SET, min_fan_in": Case("SET, min_fan_in", shard_first=False),
    "GMP": Case("GMP", steps=200),
    "changed by hand": Case("changed by hand", options={"nesterov": True}),
    "norm": Case("changed by hand", options={"max_grad_norm": 0.5}),
    "norm over all positions, HAM": Case(
        "RigL",
        options={"max_grad_norm": 0.5, "max_grad_norm_over": "dense", "ham_alpha": 0.1, "ham_beta": 0.1},
    ),
    "reference, D": Case(
        "SET", options={"backend": "reference", "correction": "unnormalized", "dampening": 0.1}
    ),
    "masked SGD without momentum": Case("RigL", options={"correction": "none", "momentum": 0.0}),
    "float64": Case("RigL corrected", dtype=torch.float64),
    "bfloat16": Case("RigL", dtype=torch.bfloat16),
    "ties": Case("RigL", has_ties=True, options={"lr": 0.0}),
    "CPU offload": Case("RigL", fsdp=lambda model: {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "ignored parameters": Case(
        "RigL of some layers",
        options={"max_grad_norm": 0.5},
        fsdp=lambda model: {"ignored_params": {*model[9].parameters(), model[0].bias}},
    ),
    "largest weights": Case(sparsify={"init": "magnitude", "min_fan_in": 1}, steps=10),
}


def make_network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 36, 30),
        nn.LayerNorm(30),
        nn.ReLU(),
        nn.Linear(30, 10),
        nn.ReLU(),
        nn.Linear(10, CLASSES),
    ).to(dtype)


def train(case: Case, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Train, on all ranks of the mesh if there is one. Return all numbers that there are at the end."""
    torch.set_num_threads(1)
    model, masks = make_network(case.dtype), None
    if case.has_ties:
        for p in model.parameters():
            p.data = (p.data * 50).round() / 50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not case.shard_first:
            masks = sk.sparsify(model, 0.85, seed=5, **case.sparsify)
        if mesh is not None:
            fully_shard(model, mesh=mesh, **case.fsdp(model))
        masks = sk.sparsify(model, 0.85, seed=5, **case.sparsify) if masks is None else masks
        options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **case.options}
        optimizer = sk.SparseOpt(model.parameters(), masks=masks, **options)
        method = METHODS[case.method](masks)
        for step in range(case.steps):
            backward(model, mesh, step)
            if method is not None:
                method.step()
            if case.method == "changed by hand" and step % 8 == 5:
                change_by_hand(masks, step)
            optimizer.step()
    return {
        "parameters": [whole(p.detach()) for p in model.parameters()],
        "buffers": [whole(own["momentum_buffer"]) for own in optimizer.state.values() if own],
        "masks": [whole(mask) for mask in masks.values()],
        "numbers": (masks.nnz(), masks.sparsity(), masks.dead_share(), str(masks)),
        "method": None if method is None else told(method),
    }


def told(method: Any) -> dict[str, Any]:
    """What a method says of itself, as what can be saved."""
    state = method.state_dict()
    return {
        "explored": [whole(union) for union in state.pop("explored")],
        "state": state,
        "rates": method.exploration_rates(),
        "table": str(method),
        "last update": {name: tuple(update) for name, update in method.last_update.items()},
    }


def backward(model: nn.Module, mesh: DeviceMesh | None, step: int) -> None:
    """Give all parameters gradients: those of one batch, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    images = torch.randn(16, *SHAPE, generator=generator).to(dtype)
    labels = torch.randint(0, CLASSES, (16,), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    share = 1 if mesh is None else mesh.size() if torch.distributed.get_rank() == 0 else 0
    (loss * share).backward()
    if mesh is not None:
        for p in model.parameters():
            if not hasattr(p, "device_mesh") and p.grad is not None:  # not averaged by FSDP
                torch.distributed.all_reduce(p.grad)
                p.grad /= mesh.size()


def change_by_hand(masks: sk.Masks, step: int) -> None:
    """Change every 13th weight's place in each mask, on all ranks."""
    for mask in masks.values():
        changed = whole(mask).clone()
        changed.view(-1)[step::13] ^= True
        part(mask).copy_(part(sharded_like(changed, mask)))


def sharded_like(tensor: Tensor, other: Any) -> Tensor:
    if not hasattr(other, "device_mesh"):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def part(tensor: Any) -> Tensor:
    found: Tensor = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
    return found


def support_path() -> str:
    return os.path.dirname(os.path.abspath(__file__))


def train_from(
    checkpoint: str | None,
    steps: int,
    mesh: DeviceMesh | None = None,
    *,
    save: Mapping[int, str] | None = None,
    save_while_training: Mapping[int, str] | None = None,
    plain: str | None = None,
    load_plain: str | None = None,
) -> dict[str, Any]:
    """Train by RigL, from a checkpoint of ``torch.distributed.checkpoint`` if there is one.

    Args:
        checkpoint: its folder.
        steps: the number of steps.
        mesh: the ranks; None: one process, without a process group.
        save: the folders of checkpoints, by the number of steps before them.
        save_while_training: those of checkpoints by ``async_save``, which end after the training.
        plain: a file for a checkpoint by ``torch.save`` at the end.
        load_plain: such a file, which the training begins with.
    """
    torch.set_num_threads(1)
    model = make_network()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    masks = sk.sparsify(model, 0.85, seed=5 if checkpoint is None and load_plain is None else 6)
    optimizer = sk.SparseOpt(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, masks=masks)
    method = sk.RigL(masks, 0.3, 4, stop_at=math.inf)
    if checkpoint is not None:
        load(checkpoint, model, optimizer, method)
    if load_plain is not None:
        state = torch.load(load_plain)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, state["model"], options=options)
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
    saving, group = [], torch.distributed.new_group(backend="gloo") if save_while_training else None
    for _ in range(steps):
        step = method.state_dict()["step"]
        if save_while_training and step in save_while_training:
            folder = save_while_training[step]
            state = states(model, optimizer, method)
            saving.append(dcp.async_save(state, checkpoint_id=folder, process_group=group))
        if save is not None and step in save:
            dcp.save(states(model, optimizer, method), checkpoint_id=save[step])
        backward(model, mesh, step)
        method.step()
        optimizer.step()
    for saved in saving:
        saved.result()  # type: ignore[union-attr]
    if plain is not None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "method": method.state_dict(),
        }
        torch.save(state, plain)
    return {
        "parameters": [whole(p.detach()) for p in model.parameters()],
        "buffers": [whole(optimizer.state[p]["momentum_buffer"]) for p in model.parameters()],
        "masks": [whole(mask) for mask in masks.values()],
        "explored": [whole(union) for union in method.state_dict()["explored"]],
    }


def states(model: nn.Module, optimizer: torch.optim.Optimizer, method: Any) -> dict[str, Any]:
    """What is saved; the tensors are those that a checkpoint is loaded into."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "method": method.state_dict()}


def load(checkpoint: str, model: nn.Module, optimizer: torch.optim.Optimizer, method: Any) -> None:
    state = states(model, optimizer, method)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    method.load_state_dict(state["method"])
