"""The processes ("ranks") of a run under ``torchrun``: how they join, and what they exchange beside the
gradients, which are ``DistributedDataParallel``'s. Without torchrun there is one rank and nothing happens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def launched() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Be one of the ranks that torchrun has started, until the block ends."""
    if not launched():
        yield
        return
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(local_device(device))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process. Rank 0 alone writes files and speaks."""
    return dist.get_rank() if _is_joined() else 0


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _is_joined() else 1


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if _is_joined():
        dist.barrier()


def local_device(device: str) -> torch.device:
    """The device of this rank: of ``"cuda"``, the GPU of its number on this machine."""
    if device == "cuda" and launched():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


def share_of(batch: Tensor) -> Tensor:
    """The part of a batch ``(B,)`` that is this rank's. Parts differ in size by at most one."""
    return batch.tensor_split(ranks())[rank()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of what each rank gives, the same bits on every rank."""
    if _is_joined():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give every rank the mean of the ranks' running means and variances of batch normalisation.

    Each rank normalises by its own part of a batch, so without this every rank would test another network.
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
