"""The hash by which ranks compare masks."""

from __future__ import annotations

import torch

from sparseopt_kernels.masks.mask_hash import mask_hash


def test_known_hashes() -> None:
    # The first numbers of SplitMix64 of seed 0 (Vigna 2015).
    numbers = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    for mask, indices in (("0000", []), ("1000", [0]), ("0100", [1]), ("1011", [0, 2, 3])):
        total = sum(numbers[i] for i in indices) % 2**64
        bits = torch.tensor([c == "1" for c in mask])
        assert mask_hash(bits) % 2**64 == total
        assert mask_hash(bits.view(2, 2).double()) % 2**64 == total


def test_a_hash_does_not_depend_on_the_memory_format() -> None:
    mask = torch.rand(6, 5, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    assert mask_hash(mask) == mask_hash(mask.to(memory_format=torch.channels_last))
    other = mask.clone()
    other[2, 3, 1, 0] ^= True
    assert mask_hash(mask) != mask_hash(other)
    # Two that swap their places: the sum of the indices alone is the same.
    swapped = torch.zeros(8).index_fill(0, torch.tensor([0, 3]), 1)
    assert mask_hash(swapped) != mask_hash(torch.zeros(8).index_fill(0, torch.tensor([1, 2]), 1))
