"""Warnings that point at the user's line, however deep in PyTorch or in this package they are made."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_FOREIGN = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name the innermost line that is neither in PyTorch nor in this package.

    A fixed ``stacklevel`` cannot do that: schedulers, GradScaler, hooks and compiled functions call an
    optimizer through different numbers of frames.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_foreign(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_foreign(filename: str) -> bool:
    """Whether it belongs to PyTorch, to this package, or to no file (``<frozen runpy>``, compiled code)."""
    return filename.startswith((*_FOREIGN, "<frozen", "<eval_with_key>"))
