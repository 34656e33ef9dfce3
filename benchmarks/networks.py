"""The networks that the benchmarks measure, and the least memory traffic of a step on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparseopt_kernels.kernels.gpu.lists import LISTED
from sparseopt_kernels.lab.bench.contestants import Contestant
from sparseopt_kernels.lab.bench.network import Shape
from sparseopt_kernels.lab.training.models import resnet


def resnet50() -> nn.Module:
    """Return a module with the parameters of ResNet-50 (He et al. 2016), in order; it computes nothing."""
    layers: list[nn.Module] = []

    def convolution(columns: int, rows: int, size: int) -> None:
        layers.append(nn.Conv2d(columns, rows, size, bias=False))
        layers.append(nn.BatchNorm2d(rows))

    convolution(3, 64, 7)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            convolution(channels, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(channels, 4 * width, 1)
            channels = 4 * width
    return nn.Sequential(*layers, nn.Linear(channels, 1000))


def _shapes(model: Callable[[], nn.Module]) -> list[Shape]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in model().parameters()]


RESNET20 = _shapes(lambda: resnet(3, 10, blocks=3))
RESNET50 = _shapes(resnet50)
LAYERS_4096X2048: list[Shape] = [(4096, 2048)] * 4
LAYERS_8192X8192: list[Shape] = [(8192, 8192)] * 4


def nearly_square(weights: int) -> Shape:
    """Return the shape of a layer of ``weights`` weights, or a few less."""
    rows = math.isqrt(weights)
    return (rows, weights // rows)


def floor_bytes(parameter: Tensor, mask: Tensor | None, line: int = 32) -> int:
    """Return the least bytes that a step can move: p and b read and written and g read in the lines of
    ``line`` bytes that hold an active weight, and the mask's bits.

    A line is a GPU's sector of 32 bytes or a CPU's cache line of 64. Tensors without a mask are moved whole.
    """
    size = parameter.element_size()
    if mask is None:
        return 5 * size * parameter.numel()
    flat = nn.functional.pad(mask.flatten(), (0, -mask.numel() % (line // size)))
    return 5 * line * int(flat.view(-1, line // size).any(dim=1).sum()) + -(-mask.numel() // 8)


def floor_bytes_of(contestant: Contestant, line: int) -> int:
    """Return the least bytes that a step of the contestant's work can move; without masks, those of all
    weights."""
    masks = contestant.network.masks if contestant.work != "sgd" else {}
    return sum(floor_bytes(p, masks.get(p), line) for p in contestant.network.parameters)


def sector_floor_bytes(parameter: Tensor, mask: Tensor | None) -> int:
    """Return the least bytes that ``sector_step`` of a GPU backend can move.

    They are those of ``floor_bytes``, and the sectors of c_i of neurons that have an active weight. If few
    sectors are live, the 4-byte numbers and the bits of these are read in place of all bits of the mask.
    """
    if mask is None:
        return floor_bytes(parameter, mask)
    lanes = 32 // parameter.element_size()
    bits = -(-mask.numel() // 8)
    weights = floor_bytes(parameter, mask) - bits
    live = weights // (5 * 32)
    is_listed = live <= int(LISTED * -(-mask.numel() // lanes))
    neurons = nn.functional.pad(mask.flatten(1).any(dim=1), (0, -len(mask) % 8))
    factors = 32 * int(neurons.view(-1, 8).any(dim=1).sum())
    return weights + (live * (4 + lanes // 8) if is_listed else bits) + factors
