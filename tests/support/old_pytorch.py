"""What an older PyTorch is not tested with."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

needs_fsdp2 = pytest.mark.skipif(
    not dist.is_available() or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="FSDP2 is tested with PyTorch 2.13 and newer",
)
