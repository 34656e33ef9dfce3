"""Uniform choices: exact in number, the same everywhere, every place equally likely."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sparseopt_kernels import native_library
from sparseopt_kernels.topology.random_choice import add_random, choose_random, draw_seed, random_places
from sparseopt_kernels.topology.seeding import generator
from sparseopt_kernels.topology.selection import grow_random


def test_the_numbers_are_those_of_splitmix64() -> None:
    # The first three of seed 0, as in the reference implementation (Vigna 2015).
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    size = 2**62 + 11
    assert random_places(0, 0, 3, size).tolist() == [(x >> 1) % size for x in published]
    assert random_places(0, 1, 2, 1000).tolist() == [(x >> 1) % 1000 for x in published[1:]]


def test_choices_of_a_seed_never_change() -> None:
    assert choose_random(12, 4, 0).nonzero().flatten().tolist() == [2, 3, 6, 9]
    assert draw_seed(generator(0, 0, 0)) == 7688943327119280665


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(0, 300), seed=st.integers(0, 2**63 - 1))
def test_the_library_chooses_as_pytorch_does(data: st.DataObject, size: int, seed: int) -> None:
    k = data.draw(st.integers(0, size))
    chosen = choose_random(size, k, seed)
    assert chosen.dtype == torch.bool
    assert int(chosen.sum()) == k
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "MISSING", "taken away for a test")
        assert torch.equal(choose_random(size, k, seed), chosen)


def test_places_are_taken_in_the_order_of_the_sequence() -> None:
    taken = torch.zeros(50, dtype=torch.bool)
    taken[::3] = True
    expected: set[int] = set()
    for place in random_places(9, 0, 1000, 50).tolist():
        if not taken[place] and len(expected) < 20:
            expected.add(place)
    before = taken.clone()
    added = add_random(taken, 20, 9)
    assert set((added & ~before).nonzero().flatten().tolist()) == expected
    assert torch.equal(taken, before)


def assert_uniform(chosen: Tensor, k: int) -> None:
    """Of many choices of ``k`` places (rows), none of the places (columns) comes too often or too evenly."""
    draws, size = chosen.shape
    assert (chosen.sum(dim=1) == k).all()
    expected = draws * k / size
    squares = ((chosen.sum(dim=0) - expected) ** 2).sum().item() / expected
    # Of k places without repetition, counts vary less than those of k free draws.
    statistic = squares * (size - 1) / (size - k)
    assert 1e-4 < stats.chi2.sf(statistic, size - 1) < 1 - 1e-4
    # Neighbours are as independent as others.
    pairs = int((chosen[:, 1:] & chosen[:, :-1]).sum())
    mean = draws * (size - 1) * k * (k - 1) / (size * (size - 1))
    assert abs(pairs - mean) <= 5 * mean**0.5


@pytest.mark.parametrize("k", [1, 30, 100, 150, 290])
def test_every_place_is_equally_likely(k: int) -> None:
    assert_uniform(torch.stack([choose_random(300, k, seed) for seed in range(4000)]), k)


@pytest.mark.parametrize(("share", "k"), [(0.05, 20), (0.05, 250), (0.45, 60), (0.8, 20), (0.8, 50)], ids=str)
def test_every_weight_that_is_not_kept_grows_equally_likely(share: float, k: int) -> None:
    kept = torch.rand(300, generator=torch.Generator().manual_seed(0)) < share
    grown = torch.stack([grow_random(kept, k, generator(0, 0, update)) for update in range(4000)])
    assert grown[:, kept].all()
    assert_uniform(grown[:, ~kept], k)
