"""``Turns``: notices two methods that grow weights in the same masks in turns.

Most likely one of them was replaced, and still has its ``step()`` called.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import count
from typing import NamedTuple

from torch.nn.parameter import Parameter


class _Times(NamedTuple):
    """When a method has grown weights in a mask, last and before that; 0: never."""

    last: int = 0
    before: int = 0


class Turns:
    """When a method has grown weights in its masks, and which other methods have since.

    Args:
        name: of the method's class.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # By id(parameter): PyTorch swaps no parameter that has a weak reference (torch.utils.swap_tensors).
        self._times: dict[int, _Times] = {}
        self._is_known = False  # that this method and another take turns
        _ALIVE[id(self)] = self

    def add(self, grown: Iterable[tuple[str, Parameter]]) -> tuple[str, str] | None:
        """Add an update. Return a layer, and another method that has grown weights there since the last one.

        The other one counts if it has done so once: of two periodic methods, the one with the longer period
        does. One that takes over for several updates, as in phases of training, does not count, nor does one
        that only drops, as GMP. Two methods that were returned are not returned again.

        Args:
            grown: the names and the parameters of the layers in which the method has just grown weights.

        Returns:
            The name of the layer and that of the other method's class, or None.
        """
        now = next(_CLOCK)
        found: tuple[str, Turns] | None = None
        others = [other for reference in _ALIVE.valuerefs() if (other := reference()) is not None]
        for layer, parameter in grown:
            key = id(parameter)
            mine = self._times.get(key, _Times())
            self._times[key] = _Times(now, mine.last)
            for other in others:
                theirs = other._times.get(key, _Times())
                if other is not self and theirs.before < mine.last < theirs.last and mine.last:
                    found = found or (layer, other)
        if found is None or self._is_known:
            return None
        layer, other = found
        self._is_known = other._is_known = True
        return layer, other.name


_CLOCK = count(1)
_ALIVE: weakref.WeakValueDictionary[int, Turns] = weakref.WeakValueDictionary()
