"""What ranks choose of a layer that they share is what one process chooses of the whole, with any scores."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_as_threads import on_threads
from torch import Tensor

from sparseopt_kernels import native_library
from sparseopt_kernels.topology import sharded_selection
from sparseopt_kernels.topology.seeding import generator
from sparseopt_kernels.topology.selection import drop_smallest, grow_largest, grow_random
from sparseopt_kernels.topology.sharded_parts import Asked
from sparseopt_kernels.topology.sharded_selection import RandomGrowth, largest

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ODD = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1.0, 1.0, 2.0**-14)


def scores(seed: int, rows: int, dtype: torch.dtype, levels: int) -> Tensor:
    """Numbers of both signs, many of them equal if there are few levels, and some odd ones."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(-levels, levels + 1, (rows, 5), generator=draw) / levels
    found = found * 10.0 ** torch.randint(-6, 6, (rows, 1), generator=draw)
    places = torch.randint(0, found.numel(), (len(ODD),), generator=draw)
    found.view(-1)[places] = torch.tensor(ODD)
    return found.to(dtype)


def blocks(tensor: Tensor, ranks: int) -> list[Tensor]:
    """The rows of each rank, as ``fully_shard`` divides them: the last ones may have none."""
    size = -(-tensor.shape[0] // ranks)
    return [tensor[size * rank : size * (rank + 1)] for rank in range(ranks)]


def choose(whole: Asked, ranks: int) -> Tensor:
    """What all ranks choose, one below the other."""
    fields = {
        name: blocks(value, ranks) if isinstance(value, Tensor) else [value] * ranks
        for name, value in whole._asdict().items()
    }
    parts = [Asked(**{name: cast(Any, own[rank]) for name, own in fields.items()}) for rank in range(ranks)]
    chosen = on_threads(ranks, lambda rank, shards: largest([parts[rank]], cast(Any, shards))[0])
    return torch.cat(chosen)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 30), st.sampled_from([1, 3, 10**6]))
def test_by_magnitude(
    native: bool, dtype: torch.dtype, seed: int, ranks: int, rows: int, levels: int
) -> None:
    if native and native_library.MISSING:
        pytest.skip(native_library.MISSING)
    values = scores(seed, rows, dtype, levels)
    mask = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    active = int(mask.sum())
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr("sparseopt_kernels.topology.sharded_parts.supports", lambda asked: False)
            patch.setattr(sharded_selection, "supports", lambda asked: False)
        for drop in {0, active // 3, active}:
            kept = drop_smallest(mask, values.abs(), drop)
            asked = Asked(values=values, candidates=mask, k=active - drop)
            assert torch.equal(choose(asked, ranks), kept)
            grow = min(drop, int((~kept).sum()))
            grown = grow_largest(kept, mask, values.abs(), grow)
            asked = Asked(values=values, candidates=~kept, k=grow, first=mask)
            assert torch.equal(choose(asked, ranks) | kept, grown)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 30))
def test_by_signed_scores(dtype: torch.dtype, seed: int, ranks: int, rows: int) -> None:
    values = scores(seed, rows, torch.float64, 3)
    values = (
        (values.nan_to_num(nan=0.0, posinf=9.0, neginf=-9.0) * 1000).long()
        if dtype == torch.int64
        else values
    )
    values = values.to(dtype)
    mask = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    k = int(mask.sum()) // 2
    kept = drop_smallest(mask, values, int(mask.sum()) - k)
    assert torch.equal(choose(Asked(values=values, candidates=mask, k=k, signed=True), ranks), kept)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_random_growth(seed: int, ranks: int, rows: int, density: float, share: float) -> None:
    kept = torch.rand(rows, 7, generator=torch.Generator().manual_seed(seed)) < density
    free = int((~kept).sum())
    k = int(share * free)
    whole = grow_random(kept, k, generator(seed, 1, 2))
    parts = blocks(kept, ranks)
    sizes = [part.numel() for part in parts]
    frees = [int((~part).sum()) for part in parts]

    def grow(rank: int, shards: Any) -> Tensor:
        asked = RandomGrowth(kept=parts[rank], k=k, generator=generator(seed, 1, 2), size=kept.numel())
        before = sum(frees[:rank]), sum(sizes[:rank])
        return sharded_selection.grow_random(asked, free, *before, shards)

    assert torch.equal(torch.cat(on_threads(ranks, grow)), whole)
