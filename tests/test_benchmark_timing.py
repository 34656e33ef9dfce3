"""How the benchmarks time: whose turn it is, what is counted, who is let in. No times are looked at."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import comparison
import contestants
import networks
from comparison import Case, Maker
from contestants import Contestant, Network

from sparseopt_kernels.timing import (
    CpuTimer,
    Rounds,
    Summary,
    Timing,
    Turn,
    copied_gb_per_s,
    copying,
    take_turns,
)


class Counter:
    """A timer whose every millisecond is one call of it."""

    def __init__(self) -> None:
        self.calls, self.busy = 0, list[float]()

    def __call__(self, step: Callable[[], object], busy_ms: float) -> Timing:
        step()
        self.calls += 1
        self.busy.append(busy_ms)
        return Timing(float(self.calls), 10.0 * self.calls)


def test_contestants_take_turns_in_each_round() -> None:
    seen: list[str] = []

    def turn(name: str, steps: int = 1) -> Turn:
        return Turn(lambda: seen.append(name), lambda: seen.append(f"prepare {name}"), steps)

    take_turns({"a": turn("a"), "b": turn("b", steps=3)}, Counter(), Rounds(19, warmup=1))
    a, b = ["prepare a", "a"], ["prepare b", "b", "b", "b"]
    rounds = [seen[i : i + 6] for i in range(0, len(seen), 6)]
    assert len(rounds) == 20
    # In random order: whoever comes after another finds its caches as that one left them.
    assert 3 < rounds.count(a + b) < 17
    assert rounds.count(a + b) + rounds.count(b + a) == 20


def test_warmup_is_not_counted_and_times_are_those_of_one_step() -> None:
    for steps in (1, 2):
        found = take_turns({"a": Turn(lambda: None, steps=steps)}, Counter(), Rounds(11, warmup=2))
        # Calls are 3, 4, ..., 13 after the warm-up.
        want = [number / steps for number in (5.0, 8.0, 11.0, 80.0)]
        assert list(found["a"]) == pytest.approx([*want, 11])


def test_a_device_is_busy_for_twice_what_the_host_needs() -> None:
    timer = Counter()
    take_turns({"a": Turn(lambda: None)}, timer, Rounds(3, warmup=1))
    assert timer.busy == [10.0, 20.0, 30.0, 40.0]  # medians of 10; 10, 20; 10, 20, 30


def test_rounds_end_when_time_is_up_but_not_before_there_are_enough() -> None:
    timer = Counter()
    found = take_turns(
        {"a": Turn(lambda: None)}, timer, Rounds(50, warmup=2, fewest=4), lambda: timer.calls > 2
    )
    assert found["a"].rounds == 4
    found = take_turns({"a": Turn(lambda: None)}, timer, Rounds(50, warmup=2, fewest=4), lambda: False)
    assert found["a"].rounds == 50


def test_the_timer_of_a_cpu() -> None:
    timing = CpuTimer()(lambda: time.sleep(0.01))
    assert timing.device_ms == timing.host_ms >= 10


def test_the_bandwidth_of_a_copy_counts_reads_and_writes() -> None:
    turn = copying(4000)
    assert torch.equal(turn.step(), turn.step())  # type: ignore[arg-type]
    assert turn.step().nbytes == 4000  # type: ignore[attr-defined]
    assert copied_gb_per_s(10**9, Summary(1.0, 20.0, 30.0, 20.0, 9)) == pytest.approx(100.0)


SHAPES = [(8, 3, 3, 3), (8,), (16, 40)]
SMALL = Case("small", SHAPES, 0.5)


def test_a_comparison_of_steps_on_the_cpu() -> None:
    rivals: list[Maker] = [contestants.sgd_fused, contestants.eager_chain, contestants.tuned_chain]
    found = comparison.timed(SMALL, comparison.checked_entrants(SMALL, rivals), Rounds(3, warmup=1), steps=2)
    assert list(found.times) == ["sparseopt", "sgd fused, no mask", "eager chain", "eager chain, tuned"]
    assert {times.rounds for times in found.times.values()} == {3}
    assert (found.network, found.sparsity, found.weights) == ("small", 0.5, 8 * 27 + 8 + 16 * 40)
    assert 0 < found.floor_bytes < 20 * found.weights + found.weights
    assert found.copy_gb_per_s > 0


def test_a_comparison_ends_when_its_seconds_are_over() -> None:
    found = comparison.timed(
        SMALL, comparison.entrants(SMALL, []), Rounds(50, warmup=1, fewest=4), seconds=0.0
    )
    assert found.times["sparseopt"].rounds == 4


def test_contestants_share_neither_weights_nor_gradients() -> None:
    found = comparison.entrants(SMALL, [contestants.sgd_fused, contestants.tuned_chain])
    parameters = [p for contestant in found for p in contestant.network.parameters]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 2 * 3 * len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"ham_alpha": 1e-3}, {"max_grad_norm": 1.0}], ids=str
)
def test_every_option_agrees_with_the_reference(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case("small", SHAPES, 0.5, dtype, options)
    [ours] = comparison.checked_entrants(case, [])
    assert {p.dtype for p in ours.network.parameters} == {dtype}
    plain = contestants.reference_weights(Case("small", SHAPES, 0.5, dtype).make())
    same = all(map(torch.equal, ours.network.parameters, plain))
    assert not (options and same), "the option had no effect"


def test_who_disagrees_with_the_reference_is_not_timed() -> None:
    def disagreeing(network: Network) -> Contestant:
        contestant = contestants.sparseopt(network)
        with torch.no_grad():
            network.parameters[0].mul_(1.01)
        return contestant

    with pytest.raises(AssertionError, match="not close"):
        comparison.checked_entrants(SMALL, [disagreeing])


def test_the_rival_of_a_limited_norm_limits_it_too() -> None:
    network = SMALL.make()
    rival = contestants.sgd_fused(network.copy(), max_grad_norm=1.0)
    rival.step()
    gradients = [p.grad for p in rival.network.parameters if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients) == pytest.approx(1.0, rel=1e-4)
    assert torch.nn.utils.get_total_norm(network.gradients) > 10  # they are the others', too


@pytest.mark.parametrize("weights", [1, 3, 10, 31, 10**4, 3162278, 10**8])
def test_a_nearly_square_layer(weights: int) -> None:
    rows, columns = networks.nearly_square(weights)
    assert rows <= columns <= max(3, 1.1 * rows + 3)
    assert 0.85 * weights < rows * columns <= weights
