"""How the GPU backends carry out a step: tensors whose masks are new in one pass over their neurons, all
others sector by sector. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...correction import Factors
from ...neurons import arithmetic_dtype
from ..contract import Inputs, NormOver, ParamState, UnseenWrite
from ..memory import Rows, has_rows, is_non_overlapping_and_dense, rows_of
from .dense_norm import dense_squared_norm
from .device import (
    Shared,
    capturing,
    current_stream,
    device_guard,
    keep_for_graph,
    refuse_capture,
    reserve_staging,
)
from .lists import ListKernels, Sectors, list_masks
from .tables import Layout, Member, SectorLaunch, StepLaunch, Tiles, are_aligned, lay_out

_GRAPHS = 4  # that can be captured after each other, without a step outside of them


class GpuKernels(ListKernels, Tiles, Protocol):
    """What a GPU backend launches. All of it is queued on the current stream."""

    def place(self, addresses: bytes, device: torch.device) -> Any:
        """Return addresses of gradients, 8 bytes each, as the kernels take them: on the device or not."""

    def masked_step(self, launch: StepLaunch, gradients: Any, inputs: Inputs) -> None:
        """Count fan-in from masks, and apply the update rule."""

    def sector_step(self, launch: SectorLaunch, gradients: Any, inputs: Inputs) -> None:
        """Apply the update rule."""

    def sector_squares(self, launch: SectorLaunch, gradients: Any) -> Tensor:
        """Return the sum of ``(c_i g)^2`` over the active weights, in parts that are to be summed up."""


class _Listed:
    """The rows of a parameter and the lists of its mask, kept from plan to plan."""

    def __init__(self, rows: Rows, sectors: Sectors | None) -> None:
        self.rows, self.sectors = rows, sectors

    @property
    def is_new(self) -> bool:
        """True until a step has been made with the mask."""
        return self.rows.mask is not None

    def forget_mask(self) -> None:
        self.rows = self.rows._replace(mask=None)

    def memory(self, with_mask: bool) -> list[Tensor]:
        """Return what kernels read of it; the mask only in one pass."""
        mask = [self.rows.mask] if with_mask and self.rows.mask is not None else []
        return [*mask, *(self.sectors or ())]


class GpuBackend:
    """A ``contract.Backend`` but for ``unavailable``. It makes the lists of masks, once for each.

    Args:
        kernels: what it launches.
        dtypes: of the weights that these update.
    """

    def __init__(self, kernels: GpuKernels, dtypes: Collection[torch.dtype]) -> None:
        self._kernels, self._dtypes = kernels, dtypes
        self._cache: WeakKeyDictionary[ParamState, _Listed] = WeakKeyDictionary()

    def host_scalars(self, device: torch.device) -> bool:
        return False

    def supports(self, param: ParamState) -> bool:
        dtype = param.parameter.dtype
        return dtype in self._dtypes and is_non_overlapping_and_dense(param) and has_rows(param)

    def fan_in(self, params: Sequence[ParamState]) -> Tensor:
        counts = [own.sectors.fan_in for own in self._listed(params) if own.sectors is not None]
        return torch.cat(counts).to(arithmetic_dtype(params[0].parameter.dtype))

    def plan(self, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> GpuPlan:
        return GpuPlan(self._kernels, params, self._listed(params), factors)

    def _listed(self, params: Sequence[ParamState]) -> list[_Listed]:
        rows = {param: rows_of(param) for param in params if param not in self._cache}
        masked = [param for param, own in rows.items() if own.mask is not None]
        if masked:
            device = masked[0].parameter.device
            refuse_capture(device)
            with device_guard(device):
                found = list_masks(self._kernels, masked, [rows[param] for param in masked])
            for param, sectors in zip(masked, found, strict=True):
                self._cache[param] = _Listed(rows[param], sectors)
        for param, own in rows.items():
            self._cache.setdefault(param, _Listed(own, None))
        return [self._cache[param] for param in params]


class _Placed(NamedTuple):
    """Launches, and the addresses of gradients for each of them."""

    addresses: bytes
    layout: Layout
    layout_memory: Shared
    gradients: list[Any]
    gradient_memory: Shared


class GpuPlan:
    """The launches for certain parameters, and the addresses of their gradients in the last step."""

    def __init__(
        self,
        kernels: GpuKernels,
        params: Sequence[ParamState],
        listed: Sequence[_Listed],
        factors: Sequence[Factors | None],
    ) -> None:
        self._kernels, self._params, self._listed, self._factors = kernels, params, listed, factors
        self._device = params[0].parameter.device
        self._new = [i for i, own in enumerate(listed) if own.is_new]
        self._placed: _Placed | None = None

    def step(self, inputs: Inputs) -> None:
        # All of it: whether a graph is captured is a question to a stream of this device.
        with device_guard(self._device):
            if self._new:  # made in a step that AMP or an update of the masks has left out
                refuse_capture(self._device)
            placed = self._place(inputs.addresses, self._new)
            for launch, gradients in zip(placed.layout.launches, placed.gradients, strict=True):
                if isinstance(launch, StepLaunch):
                    self._kernels.masked_step(launch, gradients, inputs)
                else:
                    self._kernels.sector_step(launch, gradients, inputs)
            if self._new:
                for i in self._new:
                    self._listed[i].forget_mask()
                self._new = []
                self._load_kernels(inputs)

    def _load_kernels(self, inputs: Inputs) -> None:
        """Launch what the next step launches, for no chunks.

        A CUDA graph can be captured of kernels that were loaded before, and the next step waits for no
        compiler.
        """
        placed = self._place(inputs.addresses, [])
        none = torch.zeros((), dtype=torch.int64, device=self._device)
        for launch, gradients in zip(placed.layout.launches, placed.gradients, strict=True):
            assert isinstance(launch, SectorLaunch)
            self._kernels.sector_step(launch._replace(chunks=none), gradients, inputs)

    def squared_norm(self, inputs: Inputs, over: NormOver) -> Tensor:
        with device_guard(self._device):
            if over == "dense":
                return dense_squared_norm(self._params, self._factors, inputs)
            placed = self._place(inputs.addresses, [])
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for launch, gradients in zip(placed.layout.launches, placed.gradients, strict=True):
                assert isinstance(launch, SectorLaunch)
                total += self._kernels.sector_squares(launch, gradients).sum(dtype=torch.float64)
        return total

    def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
        return []  # to look would be to wait for the device

    def native_table(self) -> None:
        return None

    def _place(self, addresses: bytes, new: Sequence[int]) -> _Placed:
        """Return the launches that suit gradients at these addresses, and the addresses on the device.

        Memory that is copied while a graph is captured serves that graph alone.
        """
        placed = self._placed
        if placed is None or placed.addresses != addresses or new:
            placed = self._place_anew(addresses, new)
        if not capturing():
            # The norm and the step of a graph, each with a layout and addresses of its own.
            nbytes = _GRAPHS * 2 * (placed.layout.nbytes + 2 * len(addresses))
            reserve_staging(self, nbytes, self._device)
        current = current_stream(self._device)
        placed.layout_memory.use(current)
        placed.gradient_memory.use(current)
        keep_for_graph((placed.layout_memory, placed.gradient_memory))
        return placed

    def _place_anew(self, addresses: bytes, new: Sequence[int]) -> _Placed:
        last = self._placed
        aligned = are_aligned(addresses) if self._kernels.by_alignment else bytes(len(self._params))
        if last is not None and last.layout.gradients_aligned == aligned and not new:
            layout, layout_memory = last.layout, last.layout_memory
        else:
            members = [
                Member(param=param, rows=own.rows, sectors=own.sectors, factors=factors)
                for param, own, factors in zip(self._params, self._listed, self._factors, strict=True)
            ]
            layout = lay_out(members, aligned, frozenset(new), self._kernels)
            memory = [t for own in self._listed for t in own.memory(with_mask=bool(new))]
            memory += [t for own in self._factors for t in own or ()]
            layout_memory = Shared([*layout.memory(), *memory], self._device)
        gradients = [
            self._kernels.place(_in_order(addresses, launch.members), self._device)
            for launch in layout.launches
        ]
        gradient_memory = Shared([t for t in gradients if isinstance(t, Tensor)], self._device)
        placed = _Placed(
            addresses=addresses,
            layout=layout,
            layout_memory=layout_memory,
            gradients=gradients,
            gradient_memory=gradient_memory,
        )
        if not capturing() and not new:
            self._placed = placed
        return placed


def _in_order(addresses: bytes, members: Sequence[int]) -> bytes:
    if 8 * len(members) == len(addresses):  # all, in order
        return addresses
    return b"".join(addresses[8 * i : 8 * i + 8] for i in members)
