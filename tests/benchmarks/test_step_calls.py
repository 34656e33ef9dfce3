"""The calls of Python functions in a step: that they are counted, and no more than they may be."""

from __future__ import annotations

import pytest
import step_calls

from sparseopt_kernels.step import change_detection


def test_nested_calls_are_counted() -> None:
    """Those of this package, and no others."""
    from sparseopt_kernels.neurons import Neurons

    found = step_calls.counted(lambda: Neurons().count((3, 4)))
    assert (found.calls, found.moves, found.files) == (2, 1, 1)  # count() calls grid()
    assert step_calls.counted(lambda: sorted([2, 1])).calls == 0


@pytest.mark.skipif(change_detection.READER is None, reason="steps are observed in Python")
def test_a_step_makes_no_more_calls_than_it_may() -> None:
    found = step_calls.measured()
    assert found["only numbers change"].calls <= 14
    assert found["a mask has changed"].calls <= 150
    assert found["the one after that"] == found["only numbers change"]
