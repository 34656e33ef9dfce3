"""Writes to masks and weights that PyTorch's version counters do not count: by collectives of
``torch.distributed``, by NumPy, DLPack or raw pointers.

In each step the CPU backend compares a part of each mask with what it has derived from it; all of it is
compared where ``SPARSEOPT_CHECK=1`` asks for that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter

from .. import native_library
from ..kernels.contract import ParamState
from ..masks.registered_masks import as_boolean
from ..sharding import local_part
from .preparation import Prepared

VARIABLE = "SPARSEOPT_CHECK"
_ADVICE = (
    "written without PyTorch counting it: by a collective of torch.distributed (or DistributedDataParallel's "
    "broadcast of buffers), NumPy, DLPack or a raw pointer"
)


def unseen_writes(prepared: Prepared, everything: bool = False) -> list[tuple[Parameter, bool]]:
    """Return the masked parameters that were written unseen: their mask (True), or weights outside of it.

    Args:
        prepared: the step that is about to be made. Its tensors must be where they were.
        everything: look at all memory, not at a part.
    """
    found = []
    for batch in prepared.batches:
        for param, to_mask in batch.plan.unseen_writes(everything):
            position = batch.positions[batch.params.index(param)]
            found.append((prepared.parameters[position], to_mask))
    return found


def raise_versions(found: Sequence[tuple[Parameter, bool]], masks: Mapping[Parameter, Tensor]) -> None:
    """Raise the versions of the masks and weights that were written unseen."""
    for parameter, to_mask in found:
        increment_version(masks[parameter] if to_mask else parameter)


def describe(found: Sequence[tuple[Parameter, bool]], names: Mapping[Tensor, str]) -> str:
    """Say what was noticed in a step, and what to call after such a write."""
    parameter, to_mask = found[0]
    name, others = names[parameter], len({p for p, _ in found}) - 1
    what, tensor, steps = (
        ("the mask of", "mask", native_library.MASK_TURNS)
        if to_mask
        else ("weights outside the mask of", "weight", native_library.WEIGHT_TURNS)
    )
    return (
        f"{what} {name!r}{f' (and of {others} more parameters)' * bool(others)} "
        f"{'was' if to_mask else 'were'} {_ADVICE}. The mask is applied from this step on, which may be "
        f"up to {steps} steps late. After such a write, call torch.autograd.graph.increment_version({tensor})"
    )


def is_check_asked_for() -> bool:
    """Tell if the environment variable ``SPARSEOPT_CHECK`` asks for a check of all masks in each step.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}, it must be 1 or 0")
    return value == "1"


class FullCheck:
    """Compares, before a step, all of each mask with what was derived from it, and zeros with the mask."""

    def __init__(self) -> None:
        self._masks: WeakKeyDictionary[ParamState, Tensor] = WeakKeyDictionary()

    def check(
        self, prepared: Prepared, masks: Mapping[Parameter, Tensor], names: Mapping[Tensor, str]
    ) -> None:
        """Raise ``RuntimeError``, naming the parameter, at the first thing that does not agree."""
        for parameter, to_mask in unseen_writes(prepared, everything=True):
            what = (
                "its mask and what was derived from it differ"
                if to_mask
                else "it is not zero outside its mask"
            )
            raise RuntimeError(_failure(names[parameter], what))
        for batch in prepared.batches:
            for position, param in zip(batch.positions, batch.params, strict=True):
                if param.mask is None:
                    continue
                parameter = prepared.parameters[position]
                mask = as_boolean(local_part(masks[parameter]))
                if not torch.equal(mask, self._masks.setdefault(param, mask.clone())):
                    raise RuntimeError(_failure(names[parameter], "its mask is not the one that was applied"))
                self._check_zeros(param, names[parameter])

    @staticmethod
    def _check_zeros(param: ParamState, name: str) -> None:
        assert param.mask is not None
        tensors = {"weights": param.parameter, "numbers of its momentum": param.momentum_buffer}
        for what, tensor in tensors.items():
            if tensor is not None and (count := int(((tensor != 0) & ~param.mask).count_nonzero())):
                raise RuntimeError(_failure(name, f"{count} {what} outside its mask are not zero"))


def _failure(name: str, what: str) -> str:
    return (
        f"{VARIABLE}=1: {name!r} fails the check before a step: {what}. Something was {_ADVICE}; call "
        "torch.autograd.graph.increment_version(tensor) after such a write"
    )
