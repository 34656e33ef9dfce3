"""Which tensors a step is about, found at the smallest cost: from parameter groups to batches.

Most steps are like the one before: the same parameters have gradients, and nothing but those moved.
Seeing that takes a few list operations; only when something did change is every parameter looked at.
No arithmetic here, and nothing of backends.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter

from .device_flags import DeviceFlags
from .kernels.contract import Batch, Entry
from .kernels.device import refuse_capture
from .masks import Masks, check_mask
from .neurons import Neurons

State = MutableMapping[Tensor, dict[str, Any]]


class Batcher:
    """Keeps the entries of one optimizer from step to step.

    Args:
        groups: the optimizer's parameter groups.
        masks: the optimizer's masks.
        names: what to call each parameter in an error.
        former: what was used before, for the same parameters and others behind them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        masks: Mapping[Parameter, Tensor],
        names: Mapping[Tensor, str],
        former: Batcher | None = None,
    ) -> None:
        self._masks = masks
        self._masked_parameters = list(masks)
        self._group_parameters = [list(group["params"]) for group in groups]
        self._parameters: list[Parameter] = []
        self._entries: list[Entry] = []
        for i, group in enumerate(groups):
            for p in group["params"]:
                neurons = masks.neurons(p) if isinstance(masks, Masks) and p in masks else Neurons()
                self._parameters.append(p)
                self._entries.append(Entry(p, names[p], i, neurons, masked=p in masks))
        self._complex = [i for i, p in enumerate(self._parameters) if p.is_complex()]
        # What the batches were made from. They are good for as long as all of it stays the same.
        self._batches: list[Batch] = []
        self._grad_sizes: list[int] | None = None
        self._has_momentum: list[bool] = []
        self._all_states: list[dict[str, Any]] = []
        self._states: list[dict[str, Any]] = []
        self._buffers: list[Tensor] = []
        self._memory: tuple[list[Any], ...] = ()
        self._mask_tensors: list[Tensor] = []
        self._mask_versions: list[int] = []
        # The parameters in the batches, the masked ones of them, and those whose buffer is new.
        self._updated: list[Parameter] = []
        self._masked: list[tuple[Parameter, Entry]] = []
        self._born: list[tuple[Parameter, Entry]] = []
        self._flags: dict[torch.device, DeviceFlags] = {}
        if former is not None and _same(self._parameters[: len(former._parameters)], former._parameters):
            count = len(self._parameters)
            self._flags = {d: DeviceFlags(d, count, flags) for d, flags in former._flags.items()}
        # Those without a gradient whose mask changed.
        self._idle: list[tuple[Parameter, Entry]] = []

    def is_about(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups' parameters, and which of them have a mask, are those of the constructor."""
        return (
            len(groups) == len(self._group_parameters)
            and all(
                _same(g["params"], known) for g, known in zip(groups, self._group_parameters, strict=True)
            )
            # Which parameters a Masks is about never changes.
            and (isinstance(self._masks, Masks) or _same(list(self._masks), self._masked_parameters))
        )

    def collect(self, state: State, has_momentum: list[bool]) -> list[Batch]:
        """The batches of this step, checked. Nothing that a failed step would have to take back is
        written.

        Raises:
            ValueError: a mask was replaced by one that does not fit, the gradient of a masked parameter
                is sparse, or a gradient or a momentum buffer has not the parameter's shape.
        """
        grads = [p.grad for p in self._parameters]
        present = [grad for grad in grads if grad is not None]
        # Sparse ones are not contiguous.
        if any(map(Tensor.is_neg, present)) or not all(map(Tensor.is_contiguous, present)):
            grads = [
                None if grad is None else self._plain(grad, entry)
                for grad, entry in zip(grads, self._entries, strict=True)
            ]
        if not self._unchanged(grads, state, has_momentum):
            self._grad_sizes = None  # stays None if there is an error on the way
            self._rebuild(grads, state, has_momentum)
        for i in self._complex:
            grad = grads[i]
            grads[i] = None if grad is None else torch.view_as_real(grad.resolve_conj())
        for batch in self._batches:
            batch.grads = [grads[i] for i in batch.positions]  # type: ignore[misc]
        return self._batches

    def raise_flags(self, batches: list[Batch]) -> None:
        """Tell ``first_step`` and ``stale`` of the entries to backends that read them on the device.

        Raises:
            RuntimeError: the first step, or the first after a change of masks, is captured in a CUDA graph.
        """
        for device, here in _by_device(batches).items():
            flags = self._flags.get(device)
            if flags is None:
                flags = self._flags[device] = DeviceFlags(device, len(self._parameters))
            flags.raise_for(here)
            for batch in here:
                batch.flags = flags.flags

    def commit(self, state: State, device_batches: list[Batch]) -> None:
        """Record what the step wrote: all of it, except what a device, of the batches that
        ``raise_flags`` had, may have skipped."""
        for device, here in _by_device(device_batches).items():
            self._flags[device].lower(here[0].found_inf)
        # Kernels write through pointers: autograd must still notice a weight that changed under it.
        increment_version(self._updated)
        for p, entry in self._masked:
            buffer = entry.momentum_buffer
            entry.stale = False
            entry.parameter_version = p._version
            entry.buffer_version = -1 if buffer is None else buffer._version
        for p, entry in self._born:
            entry.first_step = False
            assert entry.momentum_buffer is not None
            buffer = entry.momentum_buffer
            state[p]["momentum_buffer"] = torch.view_as_complex(buffer) if p.is_complex() else buffer
            self._grad_sizes = None  # the new buffer is to be watched, too
        self._born = []
        for p, entry in self._idle:
            self._apply_mask(p, state.get(p, {}).get("momentum_buffer"), entry)
        self._idle = []

    def forget(self) -> None:
        """The step was not made, or not to its end: the next one is to look at everything again."""
        self._grad_sizes = None

    def release(self) -> None:
        """Let go of the gradients: ``zero_grad()`` must free their memory."""
        for batch in self._batches:
            batch.grads = []

    @staticmethod
    def _plain(grad: Tensor, entry: Entry) -> Tensor:
        """The gradient as memory that can be read: not sparse, not lazily negated."""
        if grad.layout is torch.strided:
            return grad.resolve_neg()
        if entry.masked:
            raise ValueError(
                f"{entry.name!r} has a mask and a gradient of layout {grad.layout}, it must be torch.strided"
            )
        return grad.to_dense()

    def _unchanged(self, grads: list[Tensor | None], state: State, has_momentum: list[bool]) -> bool:
        masks = _tensors(self._masks)
        if not (
            not self._complex
            and _sizes(grads) == self._grad_sizes
            and has_momentum == self._has_momentum
            and _same(list(state.values()), self._all_states)
            and _same([s.get("momentum_buffer") for s in self._states], self._buffers)
            and _same(masks, self._mask_tensors)
            and _places(self._updated, self._buffers, masks) == self._memory
            and [mask._version for mask in masks] == self._mask_versions
        ):
            return False
        for p, entry in self._masked:
            if _written(p, entry.momentum_buffer, entry):
                entry.stale = True
        return True

    def _rebuild(self, grads: list[Tensor | None], state: State, has_momentum: list[bool]) -> None:
        self._updated, self._states, self._buffers = [], [], []
        self._masked, self._born, self._idle = [], [], []
        batches: dict[tuple[torch.device, torch.dtype], Batch] = {}
        for i, (p, entry, grad) in enumerate(zip(self._parameters, self._entries, grads, strict=True)):
            if grad is None:
                if entry.masked:
                    changed = self._mask_changed(p, entry)
                    # A plan that is None tells of a change that an error kept from being applied. What never
                    # had a gradient is left alone, as SGD would.
                    if (changed or entry.plan is None) and entry.parameter_version != -1:
                        self._idle.append((p, entry))
                continue
            if grad.shape != p.shape:
                raise ValueError(
                    f"the gradient of {entry.name!r} has shape {tuple(grad.shape)}, "
                    f"the parameter has {tuple(p.shape)}"
                )
            buffer = None
            if has_momentum[entry.group]:
                own = state.get(p)
                buffer = own.get("momentum_buffer") if own else None
                entry.first_step = buffer is None
                if buffer is None:
                    refuse_capture()
                    with torch.inference_mode(False):  # an inference tensor has no version to watch
                        buffer = torch.zeros_like(p, requires_grad=False)
                    self._born.append((p, entry))
                else:
                    assert own is not None
                    _check_buffer(buffer, p, entry.name)
                    self._states.append(own)
                    self._buffers.append(buffer)
            if entry.masked:
                self._refresh_mask(p, buffer, entry)
                self._masked.append((p, entry))
            self._refresh_memory(p, buffer, entry)
            self._updated.append(p)
            place = (p.device, entry.parameter.dtype)
            batch = batches.setdefault(place, Batch(*place))
            batch.entries.append(entry)
            batch.positions.append(i)
        self._batches = list(batches.values())
        self._grad_sizes = _sizes(grads)
        self._has_momentum = has_momentum
        self._all_states = list(state.values())
        self._mask_tensors = _tensors(self._masks)
        self._memory = _places(self._updated, self._buffers, self._mask_tensors)
        self._mask_versions = [mask._version for mask in self._mask_tensors]

    def _mask_changed(self, p: Parameter, entry: Entry) -> bool:
        """Whether the mask is another than at the last step; if so, the entry's is brought up to date."""
        mask = self._masks[p]
        if mask is entry.mask and (mask.data_ptr(), mask._version) == entry.mask_place:
            return False
        check_mask(mask, p, entry.name)
        entry.mask, entry.mask_place = mask, (mask.data_ptr(), mask._version)
        entry.plan = None
        return True

    def _refresh_mask(self, p: Parameter, buffer: Tensor | None, entry: Entry) -> None:
        self._mask_changed(p, entry)
        if buffer is not entry.momentum_buffer or _written(p, buffer, entry):
            entry.stale = True

    @staticmethod
    def _apply_mask(p: Parameter, buffer: Tensor | None, entry: Entry) -> None:
        """What backends do to a parameter that has a gradient, for one that has none."""
        assert entry.mask is not None
        for tensor in (p, buffer):
            if tensor is not None:
                tensor.masked_fill_(~entry.mask, 0)
        entry.stale = True  # the versions have moved on

    @staticmethod
    def _refresh_memory(p: Parameter, buffer: Tensor | None, entry: Entry) -> None:
        buffer_address = None if buffer is None else buffer.data_ptr()
        memory = (p.data_ptr(), p.shape, p.stride(), p.dtype, p.device, buffer_address)
        if memory != entry.memory:
            entry.memory = memory
            entry.plan = None
        if entry.plan is None:
            entry.stale = entry.masked
        entry.parameter, entry.momentum_buffer = p, buffer
        if p.is_complex():
            # Complex numbers are updated as pairs of real ones: every operation of the rule is
            # real-linear, and a mask with each element doubled has the same ratios of fan-in.
            entry.parameter = torch.view_as_real(p)
            entry.momentum_buffer = None if buffer is None else torch.view_as_real(buffer)
            if entry.mask is not None:
                entry.mask = entry.mask.unsqueeze(-1).expand(*p.shape, 2)
                entry.plan = None


def _by_device(batches: list[Batch]) -> dict[torch.device, list[Batch]]:
    devices: dict[torch.device, list[Batch]] = {}
    for batch in batches:
        devices.setdefault(batch.device, []).append(batch)
    return devices


def _same(these: list[Any], those: list[Any]) -> bool:
    """Whether two lists hold the same objects (not: equal ones; tensors compare by element)."""
    return len(these) == len(those) and all(map(is_, these, those))


def _places(parameters: list[Parameter], buffers: list[Tensor], masks: list[Tensor]) -> tuple[list[Any], ...]:
    """Where the memory of tensors is, and whether parameters lie in it in order: ``.data`` may be
    anything tomorrow. (That a parameter has another size or dtype is seen by its gradient.)"""
    return (
        [*map(Tensor.data_ptr, parameters), *map(Tensor.data_ptr, buffers), *map(Tensor.data_ptr, masks)],
        [*map(Tensor.is_contiguous, parameters)],
    )


def _sizes(grads: list[Tensor | None]) -> list[int]:
    return [-1 if grad is None else grad.numel() for grad in grads]


def _check_buffer(buffer: Tensor, p: Parameter, name: str) -> None:
    """Raise ``ValueError`` unless a momentum buffer, which may come from any checkpoint, fits."""
    if buffer.shape != p.shape:
        raise ValueError(
            f"the momentum_buffer of {name!r} has shape {tuple(buffer.shape)}, the parameter has "
            f"{tuple(p.shape)}: the optimizer's state is that of another network"
        )
    if buffer.device != p.device:
        raise ValueError(
            f"the momentum_buffer of {name!r} is on {buffer.device}, the parameter on {p.device}"
        )


def _tensors(masks: Mapping[Parameter, Tensor]) -> list[Tensor]:
    return masks.tensors() if isinstance(masks, Masks) else list(masks.values())


def _written(p: Parameter, buffer: Tensor | None, entry: Entry) -> bool:
    """Whether somebody else wrote into a parameter or its buffer since the last step."""
    return p._version != entry.parameter_version or (
        buffer is not None and buffer._version != entry.buffer_version
    )
