"""``c_i`` of the parameters of a step: from the fan-in that backends count, once for each change of a
mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..correction import Correction, Factors, FanIn, correction_factors
from ..kernels.contract import Backend, ParamState
from ..kernels.gpu.device import upload
from ..user_warning import warn

_CONCENTRATED = 3
"""The largest ``c_i`` without a warning."""


class Corrected(NamedTuple):
    """A masked parameter whose gradient is corrected."""

    param: ParamState
    backend: Backend
    correction: Correction
    parameter: Parameter
    """As the optimizer has it; ``param`` has the pairs of real numbers of a complex one."""
    name: str
    is_clipped: bool
    """True if the norm of its gradient is limited."""
    mean_fan_in: float | None = None
    """Of the whole layer, where this rank has a part of it."""


def with_factors(
    corrected: Sequence[Corrected], known: Mapping[ParamState, Factors], warned: set[Parameter]
) -> dict[ParamState, Factors]:
    """Return the factors of these parameters. Where Eq. 12 makes a new one larger than 3, warn.

    Args:
        corrected: the parameters.
        known: factors that need not be computed again.
        warned: the parameters that there was a warning of; new ones are added.
    """
    factors = {own.param: known[own.param] for own in corrected if own.param in known}
    batches: dict[tuple[object, ...], list[Corrected]] = {}
    for own in corrected:
        if own.param not in factors:
            like = own.param.parameter
            key = own.backend, own.correction, like.device, like.dtype, own.mean_fan_in is None
            batches.setdefault(key, []).append(own)
    for batch in batches.values():
        params = [own.param for own in batch]
        assert batch[0].correction != "none"
        sizes = [param.neurons.sizes(param.parameter.shape) for param in params]
        fan_in = with_sizes(batch[0].backend.fan_in(params), sizes)
        if batch[0].mean_fan_in is not None:
            means = torch.tensor([own.mean_fan_in for own in batch], dtype=torch.float64, device="cpu")
            device = fan_in.counts.device
            fan_in = fan_in._replace(mean=means if device.type == "cpu" else upload(means, device))
        found = correction_factors(fan_in, batch[0].correction)
        neurons = [number for number, _ in sizes]
        split = torch.split(found.c, neurons), found.divisor.unbind(), torch.split(fan_in.counts, neurons)
        for own, c, divisor, counts in zip(batch, *split, strict=True):
            factors[own.param] = Factors(c, divisor)
            if own.correction == "layer":
                warn_of_concentration(own, factors[own.param], counts, warned)
    return factors


def with_sizes(counts: Tensor, sizes: Sequence[tuple[int, int]]) -> FanIn:
    """Return what a backend has counted, and the sizes of the layers: see ``Neurons.sizes``."""
    both = torch.tensor(sizes, device="cpu").T.contiguous()
    neurons, full = both if counts.device.type == "cpu" else upload(both, counts.device)
    return FanIn(counts=counts, neurons=neurons, full=full)


def warn_of_concentration(own: Corrected, factors: Factors, fan_in: Tensor, warned: set[Parameter]) -> None:
    """Warn, once for each layer, if some ``c_i`` is larger than 3. No step waits for a device to tell."""
    if own.parameter in warned or own.parameter.device.type != "cpu":
        return
    largest = float(factors.c.max())
    if largest <= _CONCENTRATED:
        return
    warned.add(own.parameter)
    neurons, pairs = factors.c.numel(), 2 if own.parameter.is_complex() else 1
    mean = round(float(factors.divisor) * neurons) / neurons / pairs  # it may be rounded to float32
    mean = mean if own.mean_fan_in is None else own.mean_fan_in / pairs
    warn(
        f"{own.name!r}: fan-in is concentrated in few neurons. Eq. 12 multiplies the gradient of one by "
        f"c_i = {largest:.2f}: its fan-in is {int(fan_in.max()) // pairs}, the mean of the layer "
        f"{mean:.1f}. With RigL at high sparsity this was seen to cost accuracy, but little if gradients are "
        f"clipped{', as they are' if own.is_clipped else ': set max_grad_norm=1'}. "
        "Compare with correction='none' or 'unnormalized' in the parameter group of this layer, or with SET"
    )
