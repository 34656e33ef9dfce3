"""A cache of what a backend derives from a parameter (packed masks, say), which is kept from plan to plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from .contract import ParamState

_T = TypeVar("_T")


class Derived(Generic[_T]):
    """Calls ``derive`` once for each ``ParamState``, and keeps the result while that lives."""

    def __init__(self, derive: Callable[[ParamState], _T]) -> None:
        self._derive = derive
        self._cache: WeakKeyDictionary[ParamState, _T] = WeakKeyDictionary()

    def __call__(self, params: Sequence[ParamState]) -> list[_T]:
        for param in params:
            if param not in self._cache:
                self._cache[param] = self._derive(param)
        return [self._cache[param] for param in params]
