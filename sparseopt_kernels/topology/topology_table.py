"""A sparse training method in numbers: a record, or a line of a table, for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from ..masks.mapping import neurons_in, whole_fan_in
from ..text_table import aligned
from .layer_update import LayerUpdate

if TYPE_CHECKING:
    from .dynamic_sparse_training import DynamicSparseTraining

_HEADER = ("parameter", "active", "explored", "dead neurons", "dropped", "grown", "died", "revived", "to one")


class TopologySummary(TypedDict):
    """A masked parameter in numbers: a record of ``summary()``."""

    name: str
    """Its name in the model; ``"parameter 0"`` and so on, if the masks are a dict."""
    active: int
    """The number of active weights."""
    exploration_rate: float
    """The fraction of its weights that have been active at some time, in [0, 1]."""
    dead_neurons: int
    """The number of neurons without an active weight."""
    neurons: int
    """The number of neurons."""
    dropped: int
    """The number of weights that left the mask in the last update."""
    grown: int
    """The number of weights that were new in it then."""
    died: int
    """The number of neurons that lost their last active weight then."""
    revived: int
    """The number of neurons that got a first active weight then."""
    largest_share: float
    """The part of the new weights that went to the neuron with most of them, in [0, 1]."""


@torch.no_grad()
def summary(method: DynamicSparseTraining) -> list[TopologySummary]:
    """Return one record for each layer, in the order of the masks. On a GPU, each waits for the device."""
    rates, last = method.exploration_rates(), method.last_update
    records: list[TopologySummary] = []
    for name, (parameter, mask) in zip(rates, method.masks.items(), strict=True):
        inputs = whole_fan_in(mask, neurons_in(method.masks, parameter)).cpu()
        update = last.get(name, LayerUpdate())
        records.append(
            {
                "name": name,
                "active": int(inputs.sum()),
                "exploration_rate": rates[name],
                "dead_neurons": inputs.numel() - int(inputs.count_nonzero()),
                "neurons": inputs.numel(),
                "dropped": update.dropped,
                "grown": update.grown,
                "died": update.died,
                "revived": update.revived,
                "largest_share": update.largest_share,
            }
        )
    return records


def table(method: DynamicSparseTraining) -> str:
    """Return the summary as a table in plain text, a line for each layer. Dashes: there was no update yet."""
    last = method.last_update
    lines = [
        (
            record["name"],
            f"{record['active']:,}",
            f"{record['exploration_rate']:.4f}",
            f"{record['dead_neurons']:,} of {record['neurons']:,}",
            *(f"{record[key]:,}" if last else "-" for key in ("dropped", "grown", "died", "revived")),
            f"{record['largest_share']:.0%}" if last else "-",
        )
        for record in summary(method)
    ]
    return "\n".join(line.rstrip() for line in aligned([_HEADER, *lines]))
