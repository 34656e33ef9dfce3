"""Ranks that are threads of one process: some collectives of ``sharding.Shards``, without gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadShards:
    """Stands for ``Shards`` on one of the threads."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._board, self._barrier = rank, board, barrier

    def device(self) -> torch.device:
        return torch.device("cpu")

    def integers(self, numbers: Any) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64)

    def sums(self, numbers: Tensor) -> Tensor:
        return torch.stack(self._of_each(numbers)).sum(0)

    def before(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        of_each = torch.stack(self._of_each(numbers))
        return of_each[: self._rank].sum(0), of_each.sum(0)

    def _of_each(self, numbers: Tensor) -> list[Tensor]:
        self._board[self._rank] = numbers.clone()
        self._barrier.wait(timeout=60)
        found = [*self._board]
        self._barrier.wait(timeout=60)
        return found


def on_threads(count: int, call: Callable[[int, ThreadShards], T]) -> list[T]:
    """Return what ``call(rank, shards)`` returns on each of so many ranks."""
    barrier, board = threading.Barrier(count), [None] * count
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = call(rank, ThreadShards(rank, board, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
