"""The calls of Python functions in a step: that they are counted, and no more than they may be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import step_calls

from sparseopt_kernels.step import change_detection


def test_nested_calls_are_counted() -> None:
    """Those of this package, and no others."""
    from sparseopt_kernels.neurons import Neurons

    found = step_calls.counted(lambda: Neurons().sizes((3, 4)))
    assert (found.calls, found.moves, found.files) == (2, 1, 1)  # sizes() calls grid()
    assert step_calls.counted(lambda: sorted([2, 1])).calls == 0


@pytest.mark.skipif(change_detection.READER is None, reason="steps are observed in Python")
def test_a_step_makes_no_more_calls_than_it_may() -> None:
    """In a process of its own: masks of other tests, if a topology has just updated them, take calls."""
    command = [sys.executable, step_calls.__file__]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.rsplit(maxsplit=3) for line in printed.splitlines()[2:]]
    calls = {kind.strip(): int(number) for kind, number, _, _ in rows}
    assert calls["only numbers change"] <= 14
    assert calls["second"] == calls["only numbers change"]
    assert calls["a mask has changed"] <= 150
    assert calls["the one after that"] == calls["only numbers change"]
