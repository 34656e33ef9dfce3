"""Counts the calls of Python functions in a step of ``SparseOpt``, and the moves from file to file.

It counts functions of this package, in steps of a network of three Linear layers on a CPU: the first, the
second, one in which only numbers change, one after a mask has changed, and the one after that. No time is
measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

import sparseopt_kernels as sk
from sparseopt_kernels.text_table import aligned

_PACKAGE = str(Path(sk.__file__).parent)


class Calls(NamedTuple):
    """The calls of a step."""

    calls: int
    moves: int
    """Calls from one file of the package to another."""
    files: int


def counted(step: Callable[[], object]) -> Calls:
    """Make a step, and return its calls."""
    files: list[str] = []
    moves = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal moves
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(_PACKAGE) or frame.f_code.co_name.startswith("<"):
            return
        files.append(name)
        caller = frame.f_back
        moves += caller is not None and caller.f_code.co_filename != name

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return Calls(len(files), moves, len(set(files)))


def measured() -> dict[str, Calls]:
    """Return the calls of each kind of step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    masks = sk.sparsify(model, sparsity=0.9)
    optimizer = sk.SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found = {"first": counted(optimizer.step), "second": counted(optimizer.step)}
    for _ in range(4):
        optimizer.step()
    found["only numbers change"] = counted(optimizer.step)
    next(iter(masks.values()))[0] = False
    found["a mask has changed"] = counted(optimizer.step)
    found["the one after that"] = counted(optimizer.step)
    return found


def main() -> None:
    rows = [(kind, *map(str, calls)) for kind, calls in measured().items()]
    print("\n".join(aligned([("step", *Calls._fields), *rows])))


if __name__ == "__main__":
    main()
