"""Names the commit of the code that runs, for the rows that it makes."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def code_commit() -> str:
    """Return the short hash of the commit that the package is of, with ``+`` if its code differs from it;
    ``""`` if it is no git checkout. Once per process: code that has been imported does not change."""
    return commit_of(Path(__file__))


def commit_of(file: Path) -> str:
    """Return the same for the checkout that ``file``, a Python file of it, lies in."""
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return ""  # installed into an environment that lies in some other checkout
    commit = _git(file, "rev-parse", "--short", "HEAD")
    # Results that are committed as they come do not change the code.
    changed = _git(file, "status", "--porcelain", "--", ":(top,glob)**/*.py", ":(top)csrc")
    return "" if commit is None else f"{commit}{'+' if changed else ''}"


def _git(file: Path, *arguments: str) -> str | None:
    """Return what git prints in the folder of ``file``; None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
