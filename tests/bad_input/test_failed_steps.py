"""A failed step changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backends import Backend
from refusals import BAD_MASKS, mask_like, weights, words
from side_by_side import same_bits
from torch import Tensor
from torch.nn.parameter import Parameter
from watched import settled

from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.step.last_step import LastStep


def snapshot(params: list[Parameter], optimizer: SparseOpt, masks: dict[Parameter, Tensor]) -> list[Tensor]:
    state = [v for p in params for v in optimizer.state.get(p, {}).values()]
    good = [mask for mask in masks.values() if isinstance(mask, Tensor) and mask.device.type == "cpu"]
    return [t.detach().clone() for t in (*params, *(p.grad for p in params), *state, *good)]


FAILURES = [*BAD_MASKS, "sparse-gradient", "mask-of-a-stranger"]


@pytest.mark.parametrize("started", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_step_changes_nothing(backend: Backend, failure: str, started: bool) -> None:
    """It is the last parameter that is wrong: all before it are as they were, bit for bit, and once the
    fault is mended the run goes on as if it had never been."""

    def make() -> tuple[list[Parameter], dict[Parameter, Tensor], SparseOpt]:
        params = weights(4)
        masks = {p: mask_like(p, i) for i, p in enumerate(params) if i != 1}
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
        kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "max_grad_norm": 1.0}
        return params, masks, SparseOpt(groups, **kwargs, masks=masks, backend=backend.name)

    def step(params: list[Parameter], optimizer: SparseOpt, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    params, masks, optimizer = make()
    others, _, undisturbed = make()
    if started:
        step(params, optimizer, 1)
        step(others, undisturbed, 1)
    last = params[-1]
    for p in params:
        p.grad = torch.ones_like(p)
    good = masks[last]
    masks[params[0]].logical_not_()  # a change of a mask that the failed step must not swallow
    masks[params[0]].logical_not_()
    if failure == "sparse-gradient":
        last.grad = torch.ones(4, 9).to_sparse()
        message = words("param_groups[1]['params'][1]", "mask", "torch.sparse_coo", "torch.strided")
    elif failure == "mask-of-a-stranger":
        stranger = Parameter(torch.ones(4, 9))
        masks[stranger] = mask_like(stranger)
        message = words("mask for", "not among the optimizer's parameters")
    else:
        masks[last] = BAD_MASKS[failure][0](last)
        message = words("mask for", "param_groups[1]['params'][1]", *BAD_MASKS[failure][1])
    before = snapshot(params, optimizer, masks)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        after = snapshot(params, optimizer, masks)
        assert len(before) == len(after)
        for former, now in zip(before, after, strict=True):
            assert same_bits(former, now)

    if failure == "mask-of-a-stranger":
        del masks[stranger]
    masks[last] = good
    for seed in (2, 3):
        step(params, optimizer, seed)
        step(others, undisturbed, seed)
    for p, q in zip(params, others, strict=True):
        assert same_bits(p, q)
        assert same_bits(optimizer.state[p]["momentum_buffer"], undisturbed.state[q]["momentum_buffer"])


def test_momentum_switched_off_after_a_failed_first_step(backend: Backend) -> None:
    a, b = weights(2)
    masks = {b: mask_like(b)}
    optimizer = SparseOpt([a, b], lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
    a.grad, b.grad = torch.ones(4, 9), torch.ones(4, 9).to_sparse()
    with pytest.raises(ValueError, match=r"torch\.sparse_coo"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.0
    b.grad = torch.ones(4, 9)
    optimizer.step()
    assert not optimizer.state


def test_a_gradient_of_another_shape(backend: Backend) -> None:
    """PyTorch checks it when it is assigned; a parameter that then gets other data is not checked."""
    a, b = weights(2)
    a.grad, b.grad = torch.ones(4, 9), torch.ones(4, 9)
    b.data = torch.zeros(2, 3)
    before = copy.deepcopy([a, b])
    optimizer = SparseOpt([("a", a), ("b", b)], lr=0.1, momentum=0.9, backend=backend.name)
    with pytest.raises(ValueError, match=words("gradient of 'b'", "(4, 9)", "(2, 3)")):
        optimizer.step()
    for p, q in zip((a, b), before, strict=True):
        assert same_bits(p, q)
    assert not optimizer.state


def test_a_checkpoint_of_another_network(backend: Backend) -> None:
    """As many parameters, other shapes: load_state_dict lets it pass, the step does not."""
    a, b = weights(2)
    others = [Parameter(torch.ones(4, 9)), Parameter(torch.ones(9, 4))]
    for p in (a, b, *others):
        p.grad = torch.ones_like(p)
    other = SparseOpt(others, lr=0.1, momentum=0.9, backend=backend.name)
    other.step()
    optimizer = SparseOpt([("a", a), ("b", b)], lr=0.1, momentum=0.9, backend=backend.name)
    optimizer.load_state_dict(other.state_dict())
    before = copy.deepcopy([a, b])
    with pytest.raises(ValueError, match=words("momentum_buffer of 'b'", "(9, 4)", "(4, 9)")):
        optimizer.step()
    for p, q in zip((a, b), before, strict=True):
        assert same_bits(p, q)


def test_a_bad_mask_of_a_parameter_without_gradient(backend: Backend) -> None:
    """It waits for its first gradient, but its mask is looked at when it changes."""
    a, b = weights(2)
    masks = {a: mask_like(a), b: mask_like(b)}
    optimizer = SparseOpt([("a", a), ("b", b)], lr=0.1, masks=masks, backend=backend.name)
    a.grad = torch.ones_like(a)
    optimizer.step()
    before = a.detach().clone()
    for bad, (make, message) in BAD_MASKS.items():
        masks[b] = make(b)
        for _ in range(2):
            with pytest.raises(ValueError, match=words("mask for", "'b'", *message)):
                optimizer.step()
            assert same_bits(a, before), bad
    masks[b] = mask_like(b, 1)
    optimizer.step()
    assert not same_bits(a, before)


def test_a_correction_that_is_unknown_when_a_step_comes(backend: Backend) -> None:
    """Groups are dicts that anybody may write into."""
    a, b = weights(2)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer = SparseOpt([a, b], lr=0.1, momentum=0.9, masks={b: mask_like(b)}, backend=backend.name)
    before = copy.deepcopy([a, b])
    optimizer.param_groups[0]["correction"] = "neuron"
    with pytest.raises(ValueError, match=words("correction", "'neuron'", "'layer'")):
        optimizer.step()
    for p, q in zip((a, b), before, strict=True):
        assert same_bits(p, q)
    assert not optimizer.state


def test_a_failed_closure_changes_nothing(backend: Backend) -> None:
    (p,) = weights(1)
    p.grad = torch.ones_like(p)
    optimizer = SparseOpt([p], lr=0.1, momentum=0.9, backend=backend.name)
    before = copy.deepcopy(p)

    def closure() -> float:
        raise ArithmeticError("loss")

    with pytest.raises(ArithmeticError, match="loss"):
        optimizer.step(closure)
    assert same_bits(p, before)
    assert not optimizer.state


@pytest.mark.parametrize("way", ["short", "long"])
def test_a_step_that_its_device_broke_off(
    backend: Backend, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was left outside the mask, unseen by PyTorch's version counter, is gone after the next step."""
    if way == "long":
        monkeypatch.setattr("sparseopt_kernels.step.last_step._native_step", lambda *_: None)
    layer, optimizer = settled(backend)
    (batch,) = optimizer._prepared.batches

    def fail(*_: Any) -> None:
        layer.weight.data.fill_(1.0)
        raise RuntimeError("a device error")

    def fail_if_repeatable(last: LastStep, *_: Any) -> bool:
        if last.is_repeatable:
            fail()
        return False

    with monkeypatch.context() as patch:
        patch.setattr(type(batch.plan), "step", fail)
        patch.setattr(LastStep, "repeat", fail_if_repeatable)
        with pytest.raises(RuntimeError, match="a device error"):
            optimizer.step()
    assert layer.weight.all()
    optimizer.step()
    assert not layer.weight[~layer.weight_mask].any()


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}], ids=["momentum", "dampening"])
def test_buffers_of_a_first_step_that_fails(backend: Backend, options: dict[str, float]) -> None:
    """They are in the state as long as the step is made, and are taken out again."""
    params = weights(4)
    masks = {p: mask_like(p, i) for i, p in enumerate(params)}
    optimizer = SparseOpt(params, lr=0.1, momentum=0.9, **options, masks=masks, backend=backend.name)  # type: ignore[arg-type]
    optimizer.state[params[1]]["mine"] = 7
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["max_grad_norm"] = -1.0
    with pytest.raises(ValueError, match=r"max_grad_norm is -1\.0, it must be"):
        optimizer.step()
    assert dict(optimizer.state) == {params[1]: {"mine": 7}}
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    optimizer.step()
    assert all("momentum_buffer" in optimizer.state[p] for p in params)
