"""SET and RigL alike, though only SET has a seed."""

from __future__ import annotations

from typing import Any

from sparseopt_kernels.topology.set import SET


def seeded(cls: type, seed: int) -> dict[str, int]:
    """The seed for SET; RigL has none."""
    return {"seed": seed} if cls is SET else {}


def updated_by_step(dst: Any) -> bool:
    dst.step()
    return bool(dst.updated)
