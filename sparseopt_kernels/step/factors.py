"""``c_i`` of the parameters of a step: from the fan-in that backends count, once for each change of a
mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.parameter import Parameter

from ..correction import Correction, Factors, correction_factors
from ..kernels.contract import Backend, ParamState
from ..user_warning import warn

_CONCENTRATED = 3
"""The largest ``c_i`` without a warning."""


class Corrected(NamedTuple):
    """A masked parameter whose gradient is corrected."""

    param: ParamState
    backend: Backend
    correction: Correction


def with_factors(
    corrected: Sequence[Corrected], known: Mapping[ParamState, Factors]
) -> dict[ParamState, Factors]:
    """Return the factors of these parameters.

    Args:
        corrected: the parameters.
        known: factors that need not be computed again.
    """
    factors = {own.param: known[own.param] for own in corrected if own.param in known}
    batches: dict[tuple[object, ...], list[Corrected]] = {}
    for own in corrected:
        if own.param not in factors:
            key = own.backend, own.correction, own.param.parameter.device, own.param.parameter.dtype
            batches.setdefault(key, []).append(own)
    for batch in batches.values():
        params = [own.param for own in batch]
        assert batch[0].correction != "none"
        found = correction_factors(batch[0].backend.fan_in(params), batch[0].correction)
        sizes = [param.neurons.count(param.parameter.shape) for param in params]
        parts = zip(torch.split(found.c, sizes), found.divisor.unbind(), strict=True)
        factors |= {param: Factors(*part) for param, part in zip(params, parts, strict=True)}
    return factors


def warn_of_concentration(
    parameter: Parameter, factors: Factors, name: str, is_clipped: bool, warned: set[Parameter]
) -> None:
    """Warn, once for each layer, if Eq. 12 makes some ``c_i`` larger than 3. No step waits for a device to
    tell.

    Args:
        parameter, factors: the parameter and its ``c_i``.
        name: its name.
        is_clipped: True if the norm of its gradient is limited.
        warned: the parameters that there was a warning of; this one is added.
    """
    if parameter in warned or parameter.device.type != "cpu":
        return
    largest = float(factors.c.max())
    if largest <= _CONCENTRATED:
        return
    warned.add(parameter)
    neurons = factors.c.numel()
    mean = round(float(factors.divisor) * neurons) / neurons  # it may be rounded to float32
    warn(
        f"{name!r}: fan-in is concentrated in few neurons. Eq. 12 multiplies the gradient of one by "
        f"c_i = {largest:.2f}: its fan-in is {round(largest**2 * mean)}, the mean of the layer "
        f"{mean:.1f}. With RigL at high sparsity this was seen to cost accuracy, unless "
        f"gradients are clipped{', as they are' if is_clipped else ': set max_grad_norm=1'}. Compare with "
        "correction='none' or 'unnormalized' in the parameter group of this layer, or with SET"
    )
