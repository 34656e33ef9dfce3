"""The learning-rate schedule of the paper (Appendix E.2): linear warm-up, then cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class _WarmupCosine:
    """The factor by which ``LambdaLR`` multiplies ``peak`` at a step.

    A callable object and not a closure, because ``LambdaLR.state_dict`` saves the attributes of an object.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    start_lr: float
    end_lr: float

    def __call__(self, step: int) -> float:
        # LambdaLR multiplies, so a group whose learning rate is 0 stays at 0 with any factor.
        return self.learning_rate(step) / self.peak if self.peak else 0.0

    def learning_rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start_lr + (self.peak - self.start_lr) * (step / self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.end_lr + 0.5 * (self.peak - self.end_lr) * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int,
    start_lr: float = 0.0,
    end_lr: float = 1e-6,
) -> LambdaLR:
    """Return a learning-rate schedule: linear warm-up to the ``lr`` of each group, then cosine decay.

    This is the schedule of the paper (Appendix E.2). With ``t`` the number of ``scheduler.step()`` calls so
    far and ``peak`` the group's ``lr``::

        if t < warmup_steps:
            lr = start_lr + (peak - start_lr) * t / warmup_steps
        else:
            progress = (t - warmup_steps) / (total_steps - warmup_steps)
            lr = end_lr + (peak - end_lr) / 2 * (1 + cos(pi * progress))

    After ``total_steps`` the learning rate stays at ``end_lr``. A group whose ``lr`` is 0 stays at 0.

    The defaults are the paper's for CIFAR-100, where the peak is 0.1. For ImageNet, use ``start_lr=1e-5,
    end_lr=1e-5`` and an optimizer with ``lr=0.1 * batch_size / 256``, where ``batch_size`` is the sum over
    all ranks. The paper warms up for 5 epochs.

    Count ``warmup_steps`` and ``total_steps`` in calls of ``scheduler.step()``: in optimizer steps if it is
    called after every ``opt.step()``, in epochs if it is called once per epoch.

    As with every scheduler of PyTorch, making the schedule sets the learning rates of step 0: make it before
    you load a checkpoint into the optimizer. If a group has an ``initial_lr``, left by an earlier scheduler,
    that is its peak.

    Args:
        optimizer: any optimizer. A learning rate that is a tensor is written in place.
        warmup_steps: at least 0. With 0, the first step has the peak learning rate.
        total_steps: more than ``warmup_steps``.
        start_lr: learning rate of the first step, not negative.
        end_lr: learning rate at ``total_steps``, not negative.

    Returns:
        The scheduler. Call its ``step()``; it has a ``state_dict()``.

    Raises:
        ValueError: an argument is out of range or not finite.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, it must be at least 0 and less than total_steps ({total_steps})"
        )
    if not math.isfinite(total_steps):
        raise ValueError(f"total_steps is {total_steps}, it must be finite")
    for name, value in (("start_lr", start_lr), ("end_lr", end_lr)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} is {value}, it must be finite and not negative")
    peaks = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for index, peak in enumerate(peaks):
        if not math.isfinite(peak):
            raise ValueError(f"lr of parameter group {index} is {peak}, it must be finite")
    factors = [
        _WarmupCosine(
            peak=peak,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            start_lr=start_lr,
            end_lr=end_lr,
        )
        for peak in peaks
    ]
    return LambdaLR(optimizer, list(factors))
