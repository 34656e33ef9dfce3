"""What packing a mask must give: one bit per weight, the lowest first, every row in whole bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

Pack = Callable[[Tensor], tuple[list[bytes], int]]
"""Of a boolean mask (groups, segments, neurons, length), the bytes of each neuron and the number of ones."""


def random_mask(groups: int, segments: int, neurons: int, length: int, density: float, seed: int) -> Tensor:
    shape = (groups, segments, neurons, length)
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < density)


def check_pack(pack: Pack, mask: Tensor) -> None:
    """A neuron has a run of weights in each segment; each run begins a byte of its own."""
    before = mask.clone()
    rows, nnz = pack(mask)
    groups, _, neurons, length = mask.shape
    assert len(rows) == groups * neurons
    for row, found in enumerate(rows):
        group, neuron = divmod(row, neurons)
        expected = bytearray()
        for run in before[group, :, neuron].tolist():
            numbers = [
                sum(run[at + i] << i for i in range(min(8, length - at))) for at in range(0, length, 8)
            ]
            expected.extend(numbers)
        assert found == expected, f"row {row}"
    assert nnz == int(before.sum())
    assert torch.equal(mask, before)


def check_native_pack(native: ModuleType, mask: Tensor, threads: int) -> None:
    """The native library packs a tensor as it lies in memory: 16 weights to a number, whatever their rows."""
    flat = mask.flatten().tolist()
    packed = native.PackedMask(mask.data_ptr(), *mask.shape, threads)
    expected = [sum(bit << i for i, bit in enumerate(flat[at : at + 16])) for at in range(0, len(flat), 16)]
    assert packed.bits == expected
    assert packed.nnz == sum(flat)
    live = [i for i, bits in enumerate(expected) if bits]
    assert packed.live_blocks == (live if len(live) <= 0.9 * len(expected) else [])


def torch_pack(module: ModuleType) -> Pack:
    """Of the function that the Triton backend packs with, in PyTorch's own operations."""

    def pack(mask: Tensor) -> tuple[list[bytes], int]:
        bits, nnz = module.pack(mask[0, 0])
        return [row.tobytes() for row in bits.numpy()], int(nnz)

    return pack


def cuda_pack(cuda: ModuleType) -> Pack:
    """Of the module ``_cuda``, on pointers to what is not clean."""

    def pack(mask: Tensor) -> tuple[list[bytes], int]:
        rows, columns = mask.shape[2:]
        bits = np.full((rows, -(-columns // 8)), 0xAA, dtype=np.uint8)
        nnz = np.array([77], dtype=np.int64)
        cuda.pack(mask.data_ptr(), rows, columns, bits.ctypes.data, nnz.ctypes.data, 0)
        return [row.tobytes() for row in bits], int(nnz[0])

    return pack
