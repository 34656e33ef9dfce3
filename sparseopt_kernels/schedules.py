"""The learning-rate schedule of the paper (App. E.2): linear warm-up, then cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class _WarmupCosine:
    """The learning rate at a step as a multiple of ``peak``.

    An object and not a closure, because ``LambdaLR.state_dict`` saves the attributes of an object.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    start_lr: float
    end_lr: float

    def __call__(self, step: int) -> float:
        # LambdaLR multiplies: no factor takes a group of learning rate 0 anywhere else.
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
    """Linear warm-up to each group's own learning rate, then cosine decay (App. E.2 of the paper).

    With ``t`` the number of ``scheduler.step()`` calls so far and ``peak`` the group's ``lr``::

        t < warmup_steps:  start_lr + (peak - start_lr) * t / warmup_steps
        otherwise:         end_lr + (peak - end_lr) / 2
                                  * (1 + cos(pi * (t - warmup_steps) / (total_steps - warmup_steps)))

    After ``total_steps`` it stays at ``end_lr``. A group whose ``lr`` is 0 stays at 0.

    The defaults are the paper's for CIFAR-100 (peak 0.1, from 0 to 1e-6). For ImageNet: ``start_lr=1e-5,
    end_lr=1e-5``, and the optimizer made with ``lr=0.1 * batch_size / 256``, ``batch_size`` being that of
    all ranks together. The paper warms up for 5 epochs. The unit is one call of ``scheduler.step()``:
    count both numbers in steps and call it after every ``opt.step()``, or both in epochs and call it once
    per epoch.

    Make the schedule before loading a checkpoint into the optimizer, as for every scheduler of PyTorch:
    making one sets the learning rates of step 0. As there, a group's ``initial_lr``, left by an earlier
    scheduler, is the peak if there is one.

    Args:
        optimizer: any optimizer; tensor learning rates are written in place.
        warmup_steps: at least 0. With 0 the first step is taken at the peak.
        total_steps: more than ``warmup_steps``.
        start_lr: learning rate of the first step; not negative.
        end_lr: learning rate at ``total_steps``; not negative.

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
    factors = [_WarmupCosine(peak, warmup_steps, total_steps, start_lr, end_lr) for peak in peaks]
    return LambdaLR(optimizer, list(factors))
