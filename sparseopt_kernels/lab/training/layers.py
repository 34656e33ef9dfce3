"""A layer that several of the networks use."""

from __future__ import annotations

from torch import Tensor, nn


class GlobalMean(nn.Module):
    """The mean over the image: ``(N, channels, H, W)`` to ``(N, channels)``."""

    # On a GPU, the backward pass of AdaptiveAvgPool2d(1) adds in no fixed order; that of mean() does.
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
