"""Masks and weights that a collective of ``torch.distributed`` writes: every rank steps by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from side_by_side import same_bits

from sparseopt_kernels import native_library

SCRIPT = """
import warnings
import sparseopt_kernels as sk
from torch.nn.parallel import DistributedDataParallel

def broadcast_by_ddp(mask, weight):
    if rank == 0:
        mask[:, ::2] = False  # and the next forward pass broadcasts it, as all buffers

def broadcast(mask, weight):
    if rank == 0:
        mask[:, ::2] = False
    dist.broadcast(mask, 0)

def all_reduce(mask, weight):
    mask[rank::ranks] = False
    dist.all_reduce(mask.view(torch.uint8), dist.ReduceOp.MIN)

def broadcast_of_weights(mask, weight):
    with torch.no_grad():
        if rank == 0:
            weight.fill_(0.01)
    dist.broadcast(weight, 0)

result = {}
for write in (broadcast_by_ddp, broadcast, all_reduce, broadcast_of_weights):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 10))
    masks = sk.sparsify(model, 0.9)
    weight = model[0].weight
    buffers = write is broadcast_by_ddp
    parallel = DistributedDataParallel(model, broadcast_buffers=buffers)
    optimizer = sk.SparseOpt(parallel.parameters(), lr=0.1, momentum=0.9, masks=masks, backend=BACKEND)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(100 * rank + step))
            optimizer.zero_grad()
            parallel(x).square().mean().backward()
            optimizer.step()
            if step == 5:
                write(masks[weight], weight)
    momentum_buffer = optimizer.state[weight]["momentum_buffer"]
    outside = [t[~masks[weight]].count_nonzero() for t in (weight, momentum_buffer)]
    result[write.__name__] = {
        "outside": sum(map(int, outside)),
        "masks": [m.clone() for m in masks.values()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "said": [str(w.message) for w in caught if "without PyTorch counting it" in str(w.message)],
    }
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_a_collective_writes_is_applied_in_the_next_step(backend: str, tmp_path: Path) -> None:
    if backend == "cpu" and native_library.MISSING is not None:
        pytest.skip("there is no native library")
    first, second = on_ranks(SCRIPT.replace("BACKEND", repr(backend)), tmp_path)
    for case in first:
        for kind in ("masks", "weights"):
            pairs = list(zip(first[case][kind], second[case][kind], strict=True))
            assert all(torch.equal(a, b) for a, b in pairs), (case, kind)
        assert first[case]["outside"] == second[case]["outside"] == 0, case
    if backend == "cpu":  # the reference has nothing to say: it reads masks at each step
        assert "the mask of '0.weight'" in second["broadcast_by_ddp"]["said"][0]
        assert same_bits(first["broadcast"]["masks"][0], first["broadcast_by_ddp"]["masks"][0])


TRAINING = """
import sparseopt_kernels as sk
from torch.nn.parallel import DistributedDataParallel

def train(model, forward, own, process_group="world"):
    masks = sk.sparsify(model, 0.8)
    optimizer = sk.SparseOpt(
        model.parameters(), lr=0.5, momentum=0.9, masks=masks, max_grad_norm=0.02, max_grad_norm_over=OVER
    )
    dst = sk.RigL(masks, update_every=3, stop_at=20, process_group=process_group)
    for step in range(10):
        x = torch.randn(16, 30, generator=torch.Generator().manual_seed(step)).double()[own]
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        dst.step()
        optimizer.step()
    return [t.detach().clone() for t in (*model.parameters(), *masks.values())]

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)).double()

model = network()
shared = train(model, DistributedDataParallel(model), slice(rank * 8, rank * 8 + 8))
model = network()
result = shared, train(model, model, slice(None), process_group=None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("over", ["active", "dense"])
def test_a_clip_and_skipped_steps_over_ranks(over: str, tmp_path: Path) -> None:
    """Two ranks with half of each batch train as one process with the whole of it."""
    found = on_ranks(TRAINING.replace("OVER", repr(over)), tmp_path)
    for shared, alone in found:
        for a, b in zip(shared, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(map(same_bits, found[0][0], found[1][0]))
