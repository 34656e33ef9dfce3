"""The time of a step by size and sparsity: one layer of 1 to 10^8 weights, and 1 to 3162 small layers,
against PyTorch's fused SGD and the tuned chain. `make bench` runs it and draws a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from comparison import Case, Comparison, checked_entrants, timed, timed_hot_and_cold
from networks import nearly_square

from sparseopt_kernels.lab.bench.contestants import SGD, TUNED_CHAIN
from sparseopt_kernels.lab.bench.network import Shape
from sparseopt_kernels.lab.timing import Rounds

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99)
_SIZES = [round(10 ** (half / 2)) for half in range(17)]  # 1 to 10^8
_COUNTS = [round(10 ** (half / 2)) for half in range(8)]  # 1 to 3162
_ROUNDS, _SECONDS = Rounds(200, warmup=3, fewest=7), 0.3
_COLD_ROUNDS = Rounds(200, warmup=1, fewest=7)
_WORTH_COLD = 10**6  # weights: in float32 a step on them moves 20 MB, more than the caches of two cores hold


@pytest.mark.parametrize("weights", _SIZES)
def bench_one_layer(record_map: Callable[[Comparison], None], weights: int) -> None:
    _compare(record_map, "one layer", [nearly_square(weights)])


@pytest.mark.parametrize("count", _COUNTS)
def bench_small_layers(record_map: Callable[[Comparison], None], count: int) -> None:
    _compare(record_map, "layers of 32x32", [(32, 32)] * count)


def _compare(record_map: Callable[[Comparison], None], name: str, shapes: Sequence[Shape]) -> None:
    for sparsity in SPARSITIES:
        case = Case(name, shapes, sparsity)
        found = checked_entrants(case, [SGD, TUNED_CHAIN])
        if sum(map(math.prod, shapes)) < _WORTH_COLD:
            record_map(timed(case, found, _ROUNDS, seconds=_SECONDS))
            continue
        for comparison in timed_hot_and_cold(case, found, _ROUNDS, _COLD_ROUNDS, _SECONDS):
            record_map(comparison)
