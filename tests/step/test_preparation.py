"""What changes between two steps behind the optimizer's back: it is seen, or refused before it does harm."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, each_mapping, run
from torch import nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.sparsify import sparsify


def stepped(p: Parameter, backend: Backend, **options) -> SparseOpt:
    """An optimizer of ``p`` that has taken one step with a gradient of zeros."""
    optimizer = SparseOpt([p], lr=1.0, backend=backend.name, **options)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer


class TestMomentumOfACheckpoint:
    def test_of_another_network(self, backend: Backend) -> None:
        small = Parameter(torch.zeros(10, 4))
        small.grad = torch.ones(10, 4)
        sgd = torch.optim.SGD([small], lr=1.0, momentum=0.9)
        sgd.step()
        first, p = Parameter(torch.zeros(3)), Parameter(torch.zeros(1000, 40))
        optimizer = SparseOpt([first, p], lr=1.0, momentum=0.9, backend=backend.name)
        state = sgd.state_dict()
        state["state"] = {1: state["state"][0]}
        state["param_groups"][0]["params"] = [0, 1]
        optimizer.load_state_dict(state)
        first.grad, p.grad = torch.ones(3), torch.ones(1000, 40)
        message = r"momentum_buffer of .* has shape \(10, 4\), the parameter has \(1000, 40\)"
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert not first.any()
        assert not p.any()

    def test_of_another_dtype(self, backend: Backend) -> None:
        p, q = (Parameter(torch.zeros(8)) for _ in range(2))
        optimizer = SparseOpt([p], lr=1.0, momentum=0.5, backend=backend.name)
        sgd = torch.optim.SGD([q], lr=1.0, momentum=0.5)
        for tensor, opt in ((p, optimizer), (q, sgd)):
            opt.state[tensor]["momentum_buffer"] = torch.ones(8, dtype=torch.float64)
            tensor.grad = torch.ones(8)
            opt.step()
        assert torch.equal(p, q)


class TestParameterData:
    def test_narrowed_in_place(self, backend: Backend) -> None:
        """Structured pruning: the same address, fewer elements."""
        p = Parameter(torch.ones(64))
        optimizer = stepped(p, backend)
        p.grad = None
        full = p.data
        p.data = full[:8]
        p.grad = torch.ones(8)
        optimizer.step()
        assert not p.any()
        assert torch.equal(full[8:], torch.ones(56))

    def test_grown_under_its_gradient(self, backend: Backend) -> None:
        p = Parameter(torch.zeros(4))
        optimizer = stepped(p, backend)
        p.data = torch.zeros(64)
        with pytest.raises(ValueError, match=r"gradient of .* has shape \(4,\), the parameter has \(64,\)"):
            optimizer.step()
        assert not p.any()

    def test_gradient_shrunk_in_place(self, backend: Backend) -> None:
        p = Parameter(torch.zeros(64))
        optimizer = stepped(p, backend)
        assert p.grad is not None
        p.grad.data = torch.ones(8)
        with pytest.raises(ValueError, match=r"has shape \(8,\), the parameter has \(64,\)"):
            optimizer.step()

    def test_transposed_in_place(self, backend: Backend) -> None:
        p = Parameter(torch.zeros(4, 4))
        optimizer = stepped(p, backend)
        p.data = p.data.t()
        p.grad = torch.zeros(4, 4)
        p.grad[0, 1] = 1.0
        optimizer.step()
        assert p.nonzero().tolist() == [[0, 1]]

    def test_of_another_dtype_at_the_same_address(self, backend: Backend) -> None:
        p = Parameter(torch.zeros(4, dtype=torch.bfloat16))
        optimizer = stepped(p, backend)
        p.grad = None
        p.data = p.data.view(torch.float16)
        p.grad = torch.full((4,), 2.0, dtype=torch.float16)
        optimizer.step()
        assert torch.equal(p, torch.full((4,), -2.0, dtype=torch.float16))


class TestState:
    @pytest.mark.parametrize("looked_at", [False, True])
    def test_a_buffer_is_watched_from_its_birth(self, backend: Backend, looked_at: bool) -> None:
        p = Parameter(torch.zeros(3))
        optimizer = SparseOpt([p], lr=1.0, momentum=0.9, backend=backend.name)
        if looked_at:
            optimizer.state[p]  # a defaultdict: now there is an empty one
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[p]["momentum_buffer"] = torch.full((3,), 100.0)
        optimizer.step()
        assert torch.allclose(p, torch.full((3,), -92.0))
        optimizer.state[p].clear()
        optimizer.step()
        assert torch.allclose(p, torch.full((3,), -93.0))

    def test_a_buffer_given_to_another_parameter(self, backend: Backend) -> None:
        """As many buffers as before, in the same memory: whose they are is what changed."""
        a, b = (Parameter(torch.zeros(3)) for _ in range(2))
        optimizer = SparseOpt([a, b], lr=1.0, momentum=0.5, backend=backend.name)
        a.grad = torch.ones(3)
        for _ in range(2):
            optimizer.step()
        optimizer.state[b] = given = optimizer.state.pop(a)
        optimizer.step()
        assert a.tolist() == [-3.5] * 3
        assert given["momentum_buffer"].tolist() == [1.5] * 3

    def test_gradients_are_let_go(self, backend: Backend) -> None:
        p = Parameter(torch.zeros(3))
        optimizer = SparseOpt([p], backend=backend.name)
        p.grad = torch.ones(3)
        gradient = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert gradient() is None


class TestMaskChanges:
    def test_of_a_parameter_without_a_gradient(self, backend: Backend) -> None:
        p = Parameter(torch.ones(2, 4))
        mask = torch.ones(2, 4, dtype=torch.bool)
        optimizer = stepped(p, backend, momentum=0.9, masks={p: mask})
        optimizer.state[p]["momentum_buffer"].fill_(1.0)
        p.grad = None
        mask[0] = False
        optimizer.step()
        assert p.tolist() == [[0.0] * 4, [1.0] * 4]
        assert optimizer.state[p]["momentum_buffer"].tolist() == [[0.0] * 4, [1.0] * 4]

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_of_a_parameter_without_a_gradient_after_loading(self, backend: Backend, momentum: float) -> None:
        p = Parameter(torch.ones(2, 4))
        mask = torch.ones(2, 4, dtype=torch.bool)
        optimizer = stepped(p, backend, momentum=momentum, masks={p: mask})
        p.grad = None
        optimizer.load_state_dict(optimizer.state_dict())
        mask[0] = False
        optimizer.step()
        assert p.tolist() == [[0.0] * 4, [1.0] * 4]

    def test_of_a_parameter_without_a_gradient_after_a_copy(self, backend: Backend) -> None:
        p = Parameter(torch.ones(2, 4))
        mask = torch.ones(2, 4, dtype=torch.bool)
        optimizer = stepped(p, backend, momentum=0.9, masks={p: mask})
        p.grad = None
        copied = pickle.loads(pickle.dumps(optimizer))
        [q] = copied.param_groups[0]["params"]
        copied._masks[q][0] = False
        copied.step()
        assert q.tolist() == [[0.0] * 4, [1.0] * 4]

    def test_through_data(self, backend: Backend) -> None:
        p = Parameter(torch.ones(2, 4))
        mask = torch.ones(2, 4, dtype=torch.bool)
        optimizer = stepped(p, backend, masks={p: mask})
        mask.data = torch.zeros(2, 4, dtype=torch.bool)
        optimizer.step()
        assert not p.any()

    def test_through_numpy_and_a_write_in_the_open(self, backend: Backend) -> None:
        p = Parameter(torch.ones(2, 4))
        mask = torch.ones(2, 4, dtype=torch.bool)
        optimizer = stepped(p, backend, masks={p: mask})
        mask.numpy()[0] = False
        mask.copy_(mask)
        optimizer.step()
        assert p.tolist() == [[0.0] * 4, [1.0] * 4]

    def test_the_buffer_is_gone(self, backend: Backend) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        optimizer = SparseOpt(model.parameters(), masks=sparsify(model, 0.5), backend=backend.name)
        model[0]._buffers["weight_mask"] = None
        with pytest.raises(ValueError, match=r"the mask of '0\.weight' is gone from the model"):
            optimizer.step()


class TestInferenceMode:
    def test_a_step(self, backend: Backend) -> None:
        p = Parameter(torch.ones(2, 4))
        optimizer = SparseOpt(
            [p], lr=1.0, momentum=0.9, masks={p: torch.ones(2, 4, dtype=torch.bool)}, backend=backend.name
        )
        p.grad = torch.ones(2, 4)
        with torch.inference_mode():
            optimizer.step()
        assert not p.any()
        assert optimizer.state[p]["momentum_buffer"].tolist() == [[1.0] * 4] * 2

    def test_a_mask(self) -> None:
        p = Parameter(torch.ones(2, 4))
        with torch.inference_mode():
            mask = torch.ones(2, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"mask for .* was made under torch\.inference_mode"):
            SparseOpt([p], masks={p: mask})


@each_mapping
@pytest.mark.parametrize("set_to_none", [False, True], ids=["to-zero", "to-none"])
def test_nothing_is_prepared_twice(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, mapping: str, set_to_none: bool
) -> None:
    """Neither other gradients nor other hyperparameters make a step look at every parameter again."""
    model = Network()
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, masks=model.masks(mapping), backend=backend.name
    )
    run(model, optimizer, range(2))
    monkeypatch.setattr("sparseopt_kernels.optimizer.prepare", lambda *_: pytest.fail("prepared again"))
    former = model[0].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad(set_to_none)
        model(torch.ones(2, 13, dtype=torch.float64)).sum().backward()
        optimizer.param_groups[0].update(lr=0.1 / (step + 1), weight_decay=0.01 * step)
        optimizer.step()
    assert not torch.equal(model[0].weight, former)


def test_the_masks_of_another_optimizer_change(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the ``Masks`` of the whole model: one's masks are no business of the other."""
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masks = sparsify(model, 0.5)
    optimizer = SparseOpt(model[0].parameters(), masks=masks, backend=backend.name)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    monkeypatch.setattr("sparseopt_kernels.optimizer.prepare", lambda *_: pytest.fail("prepared again"))
    masks[model[1].weight].logical_not_()
    optimizer.step()
    masks[model[0].weight].logical_not_()
    with pytest.raises(pytest.fail.Exception, match="prepared again"):
        optimizer.step()


