"""The command line: ``python -m sparseopt_kernels`` and ``sparseopt``."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from . import doctor
from ._version import __version__
from .bench import cli as bench
from .demo import cli as demo
from .reproduce import cli as reproduce
from .training import cli as training


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in two lines, and where the options are listed. Its
    subparsers are of this class, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\nusage: {self.prog} --help lists what it accepts\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser: argparse.ArgumentParser = _Parser(
        prog="sparseopt", description="SparseOpt: a fused, mask-aware SGD for sparse training in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"sparseopt_kernels {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor.add_parser(subparsers)
    bench.add_parser(subparsers)
    demo.add_parser(subparsers)
    training.add_parser(subparsers)
    reproduce.add_parser(subparsers)
    args = parser.parse_args(argv)
    with _notes():
        status: int = args.run(args)
    return status


@contextmanager
def _notes() -> Iterator[None]:
    """Print warnings as notes: there is no line of the user's that they could point at. Those that differ
    in their numbers only, as from seed to seed, are printed once."""
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

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
