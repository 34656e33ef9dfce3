"""Leaves out warnings of concentrated fan-in, in runs that study it on purpose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def concentration_ignored() -> Iterator[None]:
    """Ignore the warnings of the optimizer and of RigL that few neurons have, or get, much of the fan-in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fan-in is concentrated|one neuron of")
        yield
