"""Warnings that point at the user's line, however deep in PyTorch or in this package they are made; and the
notes that the command line makes of them."""

from __future__ import annotations

import os
import re
import sys
import warnings
from typing import TextIO

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
    """Tell if it belongs to PyTorch, to this package, or to no file (``<frozen runpy>``, compiled code)."""
    return filename.startswith((*_FOREIGN, "<frozen", "<eval_with_key>"))


def show_as_notes() -> None:
    """Print the warnings of this process as notes, from now on, for commands: there is no line of the user's
    to point at. Those that differ in their numbers only, as from seed to seed, are printed once."""
    seen: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        kind = re.sub(r"(?<=[ =])[\d.]+", "#", text)
        if kind in seen:
            return
        seen.add(kind)
        note = f"note: {text}"
        tqdm = sys.modules.get("tqdm")
        if tqdm is not None:  # there may be a progress bar
            tqdm.tqdm.write(note, file=sys.stderr)
        else:
            print(note, file=sys.stderr)

    warnings.showwarning = show
