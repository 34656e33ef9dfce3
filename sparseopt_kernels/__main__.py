"""The command line: ``python -m sparseopt_kernels`` and ``sparseopt``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import doctor
from ._version import __version__
from .demo import cli as demo
from .reproduce import cli as reproduce
from .training import cli as training


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sparseopt", description="SparseOpt: a fused, mask-aware SGD for sparse training in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"sparseopt_kernels {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor.add_parser(subparsers)
    demo.add_parser(subparsers)
    training.add_parser(subparsers)
    reproduce.add_parser(subparsers)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
