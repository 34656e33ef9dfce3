"""The time of one optimizer step, by sparsity, of all contestants. `make bench` runs it; no time is asserted.

The report is made of rounds in which the contestants take turns. pytest-benchmark times SparseOpt's step once
more, alone, for its own options (``--benchmark-save``, ``--benchmark-compare``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import Case, Comparison, checked_entrants, timed, timed_hot_and_cold
from compiled_chains import compiled_chain, compiled_function
from networks import LAYERS_4096X2048, RESNET20

from sparseopt_kernels.lab.bench.contestants import SGD, TUNED_CHAIN, Maker, eager_chain
from sparseopt_kernels.lab.timing import Rounds

SPARSITIES = (0.0, 0.5, 0.9, 0.95, 0.97, 0.99)
RIVALS: tuple[tuple[Maker, ...], ...] = (
    SGD,
    TUNED_CHAIN,
    (eager_chain,),
    (compiled_chain,),
    (compiled_function,),
)
_LARGE, _SMALL = Rounds(15, warmup=2), Rounds(60, warmup=10)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def bench_large_layers(benchmark: Any, record_step: Callable[[Comparison], None], sparsity: float) -> None:
    torch._dynamo.reset()
    case = Case("4 layers of 4096x2048", LAYERS_4096X2048, sparsity)
    found = checked_entrants(case, RIVALS)
    for comparison in timed_hot_and_cold(case, found, _LARGE, _LARGE):
        record_step(comparison)
    benchmark.pedantic(found.right[0].step, rounds=_LARGE.timed, warmup_rounds=_LARGE.warmup)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def bench_resnet20(benchmark: Any, record_step: Callable[[Comparison], None], sparsity: float) -> None:
    """Time a small network, where the cost of the call dominates.

    A single step finds the caches as another contestant has left them; of twenty in a row, nearly all find
    their own data there.
    """
    torch._dynamo.reset()
    case = Case("ResNet-20", RESNET20, sparsity)
    found = checked_entrants(case, RIVALS)
    for steps, name in ((1, "ResNet-20, one step"), (20, "ResNet-20, 20 steps in a row")):
        record_step(timed(Case(name, RESNET20, sparsity), found, _SMALL, steps))
    benchmark.pedantic(found.right[0].step, iterations=20, rounds=_SMALL.timed, warmup_rounds=_SMALL.warmup)