def test_infinite_weights_stay_infinite(backend: Backend) -> None:
    """An additive attention bias of -inf, say: no weight decay, no 0 * inf."""
    p = Parameter(torch.tensor([-torch.inf, 1.0]))
    optimizer = stepped(p, backend, momentum=0.9)
    optimizer.step()
    assert p.tolist() == [-torch.inf, 1.0]


def test_a_lazily_negated_gradient(backend: Backend) -> None:
    p = Parameter(torch.zeros(4))
    optimizer = SparseOpt([p], lr=1.0, backend=backend.name)
    gradients = [torch._neg_view(torch.ones(4)), torch.ones(4), torch._neg_view(torch.ones(4))]
    for gradient, want in zip(gradients, (1.0, 0.0, 1.0), strict=True):
        p.grad = gradient
        optimizer.step()
        assert p.tolist() == [want] * 4


def test_a_negated_gradient_that_stays(backend: Backend) -> None:
    p = Parameter(torch.zeros(4))
    p.grad = torch._neg_view(torch.ones(4))
    optimizer = SparseOpt([p], lr=1.0, backend=backend.name)
    for _ in range(3):
        optimizer.step()
    assert p.tolist() == [3.0] * 4


def test_a_gradient_negated_where_it_lies(backend: Backend) -> None:
    p = Parameter(torch.zeros(4))
    gradient = p.grad = torch.ones(4)
    optimizer = SparseOpt([p], lr=1.0, backend=backend.name)
    optimizer.step()
    p.grad = torch._neg_view(gradient)
    optimizer.step()
    assert p.tolist() == [0.0] * 4
    p.grad = gradient
    optimizer.step()
    assert p.tolist() == [-1.0] * 4


