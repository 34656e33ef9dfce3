"""The ranks of a run under ``torchrun``: joining the process group, splitting batches, and all that is
reduced beside the gradients, which ``DistributedDataParallel`` reduces. Without torchrun there is one rank.
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
    """Tell if torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the process group of torchrun's ranks until the block ends; do nothing without torchrun."""
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
    """Return the rank of this process. Only rank 0 writes files and prints."""
    return dist.get_rank() if _is_joined() else 0


def ranks() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if _is_joined() else 1


def wait_for_all() -> None:
    """Wait until every rank has called this."""
    if _is_joined():
        dist.barrier()


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
