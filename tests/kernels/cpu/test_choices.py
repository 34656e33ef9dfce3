"""How the CPU backend chooses between stream and list, by times that a test gives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparseopt_kernels import native_library

pytestmark = pytest.mark.skipif(
    native_library.MISSING is not None, reason=f"native library: {native_library.MISSING}"
)
TRIALS = 8  # four steps with each
TRIAL_SHARE, SHORTEST_WAIT, CLEARLY_LESS = 0.002, 64, 0.95  # as in csrc/cpu/strategy.cpp
ORDER = ["stream", "list", "list", "stream"] * 2
Times = Callable[[str, int], float]
"""Nanoseconds of a block, by strategy and step."""


def kind(live_share: float = 0.4, step_bytes: int = 1 << 28, momentum: bool = True) -> native_library.Kind:
    return native_library.Kind(
        step_bytes=step_bytes, live_share=live_share, element_bytes=4, momentum=momentum, ham=False
    )


def other(strategy: str) -> str:
    return "list" if strategy == "stream" else "stream"


class Run:
    """Steps on one kind of tensor."""

    def __init__(self, own: native_library.Kind | None = None, after: Run | None = None) -> None:
        self.strategies: native_library.Strategies = (
            native_library.Strategies() if after is None else after.strategies
        )
        self.kind = own or kind()
        self.made: list[str] = []
        self.timed: list[bool] = []
        self.total = 0.0

    def steps(self, count: int, times: Times) -> list[str]:
        """Make steps, and return their strategies."""
        for _ in range(count):
            [(strategy, is_timed)] = self.strategies.choices([self.kind], is_step=True)
            ns = times(strategy, len(self.made))
            if is_timed:
                self.strategies.measured(self.kind, strategy, ns)
            self.made.append(strategy)
            self.timed.append(is_timed)
            self.total += ns
        return self.made[-count:]


def fixed(stream: float, list_: float) -> Times:
    return lambda strategy, _: list_ if strategy == "list" else stream


@pytest.mark.parametrize(("stream", "list_", "chosen"), [(10.0, 5.0, "list"), (5.0, 10.0, "stream")])
def test_both_are_measured_and_the_faster_is_taken(stream: float, list_: float, chosen: str) -> None:
    run = Run()
    assert run.steps(TRIALS, fixed(stream, list_)) == ORDER
    assert run.steps(SHORTEST_WAIT - 1, fixed(stream, list_)) == [chosen] * (SHORTEST_WAIT - 1)
    [decision] = run.strategies.decisions()
    assert (decision.strategy, decision.stream_ns, decision.list_ns) == (chosen, stream, list_)


@pytest.mark.parametrize(("live_share", "chosen"), [(0.4, "list"), (0.6, "stream")])
@pytest.mark.parametrize(("stream", "list_"), [(10.0, 10.4), (10.4, 10.0)])
def test_what_differs_little_is_decided_by_the_memory_that_it_fetches(
    live_share: float, chosen: str, stream: float, list_: float
) -> None:
    """And it stays decided: a trial that is faster, but not clearly, changes nothing."""
    run = Run(kind(live_share))
    run.steps(TRIALS, fixed(stream, list_))
    count = 10 * SHORTEST_WAIT
    assert run.steps(count, fixed(stream, list_)).count(other(chosen)) == 10
    assert [d.strategy for d in run.strategies.decisions()] == [chosen]


@pytest.mark.parametrize(("factor", "given_up"), [(0.94, True), (0.96, False)])
def test_a_trial_that_is_clearly_faster_has_both_measured_anew(factor: float, given_up: bool) -> None:
    run = Run()
    run.steps(TRIALS, fixed(20.0, 10.0))
    run.steps(int(1 / TRIAL_SHARE), lambda strategy, _: 10.0 if strategy == "list" else factor * 10.0)
    assert run.made[-1] == "stream"
    assert (run.strategies.decisions() == []) is given_up


@pytest.mark.parametrize("disturbed", [range(2), range(6, 8)])
def test_a_disturbed_step_decides_nothing(disturbed: range) -> None:
    run = Run()
    run.steps(
        TRIALS, lambda strategy, step: 99.0 if step in disturbed else 5.0 if strategy == "list" else 9.0
    )
    assert run.steps(1, fixed(10.0, 5.0)) == ["list"]


def test_a_disturbed_step_before_a_trial_changes_nothing() -> None:
    """Two steps are timed before it, and the faster one counts."""
    run = Run()
    run.steps(TRIALS, fixed(20.0, 10.0))
    trial = TRIALS + int(1 / TRIAL_SHARE) - 1
    times = fixed(20.0, 10.0)
    run.steps(trial - TRIALS + 1, lambda strategy, step: 99.0 if step == trial - 1 else times(strategy, step))
    assert run.made[trial] == "stream"
    assert len(run.strategies.decisions()) == 1


@pytest.mark.parametrize("ratio", [1.01, 1.3, 2.0, 4.0, 40.0])
def test_a_trial_takes_a_known_share_of_the_time(ratio: float) -> None:
    """The slower the other strategy is, the more rarely it is tried."""
    run = Run()
    run.steps(TRIALS, fixed(ratio, 1.0))
    run.total = 0.0
    count = 50_000
    run.steps(count, fixed(ratio, 1.0))
    tried = run.made[TRIALS:].count("stream")
    wait = max(SHORTEST_WAIT, int((ratio - 1) / TRIAL_SHARE + 1e-6))
    assert abs(tried - count / wait) <= 1
    assert run.total <= count * (1 + 1.01 * TRIAL_SHARE) + ratio


def test_the_steps_before_a_trial_are_timed() -> None:
    run = Run()
    run.steps(TRIALS + 3 * SHORTEST_WAIT, fixed(1.05, 1.0))
    timed = [i - TRIALS for i, is_timed in enumerate(run.timed) if is_timed][TRIALS:]
    assert timed == [end - back for end in (64, 128, 192) for back in (3, 2, 1)]


def test_what_has_become_slower_is_given_up() -> None:
    """Another program takes bandwidth, say, from step 198 on."""

    def times(strategy: str, step: int) -> float:
        return 7.0 if strategy == "list" else 6.5 if step < 198 else 12.0

    run = Run(kind(live_share=0.6))
    run.steps(198, times)
    assert run.made[-1] == "stream"
    after = run.steps(200, times)
    assert after[-1] == "list"
    [decision] = run.strategies.decisions()
    assert (decision.stream_ns, decision.list_ns) == (12.0, 7.0), "what was measured before is forgotten"
    assert after.count("stream") <= SHORTEST_WAIT + TRIALS
    rest = run.steps(1000, times)
    assert rest.count("stream") in (2, 3), "one in 357: waits are those of the new times"


def test_a_wrong_first_decision_is_mended() -> None:
    run = Run()
    run.steps(TRIALS, fixed(10.0, 10.4))
    made = run.steps(SHORTEST_WAIT + TRIALS + 1, fixed(5.0, 10.0))
    assert made[:SHORTEST_WAIT] == ["list"] * (SHORTEST_WAIT - 1) + ["stream"]
    assert made[SHORTEST_WAIT:] == [*ORDER, "stream"]


def test_tensors_of_a_kind_go_the_same_way_and_a_step_counts_once() -> None:
    strategies, own = native_library.Strategies(), kind()
    for step in range(TRIALS + SHORTEST_WAIT):
        choices = strategies.choices([own, own, kind(live_share=0.1), own], is_step=True)
        assert choices[0] == choices[1] == choices[3]
        strategies.measured(own, choices[0][0], 1.0 if choices[0][0] == "list" else 1.05)
        if step >= TRIALS:
            tried = step == TRIALS + SHORTEST_WAIT - 1
            assert choices[0][0] == ("stream" if tried else "list"), step


def test_one_kind_in_a_step_tries_the_other_strategy() -> None:
    strategies, kinds = native_library.Strategies(), [kind(share) for share in (0.1, 0.3, 0.45)]
    steps = []
    for _ in range(TRIALS + 3 * (SHORTEST_WAIT + 2)):
        chosen = [strategy for strategy, _ in strategies.choices(kinds, is_step=True)]
        steps.append(chosen)
        for own, strategy in zip(kinds, chosen, strict=True):
            strategies.measured(own, strategy, 1.0 if strategy == "list" else 1.05)
    tried = [chosen.count("stream") for chosen in steps[TRIALS:]]
    assert max(tried) == 1
    assert sum(tried) == 9


@pytest.mark.parametrize(("stream", "list_"), [(10.0, 5.0), (5.0, 10.0), (1.0, 1.02)])
def test_a_norm_goes_the_way_of_the_step_after_it(stream: float, list_: float) -> None:
    """It is neither timed nor counted."""
    run = Run()
    for step in range(TRIALS + 1200):
        [(strategy, timed)] = run.strategies.choices([run.kind], is_step=False)
        assert not timed
        assert run.steps(1, fixed(stream, list_)) == [strategy], step
    assert set(run.made[TRIALS:]) == {"stream", "list"}, "there was a trial"


def test_two_optimizers_of_a_kind_that_take_turns() -> None:
    """One has twice the weights of the other: its steps are not compared with those of the other."""
    small = Run(kind(step_bytes=1 << 28))
    large = Run(kind(step_bytes=(1 << 28) + (1 << 20)), after=small)
    small_times, large_times = fixed(4.0, 2.0), fixed(10.0, 5.0)
    for _ in range(2000):
        small.steps(1, small_times)
        large.steps(1, large_times)
    for run in (small, large):
        assert run.made.count("stream") <= 2 + 4 + 4
    slowed = [fixed(2.0, 4.0), fixed(5.0, 10.0)]
    for _ in range(1000):
        small.steps(1, slowed[0])
        large.steps(1, slowed[1])
    assert small.made[-1] == large.made[-1] == "stream"


def test_a_step_too_short_to_be_timed_is_followed_by_the_decision() -> None:
    """Tensors of the kind, but with fewer blocks."""
    run = Run()
    run.steps(TRIALS, fixed(1.05, 1.0))
    made = [run.strategies.choices([run.kind], is_step=True)[0][0] for _ in range(3 * SHORTEST_WAIT)]
    assert made == (["list"] * (SHORTEST_WAIT - 1) + ["stream"]) * 3


def test_a_trial_is_compared_with_the_steps_just_before_it_alone() -> None:
    """The first trial is not reported, and neither are the steps before the second one."""
    run = Run()
    run.steps(TRIALS, fixed(1.05, 1.0))
    run.steps(SHORTEST_WAIT - 1, fixed(99.0, 99.0))
    run.strategies.choices([run.kind], is_step=True)
    for _ in range(SHORTEST_WAIT - 1):
        run.strategies.choices([run.kind], is_step=True)
    assert run.steps(1, fixed(1.05, 1.0)) == ["stream"]
    assert len(run.strategies.decisions()) == 1


@pytest.mark.parametrize(
    "unlike",
    [kind(live_share=0.9), kind(step_bytes=1 << 20), kind(momentum=False)],
    ids=["live", "size", "momentum"],
)
def test_kinds_are_apart(unlike: native_library.Kind) -> None:
    run = Run()
    run.steps(TRIALS + 1, fixed(10.0, 5.0))
    assert run.strategies.choices([unlike], is_step=True) == [("stream", True)]


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.steps(TRIALS, fixed(10.0, 5.0))
    monkeypatch.setenv("SPARSEOPT_CPU_STRATEGY", "stream")
    assert run.steps(1000, fixed(10.0, 5.0)) == ["stream"] * 1000
    assert not any(run.timed[TRIALS:])
