"""A step that is prepared is made: buffers are stored, the norm is limited, and plans are carried out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter

from ..sharding import local_part, with_local_parts
from .amp import Amp
from .change_detection import State
from .gradients import Gradients
from .inputs import inputs_of, limit_norm
from .preparation import Prepared


def is_skipped(prepared: Prepared, amp: Amp) -> bool:
    """Tell if AMP skips the step, as far as the host knows."""
    # Whether a first step with dampening is made decides on the next one: it is worth waiting for.
    if amp.found_inf is None or not (prepared.on_host or prepared.has_first_steps):
        return False
    return amp.found_inf.item() != 0  # a sum over devices: may exceed 1


def makes_state_alone(state: State, groups: Sequence[dict[str, Any]]) -> bool:
    """Tell if the step is made by ``torch.distributed.checkpoint``, to have a state: it must change nothing.

    There is no state then, all learning rates are 0, and so are all gradients.
    """
    if state or any(_is_on_device(group["lr"]) or float(group["lr"]) != 0 for group in groups):
        return False
    gradients = (p.grad for group in groups for p in group["params"] if p.grad is not None)
    return not any(bool(local_part(gradient).any()) for gradient in gradients)


def _is_on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


@contextmanager
def stored(buffers: Mapping[Parameter, Tensor], state: State) -> Iterator[None]:
    """Put new momentum buffers into the state. If the step fails, the state becomes what it was."""
    former = {p: dict(state[p]) if p in state else None for p in buffers}
    try:
        for p, buffer in buffers.items():
            state[p]["momentum_buffer"] = buffer
        yield
    except BaseException:
        for p, own in former.items():
            state.pop(p, None)
            if own is not None:
                state[p] = own
        raise


def make_step(
    prepared: Prepared,
    gradients: Gradients,
    groups: Sequence[dict[str, Any]],
    amp: Amp,
) -> None:
    """Update what is prepared.

    Args:
        prepared: the step.
        gradients: those of all parameters.
        groups: the optimizer's parameter groups.
        amp: GradScaler's scale and verdict.
    """
    batches = prepared.batches
    inputs = [inputs_of(batch, prepared, gradients, groups, amp) for batch in batches]
    limits = [groups[rule.group]["max_grad_norm"] for rule in prepared.rules]
    if (batches or prepared.shards) and limits.count(None) < len(limits):
        inputs = limit_norm(batches, inputs, limits, prepared)
    written = with_local_parts(prepared.updated) if prepared.shards else prepared.updated
    # Kernels write through pointers, and autograd must notice it; before the write, so that whatever
    # interrupts it cannot leave one that was not counted.
    increment_version(written)
    for batch, own in zip(batches, inputs, strict=True):
        batch.plan.step(own)
