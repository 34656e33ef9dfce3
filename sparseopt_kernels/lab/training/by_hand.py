"""Masked SGD in plain PyTorch, as a baseline. Nothing of this package is used here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter


class MaskedSGD(torch.optim.SGD):
    """Masked SGD: mask the gradients, clip them, step ``torch.optim.SGD``, mask the weights.

    While the masks do not change, it computes the same as ``SparseOpt(correction="none")``, to rounding. When
    a mask changes, the momentum of a dropped weight decays here, while SparseOpt zeroes it. A skipped step
    zeroes it here, too.

    Args:
        params: as for ``torch.optim.SGD``.
        masks: by parameter, of its shape, bool or of its dtype. The mapping and its tensors may change
            between two steps.
        max_grad_norm: limit of the global norm of the masked gradients; None: no clipping.
        skips: called in each step; if it returns True, the step only applies the masks.
        sgd: all other arguments of ``torch.optim.SGD``.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        masks: Mapping[Parameter, Tensor],
        max_grad_norm: float | None = None,
        skips: Callable[[], bool] = lambda: False,
        **sgd: Any,
    ) -> None:
        super().__init__(params, **sgd)
        self._masks, self._max_grad_norm, self._skips = masks, max_grad_norm, skips

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step. Unlike SparseOpt it writes into ``p.grad``: RigL must read the gradients before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._skips():
            for p, mask in self._masks.items():
                p.mul_(mask)
                buffer = self.state[p].get("momentum_buffer")
                if buffer is not None:
                    buffer.mul_(mask)
            return loss
        for p, mask in self._masks.items():
            if p.grad is not None:
                p.grad.mul_(mask)
        if self._max_grad_norm is not None:
            self._clip(self._max_grad_norm)
        super().step()
        for p, mask in self._masks.items():
            p.mul_(mask)
        return loss

    def _clip(self, limit: float) -> None:
        """Divide the gradients by ``max(norm / limit, 1)``.

        ``torch.nn.utils.clip_grad_norm_`` adds 1e-6 to the norm. That small difference is enough for RigL to
        grow other weights a few updates later.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        coefficient = 1.0 / max(float(torch.linalg.vector_norm(torch.stack(norms))) / limit, 1.0)
        for gradient in gradients:
            gradient.mul_(coefficient)
