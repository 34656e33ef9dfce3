"""The Triton kernels with one difference, made on purpose."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from sparseopt_kernels.kernels.gpu import triton as backend

MODULES = ("triton_update_rule", "triton_sectors", "triton_lists", "triton_step")
"""Each comes after those that it imports."""


def substitute(module: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend launch kernels in which ``old``, which must be in the module once, is ``new``.

    Args:
        module: one of ``MODULES``. The others are imported again, because they use it.
        folder: for the file of the module, where Triton looks for the text of its kernels.
        monkeypatch: what takes it back.
    """
    for name in MODULES:
        path = Path(backend.__file__).with_name(f"{name}.py")
        if name == module:
            source = path.read_text()
            assert source.count(old) == 1, f"{old!r} is to be in {name}.py once"
            path = folder / path.name
            path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(f"{backend.__package__}.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)
        spec.loader.exec_module(made)
        if hasattr(backend, name):
            monkeypatch.setattr(backend, name, made)