def test_a_state_with_keys_of_the_users(backend: Backend) -> None:
    """PyTorch lets them be, in ``state_dict`` too."""
    p = Parameter(torch.zeros(4))
    optimizer = stepped(p, backend, momentum=0.9)
    optimizer.state.update(epoch=3)  # type: ignore[call-overload]
    p.grad = torch.ones(4)
    for _ in range(2):
        optimizer.step()
    assert torch.allclose(p, torch.full((4,), -2.9))
    assert "epoch" in optimizer.state


def test_a_parameter_that_is_not_initialised_yet(backend: Backend) -> None:
    p, layer = Parameter(torch.zeros(4)), nn.LazyLinear(2, bias=False)
    optimizer = SparseOpt([p, layer.weight], lr=1.0, backend=backend.name)
    p.grad = torch.ones(4)
    for _ in range(2):
        optimizer.step()
    assert p.tolist() == [-2.0] * 4
    layer(torch.ones(1, 3)).sum().backward()
    former = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, former - 1.0)


def test_dampening_switched_on_before_the_first_step_is_made(backend: Backend) -> None:
    """A first step goes without dampening, whenever it was switched on."""
    p = Parameter(torch.zeros(4))
    optimizer: Any = SparseOpt([p], lr=1.0, momentum=0.9, backend=backend.name)
    p.grad = torch.full((4,), torch.inf)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.param_groups[0]["dampening"] = 0.5
    p.grad = torch.ones(4)
    del optimizer.found_inf
    optimizer.step()
    # Where the host does not wait for AMP's verdict, the step that was skipped counts as the first.
    assert p.tolist() == ([-0.5] * 4 if backend.on_device else [-1.0] * 4)


def test_a_sparse_gradient_does_not_make_every_step_look_at_everything(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, p = nn.Embedding(5, 3, sparse=True), Parameter(torch.ones(3))
    optimizer = SparseOpt([*table.parameters(), p], lr=0.1, backend=backend.name)

    def step(i: int) -> None:
        optimizer.zero_grad()
        (table(torch.tensor([i])) @ p).sum().backward()
        optimizer.step()

    step(0)
    monkeypatch.setattr("sparseopt_kernels.optimizer.prepare", lambda *_: pytest.fail("prepared again"))
    former = table.weight.detach().clone()
    step(1)
    assert (table.weight != former).any(dim=1).tolist() == [False, True, False, False, False]
