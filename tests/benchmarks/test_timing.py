"""How the benchmarks time: whose turn it is, what is counted, who is let in. No times are looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comparison
import last_cache
import networks
import pytest
import torch
from comparison import Case
from last_cache import ColdCpuTimer, last_cache_bytes

from sparseopt_kernels.lab.bench.contestants import (
    SGD,
    TUNED_CHAIN,
    Contestant,
    Maker,
    eager_chain,
    sparseopt,
)
from sparseopt_kernels.lab.bench.network import Network
from sparseopt_kernels.lab.timing import (
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


def test_the_last_cache_is_the_largest(tmp_path: Path) -> None:
    for level, size in enumerate(("48K", "32K", "2M", "491520K")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(f"{size}\n")
    assert last_cache_bytes(tmp_path) == 491520 << 10


@pytest.mark.parametrize("size", [None, "", "0K", "large"])
def test_a_system_may_not_tell_the_size_of_its_caches(tmp_path: Path, size: str | None) -> None:
    if size is not None:
        (tmp_path / "index3").mkdir()
        (tmp_path / "index3" / "size").write_text(size)
    assert last_cache_bytes(tmp_path) is None


def test_a_cold_timer_reads_twice_the_cache_or_much_if_its_size_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ColdCpuTimer(1 << 20).buffer.nbytes == 2 << 20
    monkeypatch.setattr(last_cache, "_IF_UNKNOWN", 3 << 20)
    assert ColdCpuTimer(None).buffer.nbytes == 3 << 20


def test_a_cold_timer_empties_the_caches_before_each_turn_and_does_not_count_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    class Buffer:
        def sum(self) -> None:
            seen.append("emptied")

    timer = ColdCpuTimer(1 << 10)
    monkeypatch.setattr(timer, "buffer", Buffer())
    times = iter([1.0, 3.0, 10.0, 14.0])

    def clock() -> float:
        seen.append("clock")
        return next(times)

    monkeypatch.setattr(time, "perf_counter", clock)
    timings = [timer(lambda: seen.append("step")) for _ in range(2)]
    assert seen == ["emptied", "clock", "step", "clock"] * 2
    assert [timing.device_ms for timing in timings] == [2000.0, 4000.0]


def test_the_bandwidth_of_a_copy_counts_reads_and_writes() -> None:
    turn = copying(4000)
    assert torch.equal(turn.step(), turn.step())  # type: ignore[arg-type]
    assert turn.step().nbytes == 4000  # type: ignore[attr-defined]
    assert copied_gb_per_s(10**9, Summary(1.0, 20.0, 30.0, 20.0, 9)) == pytest.approx(100.0)


SHAPES = [(8, 3, 3, 3), (8,), (16, 40)]
SMALL = Case("small", SHAPES, 0.5)
HALVES = [torch.bfloat16, torch.float16]


def test_a_comparison_of_steps_on_the_cpu() -> None:
    found = comparison.timed(
        SMALL,
        comparison.checked_entrants(SMALL, [SGD, (eager_chain,), TUNED_CHAIN]),
        Rounds(3, warmup=1),
        steps=2,
    )
    assert list(found.times) == ["sparseopt", "sgd fused, no mask", "eager chain", "eager chain, tuned"]
    assert {times.rounds for times in found.times.values()} == {3}
    assert (found.network, found.sparsity, found.weights) == ("small", 0.5, 8 * 27 + 8 + 16 * 40)
    assert 0 < found.floor_bytes < 20 * found.weights + found.weights
    assert found.copy_gb_per_s > 0
    assert found.wrong == ()


def test_a_comparison_ends_when_its_seconds_are_over() -> None:
    entrants = comparison.checked_entrants(SMALL, [])
    found = comparison.timed(SMALL, entrants, Rounds(50, warmup=1, fewest=4), seconds=0.0)
    assert found.times["sparseopt"].rounds == 4


def test_steps_are_timed_with_hot_caches_and_with_cold_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    cold = Counter()
    monkeypatch.setattr(comparison, "cold_timer", lambda: cold)
    entrants = comparison.checked_entrants(SMALL, [SGD])
    found = list(comparison.timed_hot_and_cold(SMALL, entrants, Rounds(4, warmup=1), Rounds(3, warmup=2)))
    assert [each.cache for each in found] == ["hot", "cold"]
    assert [each.times["sparseopt"].rounds for each in found] == [4, 3]
    assert cold.calls == 5 * 3  # SparseOpt, its rival, and the copy


def test_contestants_share_neither_weights_nor_gradients() -> None:
    found = comparison.checked_entrants(SMALL, [SGD, TUNED_CHAIN]).right
    parameters = [p for contestant in found for p in contestant.network.parameters]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 2 * 3 * len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"ham_alpha": 1e-3}, {"max_grad_norm": 1.0}], ids=str
)
def test_every_option_agrees_with_the_reference(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case("small", SHAPES, 0.5, dtype, options)
    [ours] = comparison.checked_entrants(case, []).right
    assert {p.dtype for p in ours.network.parameters} == {dtype}
    plain = comparison.checked_entrants(Case("small", SHAPES, 0.5, dtype), []).right[0]
    same = all(map(torch.equal, ours.network.parameters, plain.network.parameters))
    assert not (options and same), "the option had no effect"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("make", [eager_chain, TUNED_CHAIN[1], SGD[1]], ids=["eager", "tuned", "sgd"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_what_has_no_fused_sgd_in_it_is_right(dtype: torch.dtype, make: Maker, sparsity: float) -> None:
    found = comparison.checked_entrants(Case("small", SHAPES, sparsity, dtype), [(make,)])
    assert found.wrong == []
    assert len(found.right) == 2


def test_sparseopt_that_is_wrong_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def disagreeing(network: Network, **options: Any) -> Contestant:
        contestant = sparseopt(network, **options)
        with torch.no_grad():
            network.parameters[0].mul_(1.01)
        return contestant

    monkeypatch.setattr(comparison, "sparseopt", disagreeing)
    with pytest.raises(AssertionError, match="SparseOpt has wrong results on small"):
        comparison.checked_entrants(SMALL, [])


def leaving_a_vector(make: Maker, size: int = 8) -> Maker:
    """A contestant that does not write the last elements of the largest parameter."""

    def broken(network: Network) -> Contestant:
        contestant = make(network)
        vector = network.parameters[-1].detach().view(-1)[-size:]
        kept, right_step = vector.clone(), contestant.step

        def step() -> None:
            right_step()
            vector.copy_(kept)

        return replace(contestant, name="broken", step=step)

    return broken


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("make", [SGD[1], eager_chain, TUNED_CHAIN[1]], ids=["sgd", "eager", "tuned"])
def test_a_rival_that_leaves_a_vector_unwritten_is_not_timed(dtype: torch.dtype, make: Maker) -> None:
    """With a mask that is all True: what is masked everywhere needs no write."""
    case = Case("small", SHAPES, 0.0, dtype)
    found = comparison.checked_entrants(case, [(leaving_a_vector(make), make)])
    assert found.wrong == ["broken"]
    assert len(found.right) == 2, "nobody stands in"
    result = comparison.timed(case, found, Rounds(2, warmup=1))
    assert result.wrong == ("broken",)
    assert "broken" not in result.times
    assert list(result.times) == [contestant.name for contestant in found.right]


def test_a_rival_without_a_stand_in_is_named_all_the_same() -> None:
    found = comparison.checked_entrants(SMALL, [(leaving_a_vector(SGD[1]),)])
    assert (found.wrong, len(found.right)) == (["broken"], 1)


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="the fault is one of PyTorch 2.13.0")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_fused_sgd_of_pytorch_2_13_is_wrong_in_halves(dtype: torch.dtype) -> None:
    """pytorch/pytorch#191763."""
    case = Case("small", [(64, 64)], 0.9, dtype)
    found = comparison.checked_entrants(case, [SGD, TUNED_CHAIN])
    assert found.wrong == ["sgd fused, no mask", "eager chain, tuned"]
    names = [contestant.name for contestant in found.right]
    assert names == ["sparseopt", "sgd foreach, no mask", "eager chain, tuned (sgd foreach)"]


@pytest.mark.parametrize("make", SGD, ids=["fused", "foreach"])
def test_the_rival_of_a_limited_norm_limits_it_too(make: Callable[..., Contestant]) -> None:
    network = SMALL.make()
    rival = partial(make, max_grad_norm=1.0)(network.copy())
    rival.step()
    gradients = [p.grad for p in rival.network.parameters if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients) == pytest.approx(1.0, rel=1e-4)
    assert torch.nn.utils.get_total_norm(network.gradients) > 10  # they are the others', too
    case = Case("small", SHAPES, 0.5, options={"max_grad_norm": 1.0})
    assert comparison.checked_entrants(case, [(partial(make, max_grad_norm=1.0),)]).wrong == []
    assert comparison.checked_entrants(case, [(make,)]).wrong == [rival.name]


@pytest.mark.parametrize("weights", [1, 3, 10, 31, 10**4, 3162278, 10**8])
def test_a_nearly_square_layer(weights: int) -> None:
    rows, columns = networks.nearly_square(weights)
    assert rows <= columns <= max(3, 1.1 * rows + 3)
    assert 0.85 * weights < rows * columns <= weights
