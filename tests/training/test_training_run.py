"""What a run makes of its configuration."""

import pytest
import torch

from sparseopt_kernels.topology.dynamic import SET, RigL
from sparseopt_kernels.training.config import new_config
from sparseopt_kernels.training.data import Dataset
from sparseopt_kernels.training.run import Run


def make_run(method, seed):
    images, labels = torch.zeros(300, 1, 8, 8), torch.arange(300) % 10
    config = new_config({"method": method, "batch_size": 100, "update_every": 1, "device": "cpu"})
    return Run(config, Dataset(images, labels, images, labels), "sgd", seed)


@pytest.mark.parametrize(("method", "kind"), [("static", type(None)), ("set", SET), ("rigl", RigL)])
def test_the_method_decides_how_masks_change(method, kind):
    assert type(make_run(method, 5).topology) is kind


def test_what_set_draws_depends_on_the_seed_of_the_run():
    # From equal masks: the initial ones depend on the seed already.
    masks = []
    for seed in (5, 6):
        run = make_run("set", seed)
        weight = run.model.fc1.weight
        mask = (torch.arange(weight.numel()) % 2 == 0).view_as(weight)
        run.masks[weight].copy_(mask)
        with torch.no_grad():
            weight.copy_(mask)
        run.topology.step()
        masks.append(run.masks[weight])
    assert not torch.equal(*masks)
