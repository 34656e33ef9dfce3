"""What a backend derives from tensors (packed masks, say): once for each, and kept from plan to plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from .contract import Tensors

_T = TypeVar("_T")


class Derived(Generic[_T]):
    """Calls ``derive`` for each ``Tensors`` that is new to it, and keeps the result while they live."""

    def __init__(self, derive: Callable[[Tensors], _T]) -> None:
        self._derive = derive
        self._known: WeakKeyDictionary[Tensors, _T] = WeakKeyDictionary()

    def __call__(self, tensors: Sequence[Tensors]) -> list[_T]:
        for t in tensors:
            if t not in self._known:
                self._known[t] = self._derive(t)
        return [self._known[t] for t in tensors]
