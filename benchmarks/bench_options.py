"""The time of a step with each option, and on weights of other dtypes and widths, beside PyTorch's fused SGD
in the same dtype. `make bench` runs it; no time is asserted.

The cost of an option is the ratio of the two times, divided by that of the plain step in float32, which is
measured here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from comparison import Case, Comparison, checked_entrants, timed_hot_and_cold

from sparseopt_kernels.lab.bench.contestants import SGD
from sparseopt_kernels.lab.bench.network import Shape
from sparseopt_kernels.lab.timing import Rounds

SPARSITIES = (0.0, 0.9, 0.95, 0.99)
_WEIGHTS = 1 << 23
_ROUNDS, _COLD_ROUNDS = Rounds(20, warmup=2), Rounds(10, warmup=1)


class Options(NamedTuple):
    dtype: torch.dtype = torch.float32
    ours: Mapping[str, Any] = {}
    theirs: Mapping[str, Any] = {}


_OPTIONS = {
    "float32": Options(),
    "bfloat16": Options(torch.bfloat16),
    "float16": Options(torch.float16),
    "float64": Options(torch.float64),
    "nesterov": Options(ours={"nesterov": True}, theirs={"nesterov": True}),
    # Small, because the gradients are the same in each step and the weights would soon be infinite.
    "HAM": Options(ours={"ham_alpha": 1e-3}),
    "max_grad_norm": Options(ours={"max_grad_norm": 1.0}, theirs={"max_grad_norm": 1.0}),
}
_SHAPES: dict[str, Shape] = {
    "one row": (1, _WEIGHTS),
    **{f"rows of {columns} columns": (_WEIGHTS // columns, columns) for columns in (27, 147, 576, 2048)},
}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", _OPTIONS)
def bench_option(record_step: Callable[[Comparison], None], name: str, sparsity: float) -> None:
    dtype, ours, theirs = _OPTIONS[name]
    case = Case(f"2 layers of 4096x2048, {name}", [(4096, 2048)] * 2, sparsity, dtype, ours)
    found = checked_entrants(case, [[partial(make, **theirs) for make in SGD]])
    for comparison in timed_hot_and_cold(case, found, _ROUNDS, _COLD_ROUNDS):
        record_step(comparison)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", _SHAPES)
def bench_shape(record_step: Callable[[Comparison], None], name: str, sparsity: float) -> None:
    case = Case(f"8 million weights, {name}", [_SHAPES[name]], sparsity)
    for comparison in timed_hot_and_cold(case, checked_entrants(case, [SGD]), _ROUNDS, _COLD_ROUNDS):
        record_step(comparison)
