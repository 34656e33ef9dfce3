"""What goes wrong on one rank of sharded parameters is an error on all, and none waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded_training import support_path
from torch import distributed as dist

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")]

SCRIPT = f"""
sys.path.insert(0, {support_path()!r})
import warnings
warnings.simplefilter("ignore")
import sparseopt_kernels as sk
from sharded_training import *
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

plain = init_device_mesh("cpu", (4,))
hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
result = {{}}


def trained(mesh, **options):
    model = make_network()
    fully_shard(model, mesh=mesh)
    masks = sk.sparsify(model, 0.85)
    optimizer = sk.SparseOpt(model.parameters(), lr=0.05, momentum=0.9, masks=masks, **options)
    for step in range(2):
        backward(model, mesh, step)
        optimizer.step()
    return model, masks, optimizer


def told(name, call):
    try:
        call()
        result[name] = ""
    except Exception as error:
        result[name] = f"{{type(error).__name__}}: {{error}}"


# A mask is written on one rank alone: all count anew.
model, masks, optimizer = trained(plain)
weight = model[4].weight
if rank == 1:
    part(masks[weight])[0] = False
backward(model, plain, 2)
before = whole(weight.detach()).clone()
optimizer.step()
buffer = whole(optimizer.state[weight]["momentum_buffer"])
result["written on one rank"] = [
    whole(masks[weight]), whole(weight.grad), before, whole(weight.detach()), buffer
]

# A step that fails on one rank.
if rank == 2:
    kept = optimizer.state[weight]["momentum_buffer"]
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(3)
weights = [part(p.detach()).clone() for p in model.parameters()]
told("failed", optimizer.step)
result["unchanged"] = all(torch.equal(part(p), w) for p, w in zip(model.parameters(), weights))
if rank == 2:
    optimizer.state[weight]["momentum_buffer"] = kept
told("mended", optimizer.step)

# GradScaler finds an overflow in the shard of its own rank.
optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(rank == 3)), torch.tensor(1.0)
told("overflow", optimizer.step)
optimizer.found_inf = torch.tensor(1.0)
weights = [part(p.detach()).clone() for p in model.parameters()]
told("overflow everywhere", optimizer.step)
result["skipped"] = all(torch.equal(part(p), w) for p, w in zip(model.parameters(), weights))
del optimizer.found_inf, optimizer.grad_scale

# A parameter has no gradient on one rank.
if rank == 0:
    weight.grad = None
told("no gradient", optimizer.step)

# Replicas differ.
model, masks, optimizer = trained(hybrid, max_grad_norm=1.0)
if rank >= 2:
    part(masks[model[7].weight])[:1] ^= True
told("replicas", optimizer.step)

# What a rank has of everything, in bytes.
model, masks, optimizer = trained(plain)
result["bytes"] = [
    (part(t).untyped_storage().nbytes(), t.numel() * t.element_size(), t.shape[0])
    for p, mask in masks.items() for t in (mask, optimizer.state[p]["momentum_buffer"])
]

# Not supported.
layer = nn.Linear(8, 8)
layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), plain, [Shard(1)]))
told("columns", lambda: sk.SparseOpt(layer.parameters(), lr=0.1))
told("columns are masked", lambda: sk.sparsify(layer, 0.5))
transposed = nn.Sequential(nn.ConvTranspose2d(8, 6, 3))
fully_shard(transposed, mesh=plain)
of_transposed = sk.sparsify(transposed, 0.5)
optimizer = sk.SparseOpt(transposed.parameters(), lr=0.1, masks=of_transposed)
transposed(torch.ones(1, 8, 4, 4)).sum().backward()
told("transposed", optimizer.step)
optimizer.param_groups[0]["correction"] = "none"
told("transposed, masked SGD", optimizer.step)
result["summary"] = of_transposed.summary()[0]["active"], of_transposed.summary()[0]["neurons"]

# After a forward pass, FSDP2 may leave the parameters gathered.
model, masks, optimizer = trained(plain)
with torch.no_grad():
    model(torch.zeros(2, *SHAPE))
told("after evaluation", optimizer.step)
result["made after evaluation"] = set(sk.Masks(model)) == set(masks)

from torch.distributed.fsdp import FullyShardedDataParallel

for whole_parameters in (False, True):
    old = FullyShardedDataParallel(
        make_network(), device_id=torch.device("cpu"), use_orig_params=whole_parameters
    )
    told(f"FSDP1 masked, {{whole_parameters}}", lambda: sk.sparsify(old, 0.5))
    told(f"FSDP1, {{whole_parameters}}", lambda: sk.SparseOpt(old.parameters(), lr=0.1))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(SCRIPT, tmp_path_factory.mktemp("ranks"), ranks=4)


def test_a_mask_that_is_written_on_one_rank(found: list[dict[str, Any]]) -> None:
    mask, gradient, before, after, buffer = found[0]["written on one rank"]
    assert not mask[8].any()  # the first row of rank 1, of 30 rows
    counts = mask.sum(1).double()
    factors = (counts / counts.mean()).sqrt().float().unsqueeze(1)
    assert (after != before).any()
    torch.testing.assert_close(after, (before * mask - 0.05 * buffer) * mask)
    assert (buffer[~mask] == 0).all()
    moved = (buffer - factors * gradient * mask)[mask] / 0.9  # the buffer of before, where it was kept
    assert torch.isfinite(moved).all()


def test_a_step_that_fails_on_one_rank(found: list[dict[str, Any]]) -> None:
    assert found[2]["failed"].startswith("ValueError: the momentum_buffer of")
    for rank in (0, 1, 3):
        assert found[rank]["failed"].startswith("RuntimeError: no weight was changed in this step")
    assert all(own["unchanged"] and own["mended"] == "" for own in found)


def test_an_overflow_on_one_rank(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["overflow"].startswith("RuntimeError: 1 of 4 ranks found gradients that are not finite")
        assert "ShardedGradScaler" in own["overflow"]
        assert own["overflow everywhere"] == ""
        assert own["skipped"]


def test_a_gradient_that_one_rank_lacks(found: list[dict[str, Any]]) -> None:
    assert [own["no gradient"] for own in found] == [""] * 4


def test_replicas_with_other_masks(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["replicas"].startswith("RuntimeError: the mask of '7.weight' differs among ranks")


def test_a_rank_keeps_its_rows_alone(found: list[dict[str, Any]]) -> None:
    for own in found:
        for held, whole, rows in own["bytes"]:
            assert held <= -(-rows // 4) * whole // rows  # its share, rounded up to rows


def test_what_is_not_supported(found: list[dict[str, Any]]) -> None:
    for own in found:
        for name in ("columns", "columns are masked"):
            assert own[name].startswith("ValueError: ")
            assert "Shard(1)" in own[name]
        for name in ("FSDP1 masked, False", "FSDP1 masked, True", "FSDP1, False"):
            assert own[name].startswith("ValueError: ")
            assert "FSDP1" in own[name]
        assert own["transposed"].startswith("ValueError: '0.weight' has its neurons in dimension 1")
        assert own["transposed, masked SGD"] == ""
        assert own["summary"] == (216, 6)


def test_parameters_that_are_gathered(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["after evaluation"] == ""
        assert own["made after evaluation"]
