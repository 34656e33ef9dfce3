"""``ZeroRedundancyOptimizer``: each rank updates a share of the parameters, and keeps their momentum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import distributed as dist

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")]

SCRIPT = """
from functools import partial
import io
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
import sparseopt_kernels as sk

GIVEN = {
    "masks=": lambda p, **whole: ZeroRedundancyOptimizer(p, sk.SparseOpt, **whole, **OPTIONS),
    "partial": lambda p, **whole: ZeroRedundancyOptimizer(p, partial(sk.SparseOpt, **whole), **OPTIONS),
    "alone": lambda p, **whole: sk.SparseOpt(p, **whole, **OPTIONS),
}
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "correction": "auto"}


def make(way, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
    masks = sk.sparsify(model, 0.8, seed=seed)
    feeding = sk.layers_feeding_norm(model, torch.randn(8, 30))
    opt = GIVEN[way](model.parameters(), masks=masks, feeding_norm=feeding)
    return model, opt, sk.RigL(masks, update_every=3, stop_at=100)


def steps(ddp, opt, dst, numbers):
    for step in numbers:
        torch.manual_seed(step)
        loss = ddp(torch.randn(8, 30)).square().mean()
        ddp.zero_grad()
        loss.backward()
        dst.step()
        opt.step()


def bits(model):
    return [value.clone() for value in model.state_dict().values()]


result = {}
for way in GIVEN:
    model, opt, dst = make(way, 0)
    steps(DistributedDataParallel(model), opt, dst, range(12))
    result[way] = bits(model)
    if way == "alone":
        continue
    model, opt, dst = make(way, 0)
    steps(DistributedDataParallel(model), opt, dst, range(6))
    opt.consolidate_state_dict(to=0)
    file = io.BytesIO()
    if rank == 0:
        torch.save({"opt": opt.state_dict(), "model": model.state_dict(), "dst": dst.state_dict()}, file)
    content = [file.getvalue()]
    dist.broadcast_object_list(content)
    saved = torch.load(io.BytesIO(content[0]), weights_only=True)
    model, opt, dst = make(way, 1)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    dst.load_state_dict(saved["dst"])
    steps(DistributedDataParallel(model), opt, dst, range(6, 12))
    result[way + ", resumed"] = bits(model)
    result[way + ", bytes"] = len(content[0])
    result[way + ", own"] = sum(len(state) > 0 for state in opt.optim.state.values())
"""


def test_with_masks_and_in_a_partial_it_trains_saves_and_goes_on(tmp_path: Path) -> None:
    first, second = on_ranks(SCRIPT, tmp_path)
    for result in (first, second):
        for way in ("masks=", "partial", "masks=, resumed", "partial, resumed"):
            assert all(map(torch.equal, result[way], first["alone"])), way
        assert (
            result["masks=, bytes"] < 1.2 * result["partial, bytes"]
        )  # the model is not in it a second time
    assert first["partial, own"] + second["partial, own"] == 6  # parameters whose momentum a rank has
    assert 0 < first["partial, own"] < 6
