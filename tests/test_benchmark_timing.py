"""How the benchmarks time: whose turn it is, what is counted, and what is written. No times are looked at."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_step
import contestants
import cpu_report
from contestants import Contestant, Network
from cpu_report import Comparison

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

    take_turns({"a": turn("a"), "b": turn("b", steps=3)}, Counter(), Rounds(2, warmup=1))
    assert seen == ["prepare a", "a", "prepare b", "b", "b", "b"] * 3


def test_warmup_is_not_counted_and_times_are_those_of_one_step() -> None:
    idle = Turn(lambda: None)
    found = take_turns({"a": idle, "b": idle._replace(steps=2)}, Counter(), Rounds(11, warmup=2))
    # The calls of "a" are 5, 7, ..., 25 after the warm-up, those of "b" 6, 8, ..., 26.
    assert found["a"] == pytest.approx(Summary(9.0, 15.0, 21.0, 150.0, 11))
    assert found["b"] == pytest.approx(Summary(5.0, 8.0, 11.0, 80.0, 11))


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


def compare(benchmark: Any, *rivals: Callable[[Network], Contestant], steps: int = 1) -> Comparison:
    return bench_step.compare(benchmark, "small", SHAPES, 0.5, rivals, Rounds(3, warmup=1), steps)


def test_a_comparison_of_steps_on_the_cpu() -> None:
    asked: list[dict[str, int]] = []
    benchmark = SimpleNamespace(pedantic=lambda step, **keywords: asked.append(keywords))
    found = compare(benchmark, contestants.sgd_fused, contestants.eager_chain, steps=2)
    assert asked == [{"iterations": 2, "rounds": 3, "warmup_rounds": 1}]
    assert list(found.times) == ["sparseopt", "sgd fused, no mask", "eager chain"]
    assert {times.rounds for times in found.times.values()} == {3}
    assert found.weights == 8 * 27 + 8 + 16 * 40
    assert 0 < found.floor_bytes < 20 * found.weights + found.weights
    assert found.copy_gb_per_s > 0


def test_who_disagrees_with_the_reference_is_not_timed() -> None:
    def disagreeing(network: Network) -> Contestant:
        contestant = contestants.sparseopt(network)
        with torch.no_grad():
            network.parameters[0].mul_(1.01)
        return contestant

    with pytest.raises(AssertionError, match="not close"):
        compare(SimpleNamespace(), disagreeing)


def a_comparison(sparsity: float, ours_ms: float) -> Comparison:
    def times(ms: float) -> Summary:
        return Summary(ms - 0.1, ms, ms + 0.1, ms, 60)

    return Comparison(
        "net", sparsity, 10**6, 5 * 10**6, 30.25, {"sparseopt": times(ours_ms), "chain": times(4.0)}
    )


def test_the_table_of_the_cpu_tells_how_many_times_faster() -> None:
    lines = cpu_report.table([a_comparison(0.5, 2.0), a_comparison(0.95, 1.0)]).splitlines()
    at = lines.index("net, 1000000 weights")
    assert lines[at + 1].split() == ["sparsity", "SparseOpt", "chain", "bytes/weight", "GB/s", "copy", "GB/s"]
    assert lines[at + 3].split() == ["0.5", "2.000", "4.000", "[2.00]", "5.00", "2.5", "30.2"]
    assert lines[at + 4].split() == ["0.95", "1.000", "4.000", "[4.00]", "5.00", "5.0", "30.2"]


def test_the_csv_of_the_cpu_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu_step.csv"
    cpu_report.append_csv([a_comparison(0.5, 2.0)], path)
    cpu_report.append_csv([a_comparison(0.95, 1.0)], path)
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    with (Path(cpu_report.__file__).parent / "results" / "cpu_step.csv").open(newline="") as file:
        assert header == next(csv.reader(file)), "the rows would not fit those of the repository"
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["sparsity"], row["contestant"]) for row in shown] == [
        *(("0.5", "sparseopt"), ("0.5", "chain"), ("0.95", "sparseopt"), ("0.95", "chain")),
    ]
    own = shown[0]
    assert [own[key] for key in ("p20_ms", "p50_ms", "p80_ms", "rounds")] == [
        "1.9000",
        "2.0000",
        "2.1000",
        "60",
    ]
    assert (own["weights"], own["floor_bytes"], own["copy_gb_per_s"]) == ("1000000", "5000000", "30.25")
