"""Compares the masks of all ranks of a distributed run. A difference is an error on every rank.

They are compared in the step that updates them. In the next forward pass ``DistributedDataParallel``
overwrites the masks of all ranks but one, which would hide the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..masks.mask_hash import whole_hashes
from ..sharding import Shards, sending_device, shards_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | Literal['world'] | None"
"""``"world"`` for all ranks, as they are when masks are compared; None: masks are not compared."""

_MOST_NAMED = 5


@contextmanager
def on_all_or_none(shards: Sequence[Shards]) -> Iterator[None]:
    """Let what is done on this rank fail on all ranks of sharded masks, if it fails on one.

    Args:
        shards: the ranks; without any, nothing is sent.

    Raises:
        RuntimeError: it failed on another rank.
    """
    try:
        yield
    except Exception:
        for ranks in shards:
            _has_failed(ranks, True)
        raise
    failures = [_has_failed(ranks, False) for ranks in shards]  # all meshes are asked
    if any(failures):
        raise RuntimeError("no mask was updated: it failed on another rank, whose error says why")


def _has_failed(ranks: Shards, own: bool) -> bool:
    return bool(ranks.most_of_all(ranks.integers(int(own))))


def check_numbers_agree(numbers: Sequence[int], shards: Sequence[Shards], what: str) -> None:
    """Raise ``RuntimeError`` on all ranks of sharded masks unless they have the same numbers.

    Args:
        numbers: as many on every rank.
        shards: the ranks.
        what: what the numbers are, for the error.
    """
    for ranks in shards:
        own = ranks.integers(numbers)
        most, least = ranks.most_of_all(torch.stack([own, ~own]))
        if bool((most != ~least).any()):
            raise RuntimeError(
                f"the ranks do not agree in {what}: hooks must answer alike on all ranks. Of a sharded "
                "layer, tensors are the rows of one rank: use layer.active, layer.numel and "
                "layer.mean_fan_in, which are those of the whole layer"
            )


def check_masks_agree(clock: Mapping[str, Any], masks: Mapping[str, Tensor], group: Group) -> None:
    """Raise ``RuntimeError`` on every rank of the group, unless all ranks have the same masks and clocks.

    The ranks send 16 bytes, and only if they do not agree, who has what.

    Args:
        clock: other values that must be equal (the step, the settings), by their names in the error.
        masks: by the name of their layer.
        group: the ranks that are compared.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return
    own = None if group == "world" else group
    if dist.get_rank(own) < 0 or dist.get_world_size(own) == 1:
        return
    hashes = dict(zip(masks, whole_hashes([*masks.values()]), strict=True))
    report = {**clock, **{f"mask of {name!r}": number for name, number in hashes.items()}}
    mask = next(iter(masks.values()))
    shards = shards_of(mask)  # with CPU offload, masks are on the CPU, and the ranks may send from GPUs alone
    device = torch.device(shards.mesh.device_type) if shards else mask.device
    if _are_alike(report, sending_device([own], device), own):
        return
    reports: list[Any] = [None] * dist.get_world_size(own)
    dist.all_gather_object(reports, report, group=own)
    ranks = dist.get_process_group_ranks(own or dist.group.WORLD)
    found = _differences(dict(zip(ranks, reports, strict=True)), shown=clock)
    if found:
        more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise RuntimeError(
            f"the ranks of this run do not agree: {'; '.join(found[:_MOST_NAMED])}{more}. Whatever changes "
            "a mask must do so on every rank alike, gradients must be averaged over the ranks before "
            "dst.step(), and every rank must resume from the same state_dict. If ranks are meant to differ "
            "(an ensemble, parts of a model), pass process_group=None, or the group of those that are alike"
        )


def _are_alike(report: Mapping[str, Any], device: torch.device, group: ProcessGroup | None) -> bool:
    """Tell if all ranks of a group have the same report."""
    content = repr(sorted(report.items())).encode()
    digest = int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)
    most = torch.tensor([digest, ~digest], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return bool(most[0] == ~most[1])


def _differences(reports: Mapping[int, Mapping[str, Any]], shown: Mapping[str, Any]) -> list[str]:
    """Say what differs and on which ranks; values of what is in ``shown`` are said as well."""
    found = []
    for item in dict.fromkeys(item for report in reports.values() for item in report):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, report in reports.items():
            ranks_by_value.setdefault(repr(report.get(item, "missing")), []).append(rank)
        if len(ranks_by_value) == 1:
            continue
        if item in shown:
            sides = ", ".join(f"{value} on {_named(ranks)}" for value, ranks in ranks_by_value.items())
            found.append(f"{item} is {sides}")
        else:
            found.append(f"{item} differs, {' from '.join(map(_named, ranks_by_value.values()))}")
    return found


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > _MOST_NAMED:
        return f"{len(ranks)} ranks (the first is {ranks[0]})"
    return f"ranks {', '.join(map(str, ranks))}"
