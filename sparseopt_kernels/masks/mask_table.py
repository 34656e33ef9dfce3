"""A table of a model's masks: a record or a line for each layer.

Nothing here changes a mask, and masks need not be boolean.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, TypedDict

from torch.nn.parameter import Parameter

from ..text_table import aligned

if TYPE_CHECKING:
    from .mapping import Masks

_HEADER = ("parameter", "shape", "active", "sparsity", "fan-in least", "mean", "most", "dead neurons")


class LayerSummary(TypedDict):
    """A masked parameter in numbers: a record of ``Masks.summary()``."""

    name: str
    """Its qualified name in the model."""
    shape: tuple[int, ...]
    """Its shape."""
    active: int
    """The number of active weights."""
    sparsity: float
    """The fraction of its weights that is inactive, in [0, 1]."""
    fan_in_least: int
    """The smallest number of active weights of a neuron."""
    fan_in_mean: float
    """The mean number of active weights of a neuron."""
    fan_in_most: int
    """The largest number of active weights of a neuron."""
    dead_neurons: int
    """The number of neurons without an active weight."""
    neurons: int
    """The number of neurons."""


def summary(masks: Masks) -> list[LayerSummary]:
    """Return one record for each masked parameter, in model order.

    Each mask is read once. On a GPU, each layer waits for the device once.
    """
    return [_summary_of(masks, name, parameter) for name, parameter in masks.named().items()]


def table(masks: Masks) -> str:
    """Return the summary as a table in plain text, a line for each layer and one for all of them."""
    records = summary(masks)
    weights = sum(prod(record["shape"]) for record in records)
    active = sum(record["active"] for record in records)
    dead = sum(record["dead_neurons"] for record in records)
    neurons = sum(record["neurons"] for record in records)
    total = (
        f"{len(records)} parameter{'' if len(records) == 1 else 's'}",
        f"{weights:,} weights",
        f"{active:,}",
        f"{_sparsity(active, weights):.4f}",
        "",
        "",
        "",
        _dead(dead, neurons),
    )
    lines = aligned([_HEADER, *map(_cells, records), total])
    return "\n".join(line.rstrip() for line in [*lines[:-1], lines[1], lines[-1]])


def _summary_of(masks: Masks, name: str, parameter: Parameter) -> LayerSummary:
    fan_in = masks.fan_in(parameter).cpu()
    active, neurons = int(fan_in.sum()), fan_in.numel()
    return {
        "name": name,
        "shape": tuple(parameter.shape),
        "active": active,
        "sparsity": _sparsity(active, parameter.numel()),
        "fan_in_least": int(fan_in.min()) if neurons else 0,
        "fan_in_mean": active / max(1, neurons),
        "fan_in_most": int(fan_in.max()) if neurons else 0,
        "dead_neurons": neurons - int(fan_in.count_nonzero()),
        "neurons": neurons,
    }


def _cells(record: LayerSummary) -> tuple[str, ...]:
    return (
        record["name"],
        "x".join(map(str, record["shape"])),
        f"{record['active']:,}",
        f"{record['sparsity']:.4f}",
        f"{record['fan_in_least']:,}",
        f"{record['fan_in_mean']:,.1f}",
        f"{record['fan_in_most']:,}",
        _dead(record["dead_neurons"], record["neurons"]),
    )


def _sparsity(active: int, weights: int) -> float:
    return (weights - active) / max(1, weights)


def _dead(dead: int, neurons: int) -> str:
    return f"{dead:,} of {neurons:,}"
