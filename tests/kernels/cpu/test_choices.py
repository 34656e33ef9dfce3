"""How the CPU backend chooses between stream and list, by times that a test gives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparseopt_kernels import native_library

pytestmark = pytest.mark.skipif(
    native_library.MISSING is not None, reason=f"native library: {native_library.MISSING}"
)
TRIALS = 8  # four steps with each
FIRST_WAIT, LONGEST_WAIT = 16, 1024  # as in csrc/cpu/strategy.cpp
Times = Callable[[str, int], float]
"""Nanoseconds of a block, by strategy and step."""


def kind(live_share: float = 0.4, step_bytes: int = 1 << 28) -> native_library.Kind:
    return native_library.Kind(step_bytes=step_bytes, live_share=live_share, element_bytes=4, ham=False)


class Run:
    """Steps on one kind of tensor."""

    def __init__(self, live_share: float = 0.4) -> None:
        self.strategies, self.kind = native_library.Strategies(), kind(live_share)
        self.made: list[str] = []
        self.timed: list[bool] = []

    def steps(self, count: int, times: Times) -> list[str]:
        """Make steps, and return their strategies."""
        for _ in range(count):
            [(strategy, is_timed)] = self.strategies.choices([self.kind], is_step=True)
            if is_timed:
                ns = times(strategy, len(self.made))
                self.strategies.measured(self.kind, list=strategy == "list", ns=ns)
            self.made.append(strategy)
            self.timed.append(is_timed)
        return self.made[-count:]


def fixed(stream: float, list_: float) -> Times:
    return lambda strategy, _: list_ if strategy == "list" else stream


@pytest.mark.parametrize(("stream", "list_", "chosen"), [(10.0, 5.0, "list"), (5.0, 10.0, "stream")])
def test_both_are_tried_and_the_faster_is_kept(stream: float, list_: float, chosen: str) -> None:
    run = Run()
    assert run.steps(TRIALS, fixed(stream, list_)) == ["stream", "list"] * 4
    assert run.steps(FIRST_WAIT - 1, fixed(stream, list_)) == [chosen] * (FIRST_WAIT - 1)
    [decision] = run.strategies.decisions()
    assert (decision.strategy, decision.stream_ns, decision.list_ns) == (chosen, stream, list_)


@pytest.mark.parametrize(("live_share", "chosen"), [(0.4, "list"), (0.6, "stream")])
@pytest.mark.parametrize(("stream", "list_"), [(10.0, 10.3), (10.3, 10.0)])
def test_what_differs_little_is_decided_by_the_memory_that_it_fetches(
    live_share: float, chosen: str, stream: float, list_: float
) -> None:
    run = Run(live_share)
    run.steps(TRIALS, fixed(stream, list_))
    assert run.steps(1, fixed(stream, list_)) == [chosen]
    assert set(run.steps(2000, fixed(stream, list_))[: FIRST_WAIT - 2]) == {chosen}
    assert [d.strategy for d in run.strategies.decisions()] == [chosen]


def test_a_disturbed_step_decides_nothing() -> None:
    run = Run()
    run.steps(TRIALS, lambda strategy, step: 5.0 if strategy == "list" and step != 1 else 99.0)
    assert run.steps(1, fixed(10.0, 5.0)) == ["list"]


def test_the_other_strategy_is_tried_ever_more_rarely() -> None:
    run = Run()
    run.steps(TRIALS + 6000, fixed(20.0, 5.0))
    tried = [i + 1 - TRIALS for i, strategy in enumerate(run.made) if strategy == "stream"][4:]
    waits = [later - earlier for earlier, later in zip([0, *tried], tried, strict=False)]
    expected = [16, 32, 64, 128, 256, 512, 1024, 1024, 1024, 1024]
    assert waits == expected[: len(waits)]
    assert sum(waits) > 4000
    timed = [i + 1 - TRIALS for i, is_timed in enumerate(run.timed) if is_timed][TRIALS:]
    assert timed == [step - back for step in tried for back in (1, 0)], "and the step before it is timed"


def test_what_has_become_slower_is_given_up() -> None:
    """Another program takes bandwidth, say, from step 100 on."""

    def times(strategy: str, step: int) -> float:
        return 7.0 if strategy == "list" else 5.0 if step < 100 else 12.0

    run = Run()
    run.steps(100, times)
    assert run.made[-1] == "stream"
    after = run.steps(200, times)
    assert after[-1] == "list"
    [decision] = run.strategies.decisions()
    assert (decision.stream_ns, decision.list_ns) == (12.0, 7.0), "what was measured before is forgotten"
    slow = after.count("stream")
    assert slow <= 2 * FIRST_WAIT + 64 + TRIALS, slow


def test_a_wrong_first_decision_is_mended() -> None:
    run = Run()
    run.steps(TRIALS, fixed(5.0, 10.0))
    made = run.steps(FIRST_WAIT + TRIALS + 1, fixed(10.0, 5.0))
    assert made[:FIRST_WAIT] == ["stream"] * (FIRST_WAIT - 1) + ["list"]
    assert made[FIRST_WAIT:] == ["stream", "list"] * 4 + ["list"]


def test_tensors_of_a_kind_go_the_same_way_and_a_step_counts_once() -> None:
    strategies, own = native_library.Strategies(), kind()
    for step in range(TRIALS + FIRST_WAIT):
        choices = strategies.choices([own, own, kind(live_share=0.1), own], is_step=True)
        assert choices[0] == choices[1] == choices[3]
        strategies.measured(own, list=choices[0][0] == "list", ns=5.0 if choices[0][0] == "list" else 10.0)
        tried = step == TRIALS + FIRST_WAIT - 1
        if step >= TRIALS:
            assert choices[0][0] == ("stream" if tried else "list"), step


def test_a_norm_goes_the_way_of_the_step_and_is_neither_timed_nor_counted() -> None:
    run = Run()
    for step in range(TRIALS + FIRST_WAIT - 1):
        [(strategy, timed)] = run.strategies.choices([run.kind], is_step=False)
        assert not timed
        assert run.steps(1, fixed(10.0, 5.0)) == [strategy], step


def test_a_step_too_short_to_be_timed_is_followed_by_the_decision() -> None:
    """Tensors of the kind, but with fewer blocks."""
    run = Run()
    run.steps(TRIALS, fixed(10.0, 5.0))
    made = [run.strategies.choices([run.kind], is_step=True)[0][0] for _ in range(3 * FIRST_WAIT)]
    assert made == (["list"] * (FIRST_WAIT - 1) + ["stream"]) * 3


def test_kinds_are_apart() -> None:
    run = Run()
    run.steps(TRIALS + 1, fixed(10.0, 5.0))
    for other in (kind(live_share=0.9), kind(step_bytes=1 << 20)):
        assert run.strategies.choices([other], is_step=True) == [("stream", True)]


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.steps(TRIALS, fixed(10.0, 5.0))
    monkeypatch.setenv("SPARSEOPT_CPU_STRATEGY", "stream")
    assert run.steps(100, fixed(10.0, 5.0)) == ["stream"] * 100
    assert not any(run.timed[TRIALS:])
