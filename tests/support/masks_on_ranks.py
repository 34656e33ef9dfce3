"""A program for each of three ranks: runs all cases, and puts down the error of each, or nothing.

python masks_on_ranks.py FOLDER RANKS RANK
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparseopt_kernels import GMP, SET, Masks, RigL, sparsify


def model_and_masks(seed: int = 0) -> tuple[nn.Sequential, Masks]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 6))
    return model, sparsify(model, 0.5, seed=seed)


def gradients(masks: Masks, step: int = 0) -> None:
    numbers = torch.Generator().manual_seed(step)
    for parameter in masks:
        parameter.grad = torch.randn(parameter.shape, generator=numbers)


def steps(dst: Any, masks: Masks, count: int) -> None:
    for step in range(count):
        gradients(masks, step)
        dst.step()


def equal(rank: int) -> None:
    for make in (SET, RigL):
        _, masks = model_and_masks()
        steps(make(masks, 0.5, 2, stop_at=math.inf), masks, 6)
    _, masks = model_and_masks()
    steps(GMP(masks, {"0": 0.9}, 2, stop_at=5), masks, 6)


def changed_on_rank_0(rank: int) -> None:
    _, masks = model_and_masks()
    dst = RigL(masks, 0.5, 3, stop_at=math.inf)
    steps(dst, masks, 2)
    if rank == 0:
        mask = masks[masks.named()["2.weight"]]
        mask[0, mask[0].nonzero()[0]] = False
    gradients(masks)
    dst.step()


def changed_in_between(rank: int) -> None:
    """It is noticed in the step of the update, not before."""
    _, masks = model_and_masks()
    dst = SET(masks, 0.5, 3, stop_at=math.inf)
    steps(dst, masks, 1)
    if rank == 1:
        masks[masks.named()["0.weight"]].logical_not_()
    steps(dst, masks, 1)
    dst.step()


def hidden_by_ddp(rank: int) -> None:
    model, masks = model_and_masks()
    dst = RigL(masks, 0.5, 2, stop_at=math.inf)
    wrapped = DistributedDataParallel(model)
    for step in range(2):
        wrapped(torch.ones(4, 8)).square().sum().backward()
        if rank == 0 and step == 1:
            masks[masks.named()["0.weight"]][:, ::2] = False
        dst.step()


def not_finite_on_rank_1(rank: int) -> None:
    _, masks = model_and_masks()
    dst = RigL(masks, 0.5, 2, stop_at=math.inf)
    steps(dst, masks, 1)
    gradients(masks, 1)
    if rank == 1:
        masks.named()["0.weight"].grad[0, 0] = math.inf  # type: ignore[index]
    dst.step()


def not_finite_on_any(rank: int) -> None:
    _, masks = model_and_masks()
    dst = RigL(masks, 0.5, 2, stop_at=math.inf)
    for step in range(5):
        gradients(masks, step)
        if step == 1:
            masks.named()["0.weight"].grad.fill_(math.nan)  # type: ignore[union-attr]
        dst.step()
        assert dst.updated == (step in (2, 3))


def postponed_over_a_change(rank: int) -> None:
    """A postponed update is compared as well."""
    _, masks = model_and_masks()
    dst = RigL(masks, 0.5, 2, stop_at=math.inf)
    steps(dst, masks, 1)
    masks.named()["2.weight"].grad.fill_(math.nan)  # type: ignore[union-attr]
    if rank == 2:
        masks[masks.named()["2.weight"]].logical_not_()
    dst.step()


def other_clock(rank: int) -> None:
    _, masks = model_and_masks()
    dst = SET(masks, 0.5, 100, stop_at=math.inf)
    state = dst.state_dict()
    dst.load_state_dict({**state, "step": 41 if rank == 1 else 42})
    dst.step()


def other_settings(rank: int) -> None:
    _, masks = model_and_masks()
    SET(masks, 0.5, 100, stop_at=math.inf, seed=rank).step()


def other_masks_from_the_start(rank: int) -> None:
    _, masks = model_and_masks(seed=rank)
    SET(masks, 0.5, 100, stop_at=math.inf).step()


def an_error_on_rank_1(rank: int) -> None:
    """The others hear of it, and do not wait for it."""
    _, masks = model_and_masks()
    dst = RigL(masks, 0.5, 2, stop_at=math.inf)
    steps(dst, masks, 1)
    if rank == 1:
        for parameter in masks:
            parameter.grad = None
    dst.step()


def not_compared(rank: int) -> None:
    _, masks = model_and_masks(seed=rank)
    dst = SET(masks, 0.5, 2, stop_at=math.inf, process_group=None, seed=rank)
    steps(dst, masks, 4 + rank)
    assert dst.updated == ((4 + rank) % 2 == 0)


def of_two_ranks(rank: int) -> None:
    """Rank 2 differs, and is not asked."""
    group = dist.new_group([0, 1])
    _, masks = model_and_masks(seed=rank // 2)
    dst = SET(masks, 0.5, 2, stop_at=math.inf, process_group=group)
    assert not any("group" in key for key in dst.state_dict())
    steps(dst, masks, 3)
    if rank == 1:
        masks[masks.named()["0.weight"]].logical_not_()
    dst.step()


def no_update_due(rank: int) -> None:
    """One rank alone can make such steps."""
    _, masks = model_and_masks()
    dst = SET(masks, 0.5, 100, stop_at=math.inf)
    dst.step()
    if rank == 0:
        steps(dst, masks, 50)


def of_a_copy(rank: int) -> None:
    _, masks = model_and_masks()
    dst = RigL(masks, 0.5, 2, stop_at=math.inf)
    for copied, again in (copy.deepcopy((masks, dst)), pickle.loads(pickle.dumps((masks, dst)))):
        steps(again, copied, 3)
    if rank == 0:
        copied[copied.named()["0.weight"]].logical_not_()
    again.step()


CASES: list[Callable[[int], None]] = [
    equal,
    changed_on_rank_0,
    changed_in_between,
    hidden_by_ddp,
    not_finite_on_rank_1,
    not_finite_on_any,
    postponed_over_a_change,
    other_clock,
    other_settings,
    other_masks_from_the_start,
    an_error_on_rank_1,
    not_compared,
    of_two_ranks,
    no_update_due,
    of_a_copy,
]


def main(folder: Path, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/meeting", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, timeout=patience, rank=rank, world_size=ranks)
    errors = {}
    for case in CASES:
        try:
            case(rank)
            errors[case.__name__] = ""
        except RuntimeError as error:
            errors[case.__name__] = str(error)
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
