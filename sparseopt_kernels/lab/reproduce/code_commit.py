"""Finds the git commit of the running code, which is kept in the rows of results."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def code_commit() -> str:
    """Return the short hash of the package's commit, with ``+`` if the code differs from it; ``""`` outside a
    git checkout. It is cached, because imported code does not change."""
    return commit_of(Path(__file__))


def commit_of(file: Path) -> str:
    """Return the same for the checkout of a Python file."""
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return ""  # installed into an environment within another checkout
    commit = _git(file, "rev-parse", "--short", "HEAD")
    # Results that are not committed yet do not change the code.
    changed = _git(file, "status", "--porcelain", "--", ":(top,glob)**/*.py", ":(top)csrc")
    return "" if commit is None else f"{commit}{'+' if changed else ''}"


def _git(file: Path, *arguments: str) -> str | None:
    """Return the output of git in the folder of ``file``; None if git fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
