"""What goes wrong on one rank of sharded parameters is an error on all, and none waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from old_pytorch import needs_fsdp2
from ranks import on_ranks
from sharded_training import support_path

pytestmark = [pytest.mark.slow, needs_fsdp2]

SCRIPT = f"""
sys.path.insert(0, {support_path()!r})
import warnings
warnings.simplefilter("ignore")
import sparseopt_kernels as sk
from sparseopt_kernels import apply_masks, finalize, load_dense
from sparseopt_kernels.skipped_steps import SkippedStep
from sparseopt_kernels.topology.hooks import Counts
from sharded_training import *
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
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
before = [whole(t).clone() for t in (weight.detach(), optimizer.state[weight]["momentum_buffer"])]
optimizer.step()
after = [whole(t) for t in (weight.detach(), optimizer.state[weight]["momentum_buffer"])]
result["written on one rank"] = [whole(masks[weight]), whole(weight.grad), *before, *after]

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

# GradScaler finds an overflow in the shard of one rank, and tells all.
scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
backward(model, plain, 3)
if rank == 1:
    part(weight.grad).view(-1)[0] = float("inf")
for p in model.parameters():
    p.grad = p.grad * 1.0
weights = [part(p.detach()).clone() for p in model.parameters()]
scaler.scale(torch.ones(1))
told("scaler", lambda: scaler.step(optimizer))
scaler.update()
result["scale"] = scaler.get_scale()
result["left out"] = all(torch.equal(part(p), w) for p, w in zip(model.parameters(), weights))

# A verdict of another program's.
optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(rank == 3)), torch.tensor(1.0)
told("overflow", optimizer.step)
optimizer.found_inf = torch.tensor(1.0)
weights = [part(p.detach()).clone() for p in model.parameters()]
told("overflow everywhere", optimizer.step)
result["skipped"] = all(torch.equal(part(p), w) for p, w in zip(model.parameters(), weights))
del optimizer.found_inf, optimizer.grad_scale

# One rank has updated its masks.
update = SkippedStep(masks) if rank == 1 else None
weights = [part(p.detach()).clone() for p in model.parameters()]
told("left out on one rank", optimizer.step)
result["left out on one rank, unchanged"] = all(
    torch.equal(part(p), w) for p, w in zip(model.parameters(), weights)
)
update = SkippedStep(masks)
told("left out on all", optimizer.step)
result["left out on all, unchanged"] = all(
    torch.equal(part(p), w) for p, w in zip(model.parameters(), weights)
)
del update

# A parameter has no gradient on one rank.
if rank == 0:
    weight.grad = None
told("no gradient", optimizer.step)

# A first step of zeros, as torch.distributed.checkpoint makes it, and one of zeros on one rank.
model = make_network()
fully_shard(model, mesh=plain)
masks = sk.sparsify(model, 0.85)
optimizer = sk.SparseOpt(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, masks=masks)
get_state_dict(model, optimizer)
result["momentum"] = max(float(part(own["momentum_buffer"]).abs().sum()) for own in optimizer.state.values())
optimizer = sk.SparseOpt(model.parameters(), lr=0.0, momentum=0.9, max_grad_norm=1.0, masks=masks)
for step in range(3):
    backward(model, plain, step)
    if rank == 3:
        for p in model.parameters():
            part(p.grad).zero_()
    told(f"zeros on one rank, {{step}}", optimizer.step)

# Hooks that fail, or answer otherwise, on one rank; clocks that differ.
class Failing(sk.SET):
    def drop_score(self, layer):
        if rank == 2:
            raise KeyError("mine")
        return super().drop_score(layer)


class Differing(sk.SET):
    def counts(self, layers, step):
        return [Counts(1 + (rank == 1), 1 + (rank == 1)) for _ in layers]


for name, cls in (("failing hook", Failing), ("differing hook", Differing)):
    method = cls(masks, 0.3, 1, stop_at=10, skip_step=False)
    held = [part(mask).clone() for mask in masks.values()]
    told(name, method.step)
    result[f"{{name}}, masks"] = all(torch.equal(part(m), h) for m, h in zip(masks.values(), held))
method = sk.SET(masks, 0.3, 2, stop_at=10)
method._step = int(rank == 0)
told("clocks", method.step)

# What is done when training is over.
apply_masks(model)
for p in masks:
    part(p.detach()).add_(1.0)
apply_masks(model, masks)
result["applied"] = all(bool((part(p.detach())[~part(m)] == 0).all()) for p, m in masks.items())
dense = {{k: v for k, v in model.state_dict().items() if not k.endswith("_mask")}}
told("load_dense", lambda: load_dense(model, dense))
told("finalize", lambda: finalize(model))

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
with torch.device("meta"):
    unmade = nn.Sequential(nn.Linear(8, 8))
fully_shard(unmade, mesh=plain)
told("meta", lambda: sk.sparsify(unmade, 0.5))
transposed = nn.Sequential(nn.ConvTranspose2d(8, 6, 3))
fully_shard(transposed, mesh=plain)
of_transposed = sk.sparsify(transposed, 0.5)
narrow = sk.SET(of_transposed, 0.3, 1, stop_at=10, min_fan_in=1)
told("transposed, min_fan_in", narrow.step)
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

# Parameters that fully_shard leaves alone, and others that it shards.
model = make_network()
fully_shard(model, mesh=plain, ignored_params=set(model[9].parameters()))
masks = sk.sparsify(model, 0.85)
told("both kinds", sk.SET(masks, 0.3, 1, stop_at=10).step)

