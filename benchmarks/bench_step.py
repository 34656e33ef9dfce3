"""The time of one optimizer step. `make bench` runs it; nothing about time is asserted.

The contestants take turns within one process, because machines are noisy and the noise lasts: each round
times one step of each. Before anything is timed, they must agree with the reference backend.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import contestants
import pytest
import torch
from contestants import Contestant, Network
from networks import LAYERS_4096X2048, RESNET20, Shape

SPARSITIES = (0.0, 0.5, 0.9, 0.95, 0.97, 0.99)


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def bench_large_layers(benchmark: Any, sparsity: float) -> None:
    rivals = [
        contestants.sgd_fused,
        contestants.eager_chain,
        contestants.compiled_chain,
        contestants.compiled_function,
    ]
    compare(benchmark, "4 layers of 4096x2048", LAYERS_4096X2048, sparsity, rivals, rounds=25, warmup=2)


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def bench_resnet20(benchmark: Any, sparsity: float, steps: int) -> None:
    """A small network: what counts is the cost of the call. One step at a time, caches hold what the
    others left there; of twenty in a row, nearly all find what the one before them left."""
    rivals = [contestants.sgd_fused]
    name = "ResNet-20, " + ("one step" if steps == 1 else f"{steps} steps in a row")
    compare(benchmark, name, RESNET20, sparsity, rivals, rounds=60, warmup=10, steps=steps)


def compare(
    benchmark: Any,
    name: str,
    shapes: list[Shape],
    sparsity: float,
    rivals: Sequence[Callable[[Network], Contestant]],
    rounds: int,
    warmup: int,
    steps: int = 1,
) -> None:
    """Time ``steps`` steps of SparseOpt with pytest-benchmark, and between its rounds as many of each
    rival."""
    torch._dynamo.reset()
    ours = contestants.sparseopt(Network.of_shapes(shapes, sparsity))
    others = [make(Network.of_shapes(shapes, sparsity)) for make in rivals]
    reference = contestants.sparseopt(Network.of_shapes(shapes, sparsity), backend="reference")
    check_agreement(ours, others, reference)
    del reference
    gc.collect()

    source = torch.randn(sum(p.numel() for p in ours.network.parameters))
    target = torch.empty_like(source)
    seconds: dict[str, list[float]] = {c.name: [] for c in others}
    copies: list[float] = []

    def others_turn() -> None:
        for contestant in others:
            contestant.prepare()
            seconds[contestant.name].append(timed(repeated(contestant.step, steps)))
        copies.append(timed(lambda: target.copy_(source)))

    benchmark.pedantic(repeated(ours.step, steps), setup=others_turn, rounds=rounds, warmup_rounds=warmup)
    # pytest-benchmark sees its own contestant only: the rest travels with the result.
    own = benchmark.stats.stats.data
    benchmark.extra_info.update(
        network=name,
        sparsity=sparsity,
        weights=ours.network.numel(),
        floor_bytes=ours.network.floor_bytes(line=64),
        copy_gb_per_s=2 * source.nbytes / median(copies[warmup:]) / 1e9,
        milliseconds={
            ours.name: [1e3 * s / steps for s in own],
            **{other: [1e3 * s / steps for s in taken[warmup:]] for other, taken in seconds.items()},
        },
    )


def repeated(function: Callable[[], object], times: int) -> Callable[[], object]:
    def call() -> None:
        for _ in range(times):
            function()

    return function if times == 1 else call


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def check_agreement(ours: Contestant, others: list[Contestant], reference: Contestant) -> None:
    """Two steps of everybody that computes the same thing end in the same weights."""
    same = [ours, reference, *(c for c in others if "no mask" not in c.name)]
    for _ in range(2):
        for contestant in (*same, *(c for c in others if c not in same)):
            contestant.prepare()
            contestant.step()
    for contestant in same:
        for p, q in zip(contestant.network.parameters, reference.network.parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
