"""A sparse training method whose answers are told to it, and a layer of eight weights for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from by_hand import parameter_with
from torch import Tensor, nn

from sparseopt_kernels import DynamicSparseTraining
from sparseopt_kernels.topology.hooks import Counts, Layer, Score


class Method(DynamicSparseTraining):
    """A method whose answers are given when it is made."""

    settings = (*DynamicSparseTraining.settings, "told")

    def __init__(
        self, masks: Any, counts: Any, drop: Any = None, grow: Any = None, change: Any = None, **options: Any
    ) -> None:
        super().__init__(masks, **{"update_every": 1, "stop_at": math.inf, "skip_step": False, **options})
        self.told = 1
        self.answers = (counts, drop, grow)
        self.change = change
        self.asked: list[str] = []

    def counts(self, layers: Sequence[Layer], step: int) -> Sequence[Counts]:
        self.asked.append(f"counts {[layer.name for layer in layers]} {step}")
        told = self.answers[0]
        return told(layers, step) if callable(told) else told

    def drop_score(self, layer: Layer) -> Score:
        self.asked.append(f"drop_score {layer.name}")
        told = self.answers[1]
        return super().drop_score(layer) if told is None else told(layer)

    def grow_score(self, layer: Layer) -> Score | None:
        self.asked.append(f"grow_score {layer.name}")
        told = self.answers[2]
        return None if told is None else told(layer)

    def can_change(self, layer: Layer) -> bool:
        return super().can_change(layer) if self.change is None else self.change(layer)


def eight() -> tuple[nn.Parameter, Tensor]:
    """Eight weights, four of them active."""
    parameter = parameter_with([4.0, -1, 0, 0, 3, -2, 0, 0], [0.0, 0, 5, 6, 0, 0, 8, 7])
    return parameter, parameter.detach() != 0