# bf16 in the passes, and in between weights of float32.
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, CLASSES))
fully_shard(model, mesh=plain, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
masks = sk.sparsify(model, 0.85)
optimizer = sk.SparseOpt(model.parameters(), lr=0.05, momentum=0.9, masks=masks, max_grad_norm=1.0)
method = sk.RigL(masks, 0.3, 3, stop_at=100)
losses = []
for step in range(30):
    with torch.no_grad():
        losses.append(float((model(torch.ones(1, *SHAPE)) - 1).square().mean()))
    optimizer.zero_grad()
    (model(torch.ones(8, *SHAPE)) - 1).square().mean().backward()
    method.step()
    optimizer.step()
result["mixed"] = [
    {{p.dtype for p in model.parameters()}} == {{torch.float32}},
    losses[-1] < 0.2 * losses[0],
    all(bool((part(p.detach())[~part(m)] == 0).all()) for p, m in masks.items()),
    method.exploration_rate() > 0.151,
]

# Parameters that are DTensors, but whole on every rank.
from torch.distributed.tensor import Replicate

network = make_network()
twin = make_network()
for module in network.modules():
    for name, p in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), plain, [Replicate()])))
result["replicated"] = []
for model in (network, twin):
    masks = sk.sparsify(model, 0.85)
    optimizer = sk.SparseOpt(model.parameters(), lr=0.05, momentum=0.9, masks=masks, max_grad_norm=1.0)
    method = sk.RigL(masks, 0.3, 3, stop_at=100)
    for step in range(7):
        torch.manual_seed(step)
        for p in model.parameters():
            gradient = torch.randn(p.shape)
            p.grad = distribute_tensor(gradient, plain, [Replicate()]) if model is network else gradient
        method.step()
        optimizer.step()
    result["replicated"].append([whole(p.detach()).clone() for p in model.parameters()])
of_network = sk.Masks(network)
part(of_network[network[4].weight])[0, 0] ^= rank == 2
told("one replica", sk.SET(of_network, 0.3, 1, stop_at=10).step)

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
    mask, gradient, weight, buffer, weight_after, buffer_after = found[0]["written on one rank"]
    assert not mask[8].any()  # the first row of rank 1, of 30 rows
    counts = mask.sum(1).double()
    factors = (counts / counts.mean()).sqrt().float().unsqueeze(1)  # of all rows, on all ranks
    torch.testing.assert_close(buffer_after, (0.9 * buffer + factors * gradient) * mask)
    torch.testing.assert_close(weight_after, (weight - 0.05 * buffer_after) * mask)


def test_a_step_that_fails_on_one_rank(found: list[dict[str, Any]]) -> None:
    assert found[2]["failed"].startswith("ValueError: the momentum_buffer of")
    for rank in (0, 1, 3):
        assert found[rank]["failed"].startswith("RuntimeError: no weight was changed in this step")
    assert all(own["unchanged"] and own["mended"] == "" for own in found)


def test_an_overflow_on_one_rank(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["overflow"].startswith(
            "RuntimeError: 1 of 4 ranks were told that gradients are not finite"
        )
        assert own["overflow everywhere"] == ""
        assert own["skipped"]
        assert own["scaler"] == ""
        assert own["scale"] == 2.0
        assert own["left out"]


def test_a_step_that_one_rank_leaves_out(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["left out on one rank"].startswith(
            "RuntimeError: 1 of 4 ranks have updated their masks and leave this step out (skip_step)"
        )
        assert own["left out on one rank, unchanged"]
        assert own["left out on all"] == ""
        assert own["left out on all, unchanged"]


def test_a_gradient_that_one_rank_lacks(found: list[dict[str, Any]]) -> None:
    assert [own["no gradient"] for own in found] == [""] * 4


def test_first_steps_of_zeros(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["momentum"] == 0.0
        assert [own[f"zeros on one rank, {step}"] for step in range(3)] == [""] * 3


def test_hooks_and_clocks_that_differ(found: list[dict[str, Any]]) -> None:
    for rank, own in enumerate(found):
        failed = (
            "KeyError: 'mine'"
            if rank == 2
            else "RuntimeError: no mask was updated: it failed on another rank"
        )
        assert own["failing hook"].startswith(failed)
        assert own["differing hook"].startswith(
            "RuntimeError: the ranks do not agree in the answers of Differing"
        )
        assert own["failing hook, masks"]
        assert own["differing hook, masks"]
        assert own["clocks"].startswith(
            "RuntimeError: the ranks of this run do not agree: step is 1 on rank 0"
        )


def test_what_is_done_when_training_is_over(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["applied"]
        assert own["load_dense"] == own["finalize"] == ""


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
        assert own["transposed, min_fan_in"].startswith("ValueError: SET has min_fan_in, and '0.weight'")
        assert own["meta"].startswith("ValueError: '0.weight' is on the meta device")
        assert own["transposed, masked SGD"] == ""
        assert own["summary"] == (216, 6)


def test_parameters_that_are_gathered(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["after evaluation"] == ""
        assert own["made after evaluation"]


def test_sharded_and_other_parameters_in_one_method(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert "masks.subset" in own["both kinds"]


def test_mixed_precision(found: list[dict[str, Any]]) -> None:
    assert [own["mixed"] for own in found] == [[True] * 4] * 4


def test_parameters_that_are_whole_on_every_rank(found: list[dict[str, Any]]) -> None:
    for own in found:
        sharded, plain = own["replicated"]
        assert all(map(torch.equal, sharded, plain))
        assert own["one replica"].startswith("RuntimeError: ")
        assert "'4.weight'" in own["one replica"]
