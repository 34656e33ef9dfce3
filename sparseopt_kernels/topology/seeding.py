"""The generator of all random masks: the same on every rank and device, and after a resume."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, layer: int, update: int) -> torch.Generator:
    """Return a CPU generator that depends on (seed, layer, update) and on nothing else.

    The three are mixed by a hash, so that neighbouring seeds, layers and updates are independent, and
    ``(1, 2, 3)`` differs from ``(2, 1, 3)``. Update 0 is the initial mask.
    """
    digest = hashlib.blake2b(f"{seed}/{layer}/{update}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
