"""Checks of what hooks return and write. An error names the method, the hook and the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..kernels.tensor_memory import versions_of
from .hooks import Counts, Layer, Magnitude


class WriteGuard:
    """Notices writes to the masks, weights and gradients of layers that PyTorch counts.

    Args:
        method: the name of the method whose hooks are called.
        layers: the layers that no hook may write to.
    """

    def __init__(self, method: str, layers: Sequence[Layer]) -> None:
        self._method = method
        self._layers = layers
        self._gradients = [layer.parameter.grad for layer in layers]
        counted = [
            (what, layer, tensor)
            for layer in layers
            for what, tensor in (
                ("mask", layer.stored_mask),
                ("weight", layer.weight),
                ("gradient", layer.gradient),
            )
            if tensor is not None and not tensor.is_inference()
        ]
        self._places = [(what, layer) for what, layer, _ in counted]
        self._tensors = [tensor for *_, tensor in counted]
        self._versions = versions_of(self._tensors)

    def check(self, hook: str) -> None:
        """Raise ``RuntimeError`` if anything was written; ``hook`` is the one that was called last."""
        versions = versions_of(self._tensors)
        gradients = [layer.parameter.grad for layer in self._layers]
        if versions == self._versions and all(map(is_, gradients, self._gradients)):
            return
        before = zip(self._places, versions, self._versions, strict=True)
        written = [place for place, now, then in before if now != then]
        replaced = zip(self._layers, gradients, self._gradients, strict=True)
        written += [("gradient", layer) for layer, now, then in replaced if now is not then]
        what, layer = written[0]
        raise RuntimeError(
            f"{self._method}.{hook} wrote to the {what} of {layer.name!r}: a hook returns counts and scores, "
            "and must not write to masks, weights or gradients"
        )


def check_counts(method: str, returned: Any, layers: Sequence[Layer], min_fan_in: int) -> list[Counts]:
    """Return the counts of the hook ``counts``, one for each of these layers.

    Raises:
        TypeError: they are not a sequence of :class:`Counts`, or of numbers or int64 tensors.
        ValueError: there are too few or too many of them, or one is out of range.
    """
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise TypeError(
            f"{method}.counts returned a {type(returned).__name__}, it must be a sequence of Counts"
        )
    if len(returned) != len(layers):
        raise ValueError(
            f"{method}.counts returned {len(returned)} counts, it must be one for each of the {len(layers)} "
            f"layers that it was given ({', '.join(repr(layer.name) for layer in layers)})"
        )
    checked = []
    for counts, layer in zip(returned, layers, strict=True):
        try:
            checked.append(_checked_counts(counts, layer, min_fan_in))
        except (TypeError, ValueError) as error:
            told = f"{method}.counts returned {counts!r} for {layer.name!r}"
            raise type(error)(f"{told}{error}") from None
    return checked


def _checked_counts(counts: Any, layer: Layer, min_fan_in: int) -> Counts:
    """Return the counts of a layer, or raise an error that says what they must be."""
    if not isinstance(counts, tuple) or len(counts) != 2:
        raise TypeError(", it must be Counts(drop, grow)")
    drop, grow = counts
    if isinstance(drop, Tensor) and isinstance(grow, Tensor):
        _check_by_neuron(drop, grow, layer, min_fan_in)
        return Counts(drop, grow)
    if not all(isinstance(k, Integral) and not isinstance(k, bool) for k in counts):
        raise TypeError(", it must have two integers, or two int64 tensors with a number per neuron")
    drop, grow = int(drop), int(grow)
    most = layer.numel - layer.active + drop
    if not 0 <= drop <= layer.active:
        raise ValueError(f": drop must be in [0, {layer.active}], the number of active weights")
    if not 0 <= grow <= most:
        raise ValueError(f": grow must be in [0, {most}], the number of weights that are not kept")
    if 0 < grow < layer.missing:
        raise ValueError(
            f": grow must be 0 or at least {layer.missing}, the inputs that neurons have less than "
            f"min_fan_in ({min_fan_in})"
        )
    return Counts(drop, grow)


def _check_by_neuron(drop: Tensor, grow: Tensor, layer: Layer, min_fan_in: int) -> None:
    number, inputs = layer.neurons.sizes(layer.weight.shape)
    for what, k in (("drop", drop), ("grow", grow)):
        if k.dtype != torch.int64 or k.shape != (number,) or k.device != layer.weight.device:
            raise ValueError(
                f": {what} has dtype {k.dtype} and shape {tuple(k.shape)} on {k.device}, it must be "
                f"torch.int64 of shape ({number},), one for each neuron, on {layer.weight.device}"
            )
    fan_in = layer.fan_in()
    if bool(((drop < 0) | (drop > fan_in)).any()):
        raise ValueError(": drop must be at least 0 and at most the fan-in of each neuron")
    if bool(((grow < 0) | (grow > inputs - fan_in + drop)).any()):
        raise ValueError(
            ": grow must be at least 0 and at most the number of weights of each neuron that are not kept"
        )
    if bool((fan_in - drop + grow < min(min_fan_in, inputs)).any()):
        raise ValueError(f": a neuron would have fewer inputs than min_fan_in ({min_fan_in})")


def check_score(method: str, hook: str, score: Any, layer: Layer) -> float:
    """Return the least value of a score, or 0.0 of a ``Magnitude``; NaN is no score.

    The weight of the layer may have NaN, which is ranked last, and its gradient is checked elsewhere.

    Raises:
        TypeError: it is neither a tensor nor a ``Magnitude`` of one.
        ValueError: its shape, dtype or device is not as it must be, or it has NaN.
    """
    told = f"{method}.{hook} returned a score for {layer.name!r} that"
    values = score.values if isinstance(score, Magnitude) else score
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{method}.{hook} returned a {type(score).__name__} for {layer.name!r}, it must be a tensor, or "
            "Magnitude(tensor)"
        )
    weight = layer.weight
    if values.shape != weight.shape:
        raise ValueError(f"{told} has shape {tuple(values.shape)}, the weight has {tuple(weight.shape)}")
    if values.device != weight.device:
        raise ValueError(f"{told} is on {values.device}, the weight is on {weight.device}")
    is_complex = values.is_complex() and not isinstance(score, Magnitude)
    if values.dtype == torch.bool or is_complex or values.layout is not torch.strided:
        raise ValueError(
            f"{told} has dtype {values.dtype} and layout {values.layout}, it must be dense, of real numbers"
        )
    if isinstance(score, Magnitude):
        _check_factors(told, score.factors, weight)
        if values is not weight and values is not layer.gradient and bool(values.isnan().any()):
            raise ValueError(f"{told} has NaN")
        return 0.0
    if values.numel() == 0:
        return 0.0
    least = float(values.min())  # NaN, if there is one
    if math.isnan(least):
        raise ValueError(f"{told} has NaN")
    return least


def _check_factors(told: str, factors: Tensor | None, weight: Tensor) -> None:
    if factors is None:
        return
    try:
        fits = factors.expand(weight.shape) is not None
    except RuntimeError:
        fits = False
    if not fits or factors.device != weight.device:
        raise ValueError(
            f"{told} has factors of shape {tuple(factors.shape)} on {factors.device}, they must broadcast to "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    if not bool((factors >= 0).all()):
        raise ValueError(f"{told} has factors that are negative or NaN")
