"""Warnings that name the user's line, from any depth within PyTorch and this package; the command line prints
them as notes."""

from __future__ import annotations

import os
import re
import sys
import warnings
from typing import Any

import torch

# PyTorch's files, this package's, and what is no file: <frozen runpy>, compiled code.
_FOREIGN = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__))
_FOREIGN += ("<frozen", "<eval_with_key>")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, naming the innermost line that is neither in PyTorch nor in this package.

    A fixed ``stacklevel`` cannot do that: schedulers, GradScaler, hooks and compiled functions call an
    optimizer through different numbers of frames.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_FOREIGN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def show_as_notes() -> None:
    """Print all further warnings of this process as notes: a command has no line of the user's to name.

    Warnings that differ only in numbers and in what is in brackets, as between seeds, are printed once.
    """
    seen: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message)
        kind = re.sub(r"\([^)]*\)|(?<![\w'.])\d[\d.,]*", "#", text)
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
