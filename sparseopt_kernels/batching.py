"""Which tensors a step is about, found at the smallest cost: from parameter groups to batches.

Most steps are like the one before: the same parameters have gradients, and nothing but those moved.
Seeing that takes a few list operations; only when something did change is every parameter looked at.
No arithmetic here, and nothing of backends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter

from .kernels.contract import Batch, Entry, Rule
from .layers import Neurons
from .masks import Masks, check_mask

State = MutableMapping[Tensor, dict[str, Any]]


class Batcher:
    """Keeps the entries of one optimizer from step to step.

    Args:
        groups: the optimizer's parameter groups.
        masks: the optimizer's masks.
        names: what to call each parameter in an error.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        masks: Mapping[Parameter, Tensor],
        names: Mapping[Tensor, str],
    ) -> None:
        self._masks = masks
        self._masked_parameters = list(masks)
        self._group_sizes = [len(group["params"]) for group in groups]
        self._parameters: list[Parameter] = []
        self._entries: list[Entry] = []
        for i, group in enumerate(groups):
            for p in group["params"]:
                neurons = masks.neurons(p) if isinstance(masks, Masks) and p in masks else Neurons()
                self._parameters.append(p)
                self._entries.append(Entry(p, names[p], i, neurons, masked=p in masks))
        self._complex = [i for i, p in enumerate(self._parameters) if p.is_complex()]
        self._single = [i for i, p in enumerate(self._parameters) if p.numel() == 1]
        # What the batches were made from. They are good for as long as all of it stays the same.
        self._batches: list[Batch] = []
        self._has_grad: list[bool] | None = None
        self._has_momentum: list[bool] = []
        self._all_states: list[dict[str, Any]] = []
        self._states: list[dict[str, Any]] = []
        self._buffers: list[Tensor] = []
        self._addresses: list[int] = []
        self._mask_tensors: list[Tensor] = []
        self._mask_versions: list[int] = []
        # The parameters in the batches, the masked ones of them, and those whose buffer is new.
        self._updated: list[Parameter] = []
        self._masked: list[tuple[Parameter, Entry]] = []
        self._born: list[tuple[Parameter, Entry]] = []

    def is_about(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the groups' parameters, and which of them have a mask, are those of the constructor."""
        parameters = [p for group in groups for p in group["params"]]
        return (
            _same(parameters, self._parameters)
            and [len(group["params"]) for group in groups] == self._group_sizes
            and _same(list(self._masks), self._masked_parameters)
        )

    def collect(self, state: State, rules: list[Rule]) -> list[Batch]:
        """The batches of this step, checked. Nothing that a failed step would have to take back is
        written.

        Raises:
            ValueError: a mask was replaced by one that does not fit, or the gradient of a masked
                parameter is sparse.
        """
        grads = [p.grad for p in self._parameters]
        for i, grad in enumerate(grads):
            if grad is not None and grad.layout is not torch.strided:
                grads[i] = self._dense(grad, self._entries[i])
        if not self._unchanged(grads, state, rules):
            self._has_grad = None  # stays None if there is an error on the way
            self._rebuild(grads, state, rules)
        for i in self._single:
            # A lazily negated gradient (of an imaginary part) looks like any other only if it is one number:
            # of more, it is never contiguous.
            grad = grads[i]
            grads[i] = None if grad is None else grad.resolve_neg()
        for i in self._complex:
            grad = grads[i]
            grads[i] = None if grad is None else torch.view_as_real(grad.resolve_conj())
        for batch in self._batches:
            batch.rules = rules
            batch.grads = [cast(Tensor, grads[i]) for i in batch.positions]
        return self._batches

    def commit(self, state: State) -> None:
        """Record what the step wrote."""
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
        self._born = []

    @staticmethod
    def _dense(grad: Tensor, entry: Entry) -> Tensor:
        if entry.masked:
            raise ValueError(
                f"{entry.name!r} has a mask and a gradient of layout {grad.layout}, it must be torch.strided"
            )
        return grad.to_dense()

    def _unchanged(self, grads: list[Tensor | None], state: State, rules: list[Rule]) -> bool:
        masks = _tensors(self._masks)
        if not (
            not self._complex
            and [grad is not None for grad in grads] == self._has_grad
            and [rule.momentum != 0 for rule in rules] == self._has_momentum
            and _same(list(state.values()), self._all_states)
            and _same([s.get("momentum_buffer") for s in self._states], self._buffers)
            and _addresses(self._updated, self._buffers) == self._addresses
            and _same(masks, self._mask_tensors)
            and [mask._version for mask in masks] == self._mask_versions
        ):
            return False
        for p, entry in self._masked:
            if _written(p, entry.momentum_buffer, entry):
                entry.stale = True
        return True

    def _rebuild(self, grads: list[Tensor | None], state: State, rules: list[Rule]) -> None:
        self._updated, self._states, self._buffers, self._masked, self._born = [], [], [], [], []
        batches: defaultdict[tuple[torch.device, torch.dtype], Batch] = defaultdict(Batch)
        for i, (p, entry, grad) in enumerate(zip(self._parameters, self._entries, grads, strict=True)):
            if grad is None:
                if entry.masked:
                    check_mask(self._masks[p], p, entry.name)
                continue
            buffer = None
            if rules[entry.group].momentum != 0:
                own = state.get(p)
                buffer = own.get("momentum_buffer") if own else None
                entry.first_step = buffer is None
                if buffer is None:
                    buffer = torch.zeros_like(p)
                    self._born.append((p, entry))
                else:
                    assert own is not None
                    self._states.append(own)
                    self._buffers.append(buffer)
            if entry.masked:
                self._refresh_mask(p, buffer, entry)
                self._masked.append((p, entry))
            self._refresh_memory(p, buffer, entry)
            self._updated.append(p)
            batch = batches[p.device, entry.parameter.dtype]
            batch.entries.append(entry)
            batch.positions.append(i)
        self._batches = list(batches.values())
        self._has_grad = [grad is not None for grad in grads]
        self._has_momentum = [rule.momentum != 0 for rule in rules]
        self._all_states = list(state.values())
        self._addresses = _addresses(self._updated, self._buffers)
        self._mask_tensors = _tensors(self._masks)
        self._mask_versions = [mask._version for mask in self._mask_tensors]

    def _refresh_mask(self, p: Parameter, buffer: Tensor | None, entry: Entry) -> None:
        mask = self._masks[p]
        if mask is not entry.mask or mask._version != entry.mask_version:
            check_mask(mask, p, entry.name)
            entry.mask, entry.mask_version = mask, mask._version
            entry.plan = None
        if buffer is not entry.momentum_buffer or _written(p, buffer, entry):
            entry.stale = True

    @staticmethod
    def _refresh_memory(p: Parameter, buffer: Tensor | None, entry: Entry) -> None:
        addresses = _addresses([p], [] if buffer is None else [buffer])
        if addresses != entry.addresses:
            entry.addresses = addresses
            entry.plan = None
        if entry.plan is None:
            entry.stale = True
        entry.parameter, entry.momentum_buffer = p, buffer
        if p.is_complex():
            # Complex numbers are updated as pairs of real ones: every operation of the rule is
            # real-linear, and a mask with each element doubled has the same ratios of fan-in.
            entry.parameter = torch.view_as_real(p)
            entry.momentum_buffer = None if buffer is None else torch.view_as_real(buffer)
            if entry.mask is not None:
                entry.mask = entry.mask.unsqueeze(-1).expand(*p.shape, 2)
                entry.plan = None


def _same(these: list[Any], those: list[Any]) -> bool:
    """Whether two lists hold the same objects (not: equal ones; tensors compare by element)."""
    return len(these) == len(those) and all(map(is_, these, those))


def _addresses(parameters: list[Parameter], buffers: list[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, parameters), *map(Tensor.data_ptr, buffers)]


def _tensors(masks: Mapping[Parameter, Tensor]) -> list[Tensor]:
    return masks.tensors() if isinstance(masks, Masks) else list(masks.values())


def _written(p: Parameter, buffer: Tensor | None, entry: Entry) -> bool:
    """Whether somebody else wrote into a parameter or its buffer since the last step."""
    return p._version != entry.parameter_version or (
        buffer is not None and buffer._version != entry.buffer_version
    )
