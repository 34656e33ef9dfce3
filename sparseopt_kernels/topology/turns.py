"""Notices two methods that grow weights in the same masks in turns: most likely one of them was forgotten."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch.utils.weak import WeakTensorKeyDictionary

from ..user_warning import warn
from .method_notices import notice_of_turns

if TYPE_CHECKING:
    from torch.nn.parameter import Parameter


class _Growth:
    """Which methods have grown weights in a mask."""

    def __init__(self) -> None:
        self.methods: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()  # by id
        self.last: weakref.ref[object] | None = None
        self.times = 0  # that the last one did in a row

    def add(self, method: object) -> object | None:
        """Add an update. Return the method of the one before, if it came between two of this method."""
        other = None if self.last is None else self.last()
        if other is method:
            self.times += 1
            return None
        is_between = self.times == 1 and id(method) in self.methods
        self.methods[id(method)] = method
        self.last, self.times = weakref.ref(method), 1
        return other if is_between else None


_GROWTH = WeakTensorKeyDictionary()  # by parameter
_WARNED: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()  # by id


def warn_of_turns(method: object, grown: Iterable[tuple[str, Parameter]]) -> None:
    """Warn if another method has grown weights in one of these layers between two updates of this one.

    Of two periodic methods, the one with the longer period does. Not warned of are methods that take over for
    several updates, as in phases of training, and those that only drop, as GMP. It warns once of a method.

    Args:
        method: the one that has just updated masks.
        grown: the names and the parameters of the layers in which it has grown weights.
    """
    for name, parameter in grown:
        growth = _GROWTH.setdefault(parameter, _Growth())  # type: ignore[no-untyped-call]
        other = growth.add(method)
        if other is not None and id(method) not in _WARNED:
            _WARNED.update({id(method): method, id(other): other})
            warn(notice_of_turns(name, type(method).__name__, type(other).__name__))
