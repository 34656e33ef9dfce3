"""Questions about all scores of a layer, which mostly need not look at all of them."""

from __future__ import annotations

import torch
from torch import Tensor

_LOOKED_AT = 1 << 16
"""The number of scores that are looked at together, on a CPU. In most layers, one of them is not 0."""


def are_finite(values: Tensor) -> bool:
    """Tell if no value is infinite or NaN."""
    # An infinity or NaN stays in a sum. The sum may overflow by itself, then each value is looked at.
    dtype = torch.float32 if values.dtype.itemsize == 2 else None
    return bool(values.sum(dtype=dtype).isfinite()) or bool(values.isfinite().all())


def is_nonzero(values: Tensor, outside: Tensor | None = None) -> bool:
    """Tell if some value is not 0, of all or of those outside a mask. NaN is not 0."""
    size = _LOOKED_AT if values.device.type == "cpu" else max(1, values.numel())  # a GPU is asked once
    parts = torch.split(values.flatten(), size)
    if outside is None:
        return any(bool(part.any()) for part in parts)
    masks = torch.split(outside.flatten(), size)
    return any(bool(part.masked_fill(mask, 0).any()) for part, mask in zip(parts, masks, strict=True))
