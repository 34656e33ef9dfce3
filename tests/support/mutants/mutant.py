"""A mistake, and the test that finds it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    """What is in the file, once."""
    new: str
    test: str
    """What must fail: a file of ``tests`` and a name in it."""
