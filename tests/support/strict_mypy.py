"""mypy on the code of a page of the documentation, as strict as ``--strict``.

It takes the configuration and the cache of ``make lint``: to look at PyTorch alone takes a minute.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What the configuration leaves out for tests.
_STRICT = (
    "# mypy: disallow-any-generics, disallow-incomplete-defs, disallow-untyped-calls, "
    "disallow-untyped-decorators, disallow-untyped-defs, no-implicit-reexport, warn-return-any\n"
)


def strict_mypy(source: str, folder: Path) -> str:
    """What mypy says of the source. The test is skipped where mypy is not installed."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    path = folder / "page.py"
    path.write_text(_STRICT + source)
    command = [sys.executable, "-m", "mypy", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
