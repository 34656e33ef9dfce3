"""Random crops and flips of training images: for batches of tensors (CIFAR-100) and for a picture (ImageNet).

Nothing here reads files. All random numbers come from generators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...topology.seeding import generator

_AREA = (0.08, 1.0)  # fraction of the picture (Szegedy et al. 2015, as in every recipe for ImageNet since)
_RATIO = (3 / 4, 4 / 3)  # width to height
_TRIES = 10


@dataclass(frozen=True)
class CropAndFlip:
    """An augmentation: pad the images, crop them to their former size at random, and flip half of them
    left-right (He et al. 2016, Section 4.2).

    Args:
        padding: width of the border in pixels.
        fill: the border's value in each channel: black, in normalised images.
    """

    padding: int
    fill: tuple[float, ...]

    def draw(self, examples: int, seed: int, epoch: int) -> Tensor:
        """Draw the crop's row and column and the flip (0 or 1) of each example of the data set: ``(N, 3)``
        int64 on the CPU."""
        draws = generator(seed, -1, epoch)  # layers have the numbers from 0 on
        corners = torch.randint(2 * self.padding + 1, (examples, 2), generator=draws)
        return torch.cat([corners, torch.randint(2, (examples, 1), generator=draws)], dim=1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the images ``(B, channels, height, width)``, cropped and flipped by the rows of ``drawn``,
        ``(B, 3)``."""
        count, channels, height, width = images.shape
        drawn = drawn.to(images.device)
        border = self.padding
        fill = torch.tensor(self.fill, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
        padded = fill.expand(count, channels, height + 2 * border, width + 2 * border).clone()
        padded[:, :, border : border + height, border : border + width] = images
        rows = drawn[:, :1] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device).expand(count, width)
        columns = drawn[:, 1:2] + torch.where(drawn[:, 2:] == 1, columns.flip(1), columns)
        batch = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
        return padded[batch, channel, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]


def random_crop(width: int, height: int, draws: torch.Generator) -> tuple[int, int, int, int]:
    """Draw a box in a picture, of 8% to 100% of its area and a ratio of width to height from 3:4 to 4:3.

    Returns:
        left, upper, right and lower in pixels, as in Pillow. If ten tries give no box within the picture, it
        is the largest centred box that the ratios allow.
    """
    log_ratio = (math.log(_RATIO[0]), math.log(_RATIO[1]))
    for _ in range(_TRIES):
        area = width * height * _between(*_AREA, draws)
        ratio = math.exp(_between(*log_ratio, draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=draws))
            upper = int(torch.randint(height - h + 1, (), generator=draws))
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def _between(low: float, high: float, draws: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=draws))
