"""Sharded parameters: each rank has a block of rows of a ``DTensor``, as ``fully_shard`` (FSDP2) makes it.

A row is a neuron, so kernels and masks work on the block of this rank alone. What is needed of the whole is
reduced over the ranks by ``Shards``. Nothing here imports ``torch.distributed.tensor``, which takes a second:
without it there is no ``DTensor``. Imports nothing of this package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import Parameter

_MODULE = "torch.distributed.tensor"
_PLAIN = (Tensor, Parameter)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


def is_sharded(tensor: object) -> bool:
    """Tell if a tensor is a ``DTensor``, also one of which every rank has all rows."""
    if type(tensor) in _PLAIN:  # quick, as most tensors are
        return False
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a ``DTensor`` that is on this rank; any other tensor is returned itself.

    It is the same object each time, while ``to_local`` makes a view, which takes some microseconds.
    """
    return cast(Tensor, cast(Any, tensor)._local_tensor) if is_sharded(tensor) else tensor


def local_parts(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return the part of each tensor that is on this rank."""
    return [None if tensor is None else local_part(tensor) for tensor in tensors]


def with_local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors, each ``DTensor`` before its local part: PyTorch counts writes to each apart."""
    return [own for t in tensors for own in ((t, local_part(t)) if is_sharded(t) else (t,))]


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor that every rank has alike, sharded as a parameter is. Nothing is sent.

    A tensor is returned itself if the parameter is no ``DTensor``, or if it is one.
    """
    if not is_sharded(parameter) or is_sharded(tensor):
        return tensor
    found = torch.zeros_like(parameter, dtype=tensor.dtype, requires_grad=False)
    shards, part = shards_of(parameter), tensor.detach()
    assert shards is not None
    for group in shards.groups(sharded=True):  # rows are divided as torch.chunk does it
        size = -(-part.shape[0] // group.size())
        part = part[size * group.rank() : size * (group.rank() + 1)]
    local_part(found).copy_(part)
    return found


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, and any other tensor itself: all ranks call it."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def told(tensor: Tensor) -> str:
    """Say how a tensor is sharded, for errors."""
    shards = shards_of(tensor)
    if shards is None:
        return "not sharded"
    return f"a DTensor with placements ({', '.join(map(str, shards.placements))}) on {shards.mesh}"


class Shards(NamedTuple):
    """The ranks that have a parameter, and how its rows are divided among them.

    Its methods are collectives: all ranks of the mesh call them, in the same order.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def sums(self, numbers: Tensor) -> Tensor:
        """Return the sums over the ranks that share the rows; ranks with the same rows count once."""
        return _reduced(numbers, self.groups(sharded=True), dist.ReduceOp.SUM)

    def before(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the ranks that have rows before those of this rank, and over all of them."""
        groups = self.groups(sharded=True)
        if not groups:
            return torch.zeros_like(numbers), numbers
        of_each = [torch.empty_like(numbers) for _ in range(groups[0].size())]
        dist.all_gather(of_each, numbers, group=groups[0])
        gathered = torch.stack(of_each)
        return gathered[: groups[0].rank()].sum(0), gathered.sum(0)

    def sums_of_all(self, numbers: Tensor) -> Tensor:
        """Return the sums over all ranks of the mesh."""
        return _reduced(numbers, self.groups(), dist.ReduceOp.SUM)

    def most_of_all(self, numbers: Tensor) -> Tensor:
        """Return the maxima over all ranks of the mesh."""
        return _reduced(numbers, self.groups(), dist.ReduceOp.MAX)

    def most_of_replicas(self, numbers: Tensor) -> Tensor:
        """Return the maxima over the ranks that have the same rows."""
        return _reduced(numbers, self.groups(sharded=False), dist.ReduceOp.MAX)

    def device(self) -> torch.device:
        """Return the device of small tensors that are reduced: the CPU, if the ranks can send from there."""
        return sending_device(self.groups(), torch.device(self.mesh.device_type))

    def integers(self, numbers: int | Sequence[Any]) -> Tensor:
        """Return integers as a tensor that can be reduced: int64, 0-d for one."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.device())

    def world(self) -> int:
        """Return the number of ranks of the mesh."""
        return self.mesh.size()

    def is_first(self) -> bool:
        """Tell if this rank has the first rows."""
        return all(group.rank() == 0 for group in self.groups(sharded=True))

    def is_divided(self) -> bool:
        """Tell if no rank has all rows."""
        return any(own.is_shard() for own in self.placements)

    def has_replicas(self) -> bool:
        """Tell if several ranks have the same rows."""
        return any(group.size() > 1 for group in self.groups(sharded=False))

    def groups(self, sharded: bool | None = None) -> list[ProcessGroup]:
        """Return the groups of the mesh: of ranks that share rows, or that have the same ones, or all."""
        pairs = enumerate(self.placements)
        return [self.mesh.get_group(i) for i, own in pairs if sharded is None or own.is_shard() == sharded]


def shards_of(parameter: Tensor) -> Shards | None:
    """Return how a parameter is sharded; None if it is no ``DTensor``."""
    if not is_sharded(parameter):
        return None
    sharded: Any = parameter
    return Shards(sharded.device_mesh, tuple(sharded.placements))


def sending_device(groups: Sequence[ProcessGroup | None], other: torch.device) -> torch.device:
    """Return the CPU if all groups (None: the default one) can send from there, else the other device."""
    on_host = all("cpu:" in dist.get_backend_config(group) for group in groups)
    return torch.device("cpu") if on_host else other


def by_mesh(shards: Mapping[int, Shards | None]) -> Iterator[tuple[Shards, list[int]]]:
    """Yield each mesh, and what it has, in its order. What is not sharded is left out."""
    for ranks in dict.fromkeys(shards.values()):
        if ranks is not None:
            yield ranks, [i for i, own in shards.items() if own == ranks]


def whole_counts(counts: Sequence[int], tensors: Sequence[Tensor]) -> list[int]:
    """Return counts of whole tensors: of sharded ones, the sums over the ranks.

    Args:
        counts: what each local part has.
        tensors: whose parts were counted, the same on all ranks.
    """
    found = [*counts]
    for ranks, places in by_mesh(dict(enumerate(map(shards_of, tensors)))):
        own = ranks.integers([found[i] for i in places])
        for i, count in zip(places, ranks.sums(own).tolist(), strict=True):
            found[i] = count
    return found


def whole_rows(numbers: Tensor, tensor: Tensor, are_rows: bool) -> Tensor:
    """Return the numbers of the neurons of a whole tensor, from those of the local part.

    Args:
        numbers: of shape ``(neurons,)``.
        tensor: whose part was looked at; if it is not sharded, the numbers are returned themselves.
        are_rows: whether each rank has neurons of its own. Else each has a part of every neuron, and the
            numbers are added up.
    """
    shards = shards_of(tensor)
    if shards is None:
        return numbers
    own = numbers.to(shards.device())
    if not are_rows:
        return shards.sums(own)
    first, total = shards.before(shards.integers(own.numel()))
    whole = own.new_zeros(int(total))
    whole[int(first) : int(first) + own.numel()] = own
    return shards.sums(whole)


def reshard(model: torch.nn.Module) -> None:
    """Let go of what FSDP2 has gathered for a forward pass: the model has its sharded parameters then."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def shards_in(groups: Iterable[Mapping[str, Any]]) -> list[Shards]:
    """Return the ranks that have parameters of an optimizer's groups, each mesh once, in their order."""
    found = (shards_of(parameter) for group in groups for parameter in group["params"])
    return [*dict.fromkeys(shards for shards in found if shards is not None)]


def shard_buffers(state: Mapping[Any, Any]) -> None:
    """Shard the whole momentum buffers of sharded parameters in an optimizer's state, which was loaded so."""
    for parameter, own in state.items():
        buffer = own.get("momentum_buffer") if isinstance(own, dict) else None
        if isinstance(buffer, Tensor) and is_sharded(parameter) and buffer.shape == parameter.shape:
            own["momentum_buffer"] = sharded_like(buffer, parameter)


def check_not_flat(model: torch.nn.Module) -> None:
    """Raise ``ValueError`` if FSDP1 has made flat parameters of a model's."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "model has layers in FullyShardedDataParallel (FSDP1), whose flat parameters have no rows to "
            "mask: use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def check_sharding(parameters: Iterable[Tensor], names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError``, naming it, unless a parameter is whole or each rank has a block of its rows."""
    for parameter in parameters:
        if hasattr(parameter, "_is_flat_param"):
            raise ValueError(
                f"{names[parameter]!r} is a flat parameter of FSDP1 (FullyShardedDataParallel), which has no "
                "rows to mask: use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        shards = shards_of(parameter)
        kinds = [own for own in shards.placements if not own.is_replicate()] if shards else []
        if len(kinds) > 1 or not all(own.is_shard(0) for own in kinds) or "Strided" in repr(kinds):
            raise ValueError(
                f"{names[parameter]!r} is {told(parameter)}: supported are Shard(0) along one dimension of "
                "the mesh, as fully_shard makes it, and Replicate(). Tensor parallelism, as Shard(1), is not"
            )


def _reduced(numbers: Tensor, groups: Sequence[ProcessGroup], op: Any) -> Tensor:
    reduced = numbers.clone()
    for group in groups:
        dist.all_reduce(reduced, op=op, group=group)
    return reduced
