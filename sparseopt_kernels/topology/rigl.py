"""RigL: SET, but weights grow where gradients are largest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.parameter import Parameter

from ..correction import mask_factors
from .agreement import Group
from .drop_schedules import DropSchedule, cosine
from .hooks import Layer, Magnitude
from .set import SET


class RigL(SET):
    """Rigging the lottery (Evci et al. 2020): drop by magnitude, grow where the gradient is largest.

    ``loss.backward(); dst.step(); opt.step()``: call it once per optimizer step, while the gradients of
    that step are there. When masks change, how many weights drop, and what happens to the parameter and
    to the optimizer is as in :class:`SET`; but the weights that grow are those of largest dense gradient
    among all those not kept. Of equal gradients, a weight that was just dropped comes before an inactive
    one, and then the lower index first. Nothing is left to chance: there is no seed.

    Only the ranking counts: a loss scale need not be undone first. Gradients accumulated over
    micro-batches are ranked as they are summed. Gradients must be averaged over the ranks before the
    call, as ``DistributedDataParallel`` does in ``backward``; then every rank grows the same weights.

    A non-finite gradient on a masked parameter postpones the update to the next step whose gradients are
    finite. A parameter that is frozen, or without a gradient in this step, keeps its mask.

    It needs the gradients of all weights. If they were multiplied by the masks, there is nothing to rank by:
    ``step()`` warns once, and a layer of ``torch.nn.utils.prune`` is an error when ``RigL`` is made.

    Args:
        masks, drop_fraction, update_every, stop_at, drop_schedule, skip_step, process_group: as in
            :class:`SET`.
        min_fan_in: as in :class:`SET`; a neuron gets what it lacks by ``|p.grad|`` among its own inputs.
        regrow: ``"original"`` ranks by ``|p.grad|``, which the paper found better; ``"corrected"`` by
            ``c_i * |p.grad|`` with ``c_i = sqrt(fan_in_i / mean fan-in)`` of the mask before the update,
            the gradient that SparseOpt applies (Section 5.2, Figures 5 and 10). There, a neuron without
            active weights has ``c_i = 0`` and so grows last.

    Raises:
        ValueError: as in :class:`SET`; or ``regrow`` is unknown, or a layer was pruned by
            ``torch.nn.utils.prune``.
        TypeError: as in :class:`SET`.
        RuntimeError: as in :class:`SET`; or, from ``step()``, an update is due and no masked parameter has a
            gradient.
    """

    settings: ClassVar[tuple[str, ...]]
    settings = ("drop_fraction", "skip_step", "update_every", "stop_at", "min_fan_in", "regrow")
    uses_gradients = True

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        drop_fraction: float = 0.3,
        update_every: int = 100,
        *,
        stop_at: float,
        drop_schedule: DropSchedule = cosine,
        regrow: Literal["original", "corrected"] = "original",
        skip_step: bool = True,
        min_fan_in: int = 0,
        process_group: Group = "world",
    ) -> None:
        _check_regrow(regrow)
        super().__init__(
            masks,
            drop_fraction,
            update_every,
            stop_at=stop_at,
            drop_schedule=drop_schedule,
            skip_step=skip_step,
            min_fan_in=min_fan_in,
            process_group=process_group,
        )
        self.regrow = regrow

    def grow_score(self, layer: Layer) -> Magnitude:
        """Return the magnitude of the gradient, or of the gradient that SparseOpt applies."""
        assert layer.gradient is not None
        factors = None
        if self.regrow == "corrected":
            factors = mask_factors(layer.mask, layer.neurons, mean_fan_in=layer.mean_fan_in)
        return Magnitude(layer.gradient, factors)

    def _check_settings(self) -> None:
        super()._check_settings()
        _check_regrow(self.regrow)


def _check_regrow(regrow: str) -> None:
    if regrow not in ("original", "corrected"):
        raise ValueError(f"regrow is {regrow!r}, it must be 'original' or 'corrected'")
