"""The command line: ``python -m sparseopt_kernels`` and ``sparseopt``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ._version import __version__
from .lab import doctor
from .lab.bench import cli as bench
from .lab.demo import cli as demo
from .lab.reproduce import cli as reproduce
from .lab.training import cli as training
from .lab.training.distributed import launched
from .user_warning import show_as_notes


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
    with warnings.catch_warnings():
        show_as_notes()
        status: int = args.run(args)
    return status


def _end(code: int) -> NoReturn:
    """End the process. Under torchrun, without what libraries do at the end: now and then, a thread of gloo
    is still there then, and aborts a process that has done all its work."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _end(main())
