"""Which tensors share memory, by hand and against a list of all addresses."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseopt_kernels.masks.shared_memory import overlapping_pairs

BASE = torch.zeros(6, 8)

VIEWS = {
    "all": (BASE, BASE, True),
    "transposed": (BASE, BASE.t(), True),
    "a row": (BASE, BASE[3], True),
    "neighbouring rows": (BASE[:3], BASE[3:], False),
    "rows with one in common": (BASE[:4], BASE[3:], True),
    "left and right columns": (BASE[:, :4], BASE[:, 4:], False),
    "columns with one in common": (BASE[:, :5], BASE[:, 4:], True),
    "even and odd columns": (BASE[:, ::2], BASE[:, 1::2], False),
    "nothing of it": (BASE, BASE[:0], False),
    "a copy": (BASE, BASE.clone(), False),
    "another type": (BASE, BASE.view(torch.int16)[:, 3:4], True),
}


def pairs(*tensors: Tensor) -> list[tuple[int, int]]:
    return sorted(overlapping_pairs(tensors))


def test_known_answers() -> None:
    for name, (one, other, expected) in VIEWS.items():
        assert pairs(one, other) == pairs(other, one) == [(0, 1)] * expected, name


def test_of_many_all_pairs_are_found() -> None:
    others = [torch.zeros(3) for _ in range(4)]
    assert pairs(BASE[0], others[0], BASE, others[1], BASE.t()[2], others[2]) == [(0, 2), (0, 4), (2, 4)]


def addresses(tensor: Tensor) -> set[int]:
    size = tensor.element_size()
    starts = [tensor[i, j].data_ptr() for i in range(tensor.shape[0]) for j in range(tensor.shape[1])]
    return {start + byte for start in starts for byte in range(size)}


slices = st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.tuples(slices, slices, st.booleans()), min_size=2, max_size=4))
def test_against_all_addresses(cuts: list) -> None:
    views = [BASE[slice(*rows), slice(*columns)] for rows, columns, _ in cuts]
    views = [v.t() if cut[2] else v for v, cut in zip(views, cuts, strict=True)]
    n = len(views)
    expected = [
        (i, j) for i in range(n) for j in range(i + 1, n) if addresses(views[i]) & addresses(views[j])
    ]
    assert pairs(*views) == expected
