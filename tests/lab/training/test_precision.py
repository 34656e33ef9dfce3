"""Mixed precision and memory formats in the training loop."""

from copy import deepcopy

import pytest
import torch

from sparseopt_kernels.lab.training.config import new_config
from sparseopt_kernels.lab.training.data import Dataset
from sparseopt_kernels.lab.training.run import Run


def make_run(**options):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(60, 3, 8, 8, generator=generator)
    labels = torch.arange(60) % 5
    given = {"model": "convnet", "batch_size": 20, "update_every": 1, "epochs": 3, "warmup_epochs": 1}
    config = new_config({**given, "device": "cpu", **options})
    return Run(config, Dataset(images, labels, images, labels), "sparseopt", 0)


def dtypes_seen(run):
    seen = set()
    run.model.conv2.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    run.train_epoch()
    return seen


@pytest.mark.parametrize(("amp", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_amp_computes_in_its_type_and_learns_nearly_the_same(amp, dtype):
    run, plain = make_run(amp=amp), make_run()
    assert dtypes_seen(run) == {dtype}
    assert dtypes_seen(plain) == {torch.float32}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    row, expected = run.train_epoch(), plain.train_epoch()
    assert row.status == "ok"
    assert row.train_loss == pytest.approx(expected.train_loss, rel=0.02)


def test_an_overflow_of_float16_lowers_the_loss_scale_and_harms_nothing():
    run = make_run(amp="float16")
    scale = run._scaler.get_scale()
    before = run.model.conv2.weight.detach().clone()
    handle = run.model.conv2.weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    run.train_epoch()
    assert run._scaler.get_scale() == scale / 2**3  # three steps
    assert torch.equal(run.model.conv2.weight, before)
    handle.remove()
    assert run.train_epoch().status == "ok"
    assert not torch.equal(run.model.conv2.weight, before)


def test_the_loss_scale_is_part_of_the_state():
    run = make_run(amp="float16")
    run.train_epoch()
    run._scaler.update(1024.0)
    resumed = make_run(amp="float16")
    resumed.load_state_dict(deepcopy(run.state_dict()))  # the optimizer's tensors would be shared
    assert resumed._scaler.get_scale() == 1024.0
    assert resumed.train_epoch().train_loss == run.train_epoch().train_loss


def test_channels_last_changes_the_format_and_nothing_else():
    run, plain = make_run(channels_last=True), make_run()
    formats = []
    run.model.conv1.register_forward_hook(
        lambda module, args, out: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    row, expected = run.train_epoch(), plain.train_epoch()
    assert formats
    assert all(formats)
    assert run.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert row.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
    assert torch.equal(run.model.conv2.weight_mask, plain.model.conv2.weight_mask)


def test_the_schedule_starts_and_ends_where_it_is_told():
    run = make_run(start_lr=1e-3, end_lr=1e-2, lr=0.1)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    for _ in range(3):
        run.train_epoch()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
