"""The choice of active weights: known answers, examples by hand, a brute-force oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseopt_kernels.topology.seeding import generator
from sparseopt_kernels.topology.selection import drop_smallest, grow_largest, grow_random


def bits(text):
    return torch.tensor([character == "1" for character in text.replace(" ", "")])


def rigl_mask(mask, drop_score, grow_score, k):
    return grow_largest(drop_smallest(mask, drop_score, k), mask, grow_score, k)


def oracle(mask, drop_score, grow_score, k):
    """The same by sorting lists: largest score first, then active first, then index."""

    def ranking(candidates, score):
        return sorted(candidates, key=lambda i: (-score[i], not mask[i], i))

    active = [i for i in range(len(mask)) if mask[i]]
    kept = ranking(active, drop_score)[: len(active) - k]
    grown = ranking([i for i in range(len(mask)) if i not in kept], grow_score)[:k]
    return [i in kept or i in grown for i in range(len(mask))]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, "01010110"),
        (0.25, "11010100"),
        (0.5, "11001100"),
        (0.75, "10101100"),
        (1.0, "10101100"),
    ],
)
def test_known_answers_of_jaxpruner(fraction, expected):
    # Their test drops by the signed value and grows by the magnitude.
    values = torch.tensor([-9.0, 1, 4, -1, 5, 8, -2, 3])
    mask = bits("01010110")
    new = rigl_mask(mask, values, values.abs(), int(fraction * 4))
    assert new.tolist() == bits(expected).tolist()


@pytest.mark.parametrize(
    ("mask", "drop_score", "grow_score", "k", "expected"),
    [
        ("11110000", [4, 3, 2, 1, 0, 0, 0, 0], [0, 0, 9, 1, 2, 3, 4, 5], 2, "11100001"),
        ("11110000", [0] * 8, [1, 1, 1, 1, 2, 2, 1, 1], 2, "11001100"),
        ("00001111", [0] * 8, [0] * 8, 2, "00001111"),
        ("00001111", [0] * 8, [5] * 8, 3, "00001111"),
        ("11110000", [5, 5, 5, 5, 0, 0, 0, 0], [0, 0, 0, 0, 7, 7, 7, 7], 3, "10001110"),
        ("11100000", [3, 2, 1, 0, 0, 0, 0, 0], [0, 4, 0, 4, 4, 4, 0, 0], 2, "11010000"),
        ("11111111", [1] * 8, [1] * 8, 8, "11111111"),
        ("00000000", [1] * 8, [1] * 8, 0, "00000000"),
        ("11000000", [1, math.nan] + [0] * 6, [0] * 7 + [9], 1, "10000001"),
        ("11000000", [1, 2] + [0] * 6, [1, 0, math.nan, 0, 0, 0, 0, 0], 1, "11000000"),
        ("11000000", [1, 2] + [0] * 6, [math.nan] * 8, 1, "11000000"),
        ("11000000", [1, 2] + [0] * 6, [-math.inf] * 7 + [math.inf], 1, "01000001"),
        ("11000000", [-math.inf] * 8, [-math.inf] * 8, 2, "11000000"),
    ],
    ids=[
        "a_dropped_weight_regrows",
        "zeros_drop_only_active_ones",
        "ties_prefer_what_was_active",
        "ties_prefer_what_was_active_when_growing",
        "ties_prefer_the_low_index",
        "active_then_low_index",
        "full",
        "empty",
        "nan_drops_first",
        "nan_never_grows",
        "all_nan",
        "infinite",
        "all_minus_infinity",
    ],
)
def test_by_hand(mask, drop_score, grow_score, k, expected):
    new = rigl_mask(bits(mask), torch.tensor(drop_score).float(), torch.tensor(grow_score).float(), k)
    assert new.tolist() == bits(expected).tolist()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(1, 24), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_against_the_oracle_with_many_ties(data, size, dtype):
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    scores = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    drop_score, grow_score = data.draw(scores), data.draw(scores)
    k = data.draw(st.integers(0, sum(mask)))
    before = torch.tensor(mask)
    new = rigl_mask(before, torch.tensor(drop_score, dtype=dtype), torch.tensor(grow_score, dtype=dtype), k)
    assert new.tolist() == oracle(mask, drop_score, grow_score, k)
    assert before.tolist() == mask


def test_index_means_the_logical_one_in_any_memory_format():
    torch.manual_seed(0)
    mask = torch.rand(8, 4, 3, 3) < 0.4
    drop_score = torch.randint(0, 3, mask.shape).float()
    grow_score = torch.randint(0, 3, mask.shape).float()
    expected = rigl_mask(mask, drop_score, grow_score, 20)
    mask, drop_score, grow_score = (
        t.to(memory_format=torch.channels_last) for t in (mask, drop_score, grow_score)
    )
    assert torch.equal(rigl_mask(mask, drop_score, grow_score, 20), expected)


def test_random_growth_is_uniform_over_all_that_is_not_kept():
    kept = bits("1100 0000")
    counts = torch.zeros(8)
    for update in range(2000):
        grown = grow_random(kept, 3, generator(0, 0, update))
        assert int(grown.sum()) == 5
        counts += grown
    assert counts[:2].tolist() == [2000, 2000]
    # 1000 expected for each; the standard deviation is 22.
    assert (counts[2:] - 1000).abs().max() < 5 * 22
