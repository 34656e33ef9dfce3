"""The number of PyTorch's CPU threads within a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def pytorch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use ``count`` CPU threads until the block ends."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)
