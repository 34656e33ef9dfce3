"""Keeps what tests compile from run to run, and lets one process compile what several want."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock


def built_once(directory: Path, name: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the path of the file that ``make`` is told to write, unless that was done before.

    Args:
        directory: where it is kept.
        name: of the file.
        key: what tells it from others of that name.
    """
    target = directory / key / name
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            make(unfinished)
            unfinished.replace(target)
    return target


def key_of(*parts: Any) -> str:
    """A short name for whatever has these parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def run(command: Sequence[str | Path]) -> None:
    """Run a compiler.

    Raises:
        RuntimeError: with what it said, if it failed.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def load(path: Path) -> ModuleType:
    """The extension module at ``path``. Several builds of it can be loaded in one process."""
    # pybind11 keeps modules by their name: that of the folder tells builds apart.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{path.name.partition('.')[0]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
