"""What a backend does not support goes to the reference backend: here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .contract import Backend, Inputs, NormOver, Plan, Tensors, UnseenWrite
from .reference import REFERENCE
from .tensor_memory import addresses_of


def plan_with_fallback(backend: Backend, tensors: Sequence[Tensors]) -> Plan:
    """The backend's plan for what it supports, and the reference's for the rest."""
    supported = [i for i, t in enumerate(tensors) if backend.supports(t)]
    if len(supported) == len(tensors):
        return backend.plan(tensors)
    others = sorted(set(range(len(tensors))) - set(supported))
    shares = [(other, indices) for other, indices in ((backend, supported), (REFERENCE, others)) if indices]
    return _SharedPlan([(b.plan([tensors[i] for i in indices]), indices) for b, indices in shares])


class _SharedPlan:
    """Several plans, and which of the tensors each is for."""

    def __init__(self, shares: Sequence[tuple[Plan, list[int]]]) -> None:
        self._shares = shares

    def step(self, inputs: Inputs) -> None:
        for plan, indices in self._shares:
            plan.step(_of(inputs, indices))

    def squared_norm(self, inputs: Inputs, over: NormOver) -> Tensor:
        squares = [plan.squared_norm(_of(inputs, indices), over) for plan, indices in self._shares]
        return sum(squares[1:], start=squares[0])

    def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
        return [write for plan, _ in self._shares for write in plan.unseen_writes(everything)]


def _of(inputs: Inputs, indices: Sequence[int]) -> Inputs:
    gradients = [inputs.gradients[i] for i in indices]
    return inputs._replace(gradients=gradients, addresses=addresses_of(gradients))
