"""The time of one optimizer step. `make bench` runs it; nothing about time is asserted.

What is reported comes of rounds in which the contestants take turns. pytest-benchmark times SparseOpt's step
once more, alone: that is what its own options (``--benchmark-save``, ``--benchmark-compare``) are about.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import contestants
import pytest
import torch
from contestants import Contestant, Network, reference_weights
from cpu_report import THREADS, Comparison
from networks import LAYERS_4096X2048, RESNET20, Shape

from sparseopt_kernels.timing import CpuTimer, Rounds, copied_gb_per_s, copying, take_turns

SPARSITIES = (0.0, 0.5, 0.9, 0.95, 0.97, 0.99)
_CACHE_LINE = 64  # bytes


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def bench_large_layers(
    benchmark: Any, record_comparison: Callable[[Comparison], None], sparsity: float
) -> None:
    rivals = [
        contestants.sgd_fused,
        contestants.eager_chain,
        contestants.compiled_chain,
        contestants.compiled_function,
    ]
    rounds = Rounds(25, warmup=2)
    record_comparison(compare(benchmark, "4 layers of 4096x2048", LAYERS_4096X2048, sparsity, rivals, rounds))


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def bench_resnet20(
    benchmark: Any, record_comparison: Callable[[Comparison], None], sparsity: float, steps: int
) -> None:
    """A small network: what counts is the cost of the call. One step at a time, caches hold what the
    others left there; of twenty in a row, nearly all find what the one before them left."""
    name = "ResNet-20, " + ("one step" if steps == 1 else f"{steps} steps in a row")
    rivals, rounds = [contestants.sgd_fused], Rounds(60, warmup=10)
    record_comparison(compare(benchmark, name, RESNET20, sparsity, rivals, rounds, steps))


def compare(
    benchmark: Any,
    name: str,
    shapes: Sequence[Shape],
    sparsity: float,
    rivals: Sequence[Callable[[Network], Contestant]],
    rounds: Rounds,
    steps: int = 1,
) -> Comparison:
    """Let SparseOpt and its rivals take turns of ``steps`` steps, once they agree with the reference."""
    torch._dynamo.reset()
    ours, *others = [make(Network.of_shapes(shapes, sparsity)) for make in (contestants.sparseopt, *rivals)]
    want = reference_weights(Network.of_shapes(shapes, sparsity))
    for contestant in (ours, *others):
        contestant.warm_up()
        contestant.check(want)
    del want
    gc.collect()

    weights = sum(map(math.prod, shapes))
    turns = {contestant.name: contestant.turn(steps) for contestant in (ours, *others)}
    times = take_turns({**turns, "copy": copying(4 * weights)}, CpuTimer(), rounds)
    copy = times.pop("copy")
    benchmark.pedantic(ours.step, iterations=steps, rounds=rounds.timed, warmup_rounds=rounds.warmup)
    return Comparison(
        network=name,
        sparsity=sparsity,
        weights=weights,
        floor_bytes=ours.floor_bytes(_CACHE_LINE),
        copy_gb_per_s=copied_gb_per_s(4 * weights, copy),
        times=times,
    )
