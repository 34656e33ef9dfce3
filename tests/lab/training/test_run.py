"""What a run makes of its configuration."""

from pathlib import Path

import pytest
import torch

from sparseopt_kernels.lab.training.by_hand import MaskedSGD
from sparseopt_kernels.lab.training.config import new_config, saved_config
from sparseopt_kernels.lab.training.data import Dataset
from sparseopt_kernels.lab.training.epoch_updates import EpochUpdates
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.run import Run
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.layer_update import LayerUpdate
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET


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


def test_an_epoch_counts_what_its_updates_did():
    images, labels = (
        torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(300) % 10,
    )
    config = new_config({"batch_size": 100, "update_every": 2, "device": "cpu", "sparsity": 0.98})
    run = Run(config, Dataset(images, labels, images, labels), "sgd", 5)
    before = {name: run.masks[p].clone() for name, p in run.masks.named().items()}
    row = run.train_epoch()
    assert row.grown > 0
    assert 0 < row.largest_share <= 1
    assert row.dead_share == run.masks.dead_share() > 0
    assert any(not torch.equal(run.masks[p], before[name]) for name, p in run.masks.named().items())
    static = make_run("static", 5).train_epoch()
    assert (static.grown, static.died, static.largest_share) == (0, 0, 0.0)


def test_the_numbers_of_an_epoch_by_hand():
    first = {"a": LayerUpdate(20, 20, 1, 0, 12), "b": LayerUpdate(40, 40, 2, 2, 10)}
    second = {"a": LayerUpdate(25, 25, 0, 0, 10), "b": LayerUpdate()}
    few = {"a": LayerUpdate(19, 19, 0, 0, 19), "b": LayerUpdate()}
    updates = EpochUpdates().with_update(first)
    assert updates == (60, 3, 0.6)
    assert updates.with_update(second) == (85, 3, 0.6)
    assert updates.with_update(few) == (79, 3, 0.6)
    assert EpochUpdates().with_update(few) == (19, 0, 0.0)


def test_what_the_options_make_of_optimizer_and_topology():
    images, labels = torch.zeros(300, 1, 8, 8), torch.arange(300) % 10
    given = {"max_grad_norm": 0.5, "max_grad_norm_over": "dense", "skip_step": False, "min_fan_in": 2}
    config = new_config({**given, "batch_size": 100, "device": "cpu"})
    run = Run(config, Dataset(images, labels, images, labels), "sgd", 0)
    assert run.optimizer.param_groups[0]["max_grad_norm"] == 0.5
    assert isinstance(run.optimizer, SparseOpt)
    assert run.optimizer.param_groups[0]["max_grad_norm_over"] == "dense"
    assert run.topology is not None
    assert (run.topology.skip_step, run.topology.min_fan_in) == (False, 2)
    assert min(min(counts) for counts in run.initial_fan_in.values()) >= 2


def test_an_experiment_from_before_goes_on_as_it_was():
    saved = new_config({"device": "cpu"}).to_dict()
    for name in ("max_grad_norm", "max_grad_norm_over", "skip_step", "min_fan_in"):
        del saved[name]
    config = saved_config(saved, {}, Path("checkpoint.pt"))
    assert (config.max_grad_norm, config.skip_step, config.min_fan_in) == (None, False, 0)
    assert config.max_grad_norm_over == "active"
    with pytest.raises(TrainingError, match=r"--skip-step is on, but the experiment .* was started with off"):
        saved_config(saved, {"skip_step": True}, Path("checkpoint.pt"))
    with pytest.raises(TrainingError, match=r"--max-grad-norm is 1.0, but .* was started with none"):
        saved_config(saved, {"max_grad_norm": 1.0}, Path("checkpoint.pt"))


def test_a_closure_by_hand_is_called_when_a_step_is_left_out():
    weight = torch.nn.Parameter(torch.ones(3))
    mask = torch.tensor([True, False, True])
    optimizer = MaskedSGD([weight], {weight: mask}, skips=lambda: True, lr=1.0)

    def closure():
        weight.grad = torch.ones(3)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert weight.tolist() == [1.0, 0.0, 1.0]
