"""Masks as a table and as records: answers that can be counted by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.masks.mask_table import summary, table
from sparseopt_kernels.topology.sparsify import sparsify


def make() -> tuple[Any, Masks]:
    """Two layers: neurons of fan-in 4, 1 and 0, and of fan-in 3 and 2 where dimension 1 counts neurons."""
    model: Any = nn.Sequential()
    model.add_module("head", nn.Linear(4, 3))
    model.add_module("up", nn.ConvTranspose1d(4, 2, 2, groups=2))
    rows = [[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    model.head.register_buffer("weight_mask", torch.tensor(rows).bool())
    # Channels 0 and 1 feed neuron 0, channels 2 and 3 feed neuron 1.
    channels = [[[1, 1]], [[1, 0]], [[0, 1]], [[0, 1]]]
    model.up.register_buffer("weight_mask", torch.tensor(channels).bool())
    return model, Masks(model)


def test_one_record_for_each_layer() -> None:
    _, masks = make()
    assert summary(masks) == [
        {
            "name": "head.weight",
            "shape": (3, 4),
            "active": 5,
            "sparsity": 7 / 12,
            "fan_in_least": 0,
            "fan_in_mean": 5 / 3,
            "fan_in_most": 4,
            "dead_neurons": 1,
            "neurons": 3,
        },
        {
            "name": "up.weight",
            "shape": (4, 1, 2),
            "active": 5,
            "sparsity": 3 / 8,
            "fan_in_least": 2,
            "fan_in_mean": 2.5,
            "fan_in_most": 3,
            "dead_neurons": 0,
            "neurons": 2,
        },
    ]


def test_records_hold_plain_numbers_for_loggers() -> None:
    record = summary(make()[1])[0]
    kinds = {key: type(value) for key, value in record.items()}
    assert {kinds[key] for key in ("active", "fan_in_least", "fan_in_most", "dead_neurons", "neurons")} == {
        int
    }
    assert {kinds["sparsity"], kinds["fan_in_mean"]} == {float}


def test_the_table_has_a_line_for_each_layer_and_one_for_all() -> None:
    assert table(make()[1]) == "\n".join(
        [
            "parameter          shape  active  sparsity  fan-in least  mean  most  dead neurons",
            "----------------------------------------------------------------------------------",
            "head.weight          3x4       5    0.5833             0   1.7     4        1 of 3",
            "up.weight          4x1x2       5    0.3750             2   2.5     3        0 of 2",
            "----------------------------------------------------------------------------------",
            "2 parameters  20 weights      10    0.5000                                  1 of 5",
        ]
    )


def test_changes_of_a_mask_are_seen() -> None:
    model, masks = make()
    model.head.weight_mask.fill_(False)
    assert summary(masks)[0]["dead_neurons"] == 3
    assert "3 of 3" in table(masks)


def test_it_agrees_with_what_masks_tell() -> None:
    masks = sparsify(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(100, 50)), 0.9)
    records = summary(masks)
    assert sum(record["active"] for record in records) == masks.nnz()
    for record, (name, parameter) in zip(records, masks.named().items(), strict=True):
        assert record["name"] == name
        assert record["fan_in_mean"] == pytest.approx(float(masks.fan_in(parameter).double().mean()))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a_weight_without_elements(shape: tuple[int, int]) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(shape))
    layer.register_buffer("weight_mask", torch.zeros(shape, dtype=torch.bool))
    (record,) = summary(Masks(layer))
    assert (record["active"], record["sparsity"], record["fan_in_least"], record["fan_in_most"]) == (
        0,
        0,
        0,
        0,
    )
    assert record["dead_neurons"] == record["neurons"] == shape[0]
    assert "1 parameter " in table(Masks(layer))
