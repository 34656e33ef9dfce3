"""The parameters of a step as they are found; of sharded ones, the part of this rank. Nothing is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..correction import Correction
from ..kernels.gpu.device import refuse_capture
from ..kernels.tensor_memory import versions_of
from ..masks.mapping import neurons_in
from ..sharding import Shards, local_part, shards_of, told, with_local_parts
from .change_detection import State, owners_and_masks


class RuleSource(NamedTuple):
    """A rule of a step, and the parameter group that it is read from."""

    group: int
    is_first_step: bool
    """True for parameters that are updated for the first time in a group with dampening: it is left out
    then."""


class Found(NamedTuple):
    """A parameter that has a gradient, or had one before and has a mask.

    Of a sharded parameter, ``tensor``, ``gradient``, ``buffer`` and ``mask`` are the parts of this rank.
    """

    parameter: Parameter
    """As the optimizer has it."""
    position: int
    """Its index among all of the optimizer's."""
    tensor: Tensor
    """The parameter."""
    gradient: Tensor | None
    buffer: Tensor | None
    stored_buffer: Tensor | None
    """The buffer as the state has it, or is to have it."""
    is_new: bool
    """True if the buffer is not in the state yet."""
    mask: Tensor | None
    mask_writes: int
    """The number of writes to the mask, as PyTorch counts them."""
    gradient_dtype: torch.dtype
    masked: list[Tensor]
    """What the mask applies to: parameter and buffer."""
    watched: list[Tensor]
    """The same; of a sharded parameter also both as a whole, to which PyTorch counts writes apart."""
    correction: Correction
    """``"auto"`` is resolved."""
    is_clipped: bool
    """True if its group has a ``max_grad_norm``."""
    rule: RuleSource
    shards: Shards | None
    """The ranks that have it; None if it is not sharded."""


def find(
    parameters: Sequence[Parameter],
    groups: Sequence[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    feeding_norm: Collection[Parameter],
    known: Collection[Parameter],
) -> list[Found]:
    """Look at every parameter. Nothing is checked or written.

    Args:
        parameters: all of the optimizer's.
        groups, state, masks: the optimizer's.
        feeding_norm: the parameters that are corrected in groups whose correction is "auto".
        known: the parameters that had a gradient before.
    """
    group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
    mask_of = dict(zip(masks, owners_and_masks(masks)[1], strict=True))
    found = []
    for position, p in enumerate(parameters):
        gradient, mask, index = p.grad, mask_of.get(p), group_of[p]
        group = groups[index]
        # What never had a gradient is left alone, as SGD would. In a copy, what has a state had one.
        if gradient is None and (mask is None or not (p in known or state.get(p))):
            continue
        has_momentum = group["momentum"] != 0
        buffer = state.get(p, {}).get("momentum_buffer") if has_momentum else None
        is_new = gradient is not None and buffer is None and has_momentum
        if is_new:
            refuse_capture(p.device)
            with torch.inference_mode(False):  # an inference tensor has no version to watch
                buffer = torch.zeros_like(p, requires_grad=False)
        correction: Correction = group["correction"]
        if group["correction"] == "auto":
            correction = "layer" if p in feeding_norm else "none"
        masked: list[Tensor] = [p] if buffer is None else [p, buffer]
        found.append(
            Found(
                parameter=p,
                position=position,
                tensor=p,
                gradient=gradient,
                buffer=buffer,
                stored_buffer=buffer,
                is_new=is_new,
                mask=mask,
                mask_writes=0 if mask is None else mask._version,
                gradient_dtype=p.dtype if gradient is None else gradient.dtype,
                masked=masked,
                watched=masked,
                correction=correction,
                is_clipped=group["max_grad_norm"] is not None,
                rule=RuleSource(index, is_first_step=is_new and group["dampening"] != 0),
                shards=None,
            )
        )
    return found


def on_this_rank(found: Sequence[Found]) -> list[Found]:
    """Return what was found, of sharded parameters the parts that are on this rank."""
    return [_on_this_rank(f) for f in found]


def _on_this_rank(f: Found) -> Found:
    shards = shards_of(f.parameter)
    if shards is None:
        return f
    return f._replace(
        tensor=local_part(f.tensor),
        gradient=None if f.gradient is None else local_part(f.gradient),
        buffer=None if f.buffer is None else local_part(f.buffer),
        mask=None if f.mask is None else local_part(f.mask),
        mask_writes=0 if f.mask is None else sum(versions_of(with_local_parts([f.mask]))),
        masked=[local_part(tensor) for tensor in f.masked],
        watched=with_local_parts(f.watched),
        shards=shards,
    )


def check(found: Sequence[Found], masks: Mapping[Parameter, Tensor], names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError`` unless gradients and momentum buffers, which may come from any checkpoint, fit.

    Args:
        found: what was found.
        masks: the optimizer's.
        names: names of the parameters.
    """
    for f in found:
        p, gradient, buffer, name = f.tensor, f.gradient, f.buffer, names[f.parameter]
        if f.shards is not None or hasattr(buffer, "device_mesh"):
            _check_sharding(f, masks, name)
        if gradient is not None and gradient.layout is not torch.strided and f.mask is not None:
            raise ValueError(
                f"{name!r} has a mask and a gradient of layout {gradient.layout}, it must be torch.strided"
            )
        if gradient is not None and gradient.shape != p.shape:
            raise ValueError(
                f"the gradient of {name!r} has shape {tuple(gradient.shape)}, the parameter has "
                f"{tuple(p.shape)}"
            )
        if buffer is not None and buffer.shape != p.shape:
            raise ValueError(
                f"the momentum_buffer of {name!r} has shape {tuple(buffer.shape)}, the parameter has "
                f"{tuple(p.shape)}: the optimizer's state is that of another network"
            )
        if buffer is not None and buffer.device != p.device:
            raise ValueError(
                f"the momentum_buffer of {name!r} is on {buffer.device}, the parameter on {p.device}"
            )


def _check_sharding(f: Found, masks: Mapping[Parameter, Tensor], name: str) -> None:
    """Raise ``ValueError`` unless gradient and buffer are sharded as the parameter is, by neurons."""
    for what, tensor in (("gradient", f.parameter.grad), ("momentum_buffer", f.stored_buffer)):
        if tensor is not None and shards_of(tensor) != f.shards:
            raise ValueError(
                f"the {what} of {name!r} is {told(tensor)}, and the parameter is {told(f.parameter)}: both "
                "must be sharded alike, as fully_shard and torch.distributed.checkpoint leave them"
            )
    if f.shards is None or not f.shards.is_divided() or f.mask is None or f.correction == "none":
        return
    if neurons_in(masks, f.parameter).dim != 0:
        raise ValueError(
            f"{name!r} has its neurons in dimension 1 (ConvTranspose, or Conv1D of transformers), and is "
            "sharded along dimension 0, so that every rank has a part of each neuron: set correction='none' "
            "for it, keep it out of fully_shard (ignored_params=...), or leave it dense"
        )
