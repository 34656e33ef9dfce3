"""The ranks of a run under ``torchrun``: joining the process group, splitting batches, and all that is sent
beside the gradients and the parts of parameters, which PyTorch's engines send. Without torchrun there is one
rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import TrainingError

_T = TypeVar("_T")


def launched() -> bool:
    """Tell if torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the process group of torchrun's ranks until the block ends; do nothing without torchrun.

    Raises:
        TrainingError: torchrun has started the ranks again, after one of them had ended.
    """
    if not launched():
        yield
        return
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        raise TrainingError(
            "torchrun has started the ranks again, which would begin from the start: leave --max-restarts out"
        )
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(local_device(device))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process. Only rank 0 writes files and prints."""
    return int(os.environ["RANK"]) if launched() else 0


def ranks() -> int:
    """Return the number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def from_first(make: Callable[[], _T]) -> _T:
    """Let rank 0 alone do something, and return its result on all ranks, or raise its ``TrainingError``."""
    if not _is_joined():
        return make()
    answer: list[Any] = [None]
    if rank() == 0:
        try:
            answer = [make()]
        except TrainingError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], TrainingError):
        raise answer[0]
    result: _T = answer[0]
    return result


def local_device(device: str) -> torch.device:
    """Return the device of this rank; for ``"cuda"``, the GPU with its local rank."""
    if device == "cuda" and launched():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


def share_of(batch: Tensor) -> Tensor:
    """Return this rank's part of a batch ``(B,)``. Parts differ in size by at most one."""
    return batch.tensor_split(ranks())[rank()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; the result has the same bits on every rank."""
    if _is_joined():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Average the running means and variances of batch normalisation over the ranks.

    Each rank normalises by its own part of a batch, so that without this the ranks would test different
    networks.
    """
    if not _is_joined():
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= ranks()


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()
