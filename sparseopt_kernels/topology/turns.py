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

_GROWN_BY = WeakTensorKeyDictionary()  # parameter: the methods (weak) that grew weights last, and before that
_WARNED: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()


def warn_of_turns(method: object, grown: Iterable[tuple[str, Parameter]]) -> None:
    """Warn if another method has grown weights in one of these layers since this method last did.

    A method that takes over from another for good is not warned of, nor is one that only drops, as GMP does.
    Of each method, it warns once.

    Args:
        method: the one that has just updated masks.
        grown: the names and the parameters of the layers in which it has grown weights.
    """
    for name, parameter in grown:
        last, before = _GROWN_BY.get(parameter, (_nobody, _nobody))  # type: ignore[no-untyped-call]
        other = last()
        if other is method:
            continue
        _GROWN_BY[parameter] = (weakref.ref(method), last)
        if other is not None and before() is method and id(method) not in _WARNED:
            _WARNED.update({id(method): method, id(other): other})
            warn(notice_of_turns(name, type(method).__name__, type(other).__name__))


def _nobody() -> None:
    """The weak reference to a method that there is not."""
