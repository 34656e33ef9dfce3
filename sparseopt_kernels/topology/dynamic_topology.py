"""When masks change during training, and what is remembered of it: shared by SET, RigL and GMP.

Which weights are chosen is in ``mask_update.py``, and how it is done for all layers in ``updates.py``.
Nothing here knows the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .masked_layers import check_masks
from .native_updates import NativeUpdates, supports
from .updates import Layer, TorchUpdates, Updates


class DynamicTopology:
    """A clock that counts training steps and lets a subclass update the masks when it is time."""

    _settings: ClassVar[tuple[str, ...]] = ("update_every", "stop_at")

    def __init__(self, masks: Mapping[Parameter, Tensor], update_every: int, stop_at: float) -> None:
        if not (update_every >= 1 and update_every == int(update_every)):
            raise ValueError(f"update_every is {update_every}, it must be an integer of at least 1 (steps)")
        if not stop_at > 0.0:
            raise ValueError(f"stop_at is {stop_at}, it must be positive (steps)")
        self._names = check_masks(masks)
        self.masks = masks
        self.update_every = int(update_every)
        self.stop_at = float(stop_at)
        self._step = 0
        self._due = False
        self._updated = False
        self._explored = [mask.clone() for mask in masks.values()]

    @property
    def updated(self) -> bool:
        """True if the last call of :meth:`step` changed a mask.

        False when no update was due, when it was postponed, when every dropped weight grew again, and
        before the first call, also of a resumed run.
        """
        return self._updated

    @torch.no_grad()
    def step(self) -> None:
        """Count one training step, and update the masks if an update is due.

        Call it once per optimizer step: ``loss.backward(); dst.step(); opt.step()``. Whether a mask
        changed is in :attr:`updated`; the optimizer's step is due in either case.
        """
        self._updated = False
        step = self._step + 1
        due = self._is_due(step)
        update = self._prepare(step) if due else None
        self._step = step
        self._due = due and update is None
        if update is not None:
            self._updated = any(update())

    def _is_due(self, step: int) -> bool:
        return step < self.stop_at and (self._due or step % self.update_every == 0)

    def _prepare(self, step: int) -> Callable[[], list[bool]] | None:
        """Return what writes the masks and tells which of them changed; None: not in this step.

        Nothing is written before it is called.
        """
        raise NotImplementedError

    def _begin(self) -> Updates:
        self._explored = [
            union.to(mask.device) for union, mask in zip(self._explored, self.masks.values(), strict=True)
        ]
        pairs = zip(self.masks.items(), self._explored, strict=True)
        layers = [Layer(parameter, mask, union) for (parameter, mask), union in pairs]
        return NativeUpdates(layers) if supports(layers) else TorchUpdates(layers)

    @torch.no_grad()
    def exploration_rate(self) -> float:
        """R_m, the in-time over-parameterisation rate of Liu et al. (2021), in [0, 1].

        The number of weights that have been active at some time (in the initial masks, in any since, or
        now), divided by the number of elements of the masked parameters.
        """
        explored = self._explored_so_far()
        return sum(int(union.count_nonzero()) for union in explored) / max(
            1, sum(union.numel() for union in explored)
        )

    def _explored_so_far(self) -> list[Tensor]:
        # The current mask is there for those who write into their masks themselves.
        pairs = zip(self._explored, self.masks.values(), strict=True)
        return [union.to(mask.device) | mask for union, mask in pairs]

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the model (whose buffers are the masks) and the optimizer.

        The settings, the number of steps, whether a postponed update is due, and, as a list of boolean
        tensors in the order of ``masks``, the weights explored so far. Python numbers, strings and
        tensors only: it survives ``torch.load(weights_only=True)``. ``drop_schedule`` is code and not
        among them: give the resumed run the same one.
        """
        settings = {name: getattr(self, name) for name in self._settings}
        return {**settings, "step": self._step, "due": self._due, "explored": self._explored_so_far()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the run that made ``state_dict`` was: from here on, bit for bit the same.

        The settings are replaced by the saved ones, as in PyTorch's optimizers and schedulers. The masks
        themselves come with the model's ``state_dict`` (or are the caller's to restore).

        Raises:
            ValueError: ``state_dict`` is another class's, or of masks of other shapes.
        """
        expected = {*self._settings, "step", "due", "explored"}
        if set(state_dict) != expected:
            raise ValueError(f"state_dict has keys {sorted(state_dict)}, it must have {sorted(expected)}")
        dtypes = {union.dtype for union in state_dict["explored"]}
        if dtypes != {torch.bool}:
            raise ValueError(f"state_dict['explored'] has tensors of {dtypes}, they must be torch.bool")
        shapes = [tuple(union.shape) for union in state_dict["explored"]]
        own_shapes = [tuple(union.shape) for union in self._explored]
        if shapes != own_shapes:
            raise ValueError(f"state_dict has masks of shapes {shapes}, they must be {own_shapes}")
        for name in self._settings:
            setattr(self, name, state_dict[name])
        self._step = state_dict["step"]
        self._due = state_dict["due"]
        self._updated = False
        pairs = zip(state_dict["explored"], self.masks.values(), strict=True)
        self._explored = [union.clone().to(mask.device) for union, mask in pairs]
