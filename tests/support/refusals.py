"""Parameters, masks that are refused, and patterns for the words of an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import pattern_mask
from torch import Tensor
from torch.nn.parameter import Parameter


def weights(count: int = 3) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(4, 9, generator=generator)) for _ in range(count)]


def mask_like(p: Tensor, seed: int = 0) -> Tensor:
    return pattern_mask("half", p.shape, torch.Generator().manual_seed(seed))


def words(*parts: str) -> str:
    """A pattern for these texts in this order, with anything between them."""
    return ".*".join(re.escape(part) for part in parts)


def inference_mask(p: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.ones(p.shape, dtype=torch.bool)


BAD_MASKS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "shape": (lambda p: torch.ones(9, 4, dtype=torch.bool), ("shape (9, 4)", "(4, 9)")),
    "fewer-dimensions": (lambda p: torch.ones(36, dtype=torch.bool), ("shape (36,)", "(4, 9)")),
    "one-row": (lambda p: torch.ones(1, 9, dtype=torch.bool), ("shape (1, 9)", "(4, 9)")),
    "float": (lambda p: torch.full_like(p, 0.5), ("torch.float32", "36 values that are neither 0 nor 1")),
    "uint8": (lambda p: torch.ones(4, 9, dtype=torch.uint8), ("torch.uint8", "must be torch.bool")),
    "int64": (lambda p: torch.ones(4, 9, dtype=torch.int64), ("torch.int64", "must be torch.bool")),
    "device": (lambda p: torch.ones(4, 9, dtype=torch.bool, device="meta"), ("meta", "on cpu")),
    "sparse": (lambda p: torch.ones(4, 9, dtype=torch.bool).to_sparse(), ("torch.sparse_coo", "must be")),
    "inference": (inference_mask, ("torch.inference_mode", "unseen")),
    "list": (lambda p: [[True] * 9] * 4, ("list", "must be", "tensor")),
    "none": (lambda p: None, ("NoneType", "must be", "tensor")),
}
each_bad_mask = pytest.mark.parametrize("bad", BAD_MASKS)
