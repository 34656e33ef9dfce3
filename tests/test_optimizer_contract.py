"""What everybody relies on an optimizer for: closures, hooks, groups, state, schedulers, AMP, copies."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import pattern_mask, same_bits
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import SWALR

from sparseopt_kernels.masks import Masks
from sparseopt_kernels.optimizer import SparseOpt

HYPERS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"lr": 0.01, "momentum": 0.5, "maximize": True},
}
each_hyper = pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)


class Network(nn.Sequential):
    """Two linear layers of which both weights are masked, in float64 unless asked otherwise."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 4))
        generator = torch.Generator().manual_seed(seed)
        for layer in (self[0], self[2]):
            layer.register_buffer("weight_mask", pattern_mask("half", layer.weight.shape, generator))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        for weight, mask in self.masks_dict().items():  # as sparsify leaves it
            weight.data *= mask
        self.to(dtype)

    def masks_dict(self) -> dict[Parameter, Tensor]:
        return {layer.weight: layer.weight_mask for layer in (self[0], self[2])}

    def masks(self, kind: str) -> Any:
        return {"Masks": Masks(self), "dict": self.masks_dict(), "no-mask": None}[kind] if kind else None

    def set_grads(self, step: int, scale: float = 1.0) -> Tensor:
        """Backward of a loss on data that depends on the step alone; returns the loss."""
        generator = torch.Generator().manual_seed(1000 + step)
        dtype = self[0].weight.dtype
        x, y = (torch.randn(8, n, generator=generator).to(dtype) for n in (13, 4))
        for parameter in self.parameters():
            parameter.grad = None
        loss = (self(x) - y).square().mean()
        (loss * scale).backward()
        return loss


each_mapping = pytest.mark.parametrize("mapping", ["Masks", "dict", "no-mask"])


def run(model: Network, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.set_grads(step)
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same_bits(p, q), name


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    first, second = a.state_dict()["state"], b.state_dict()["state"]
    assert first.keys() == second.keys()
    for key, entry in first.items():
        assert entry.keys() == second[key].keys()
        for name, value in entry.items():
            assert same_bits(value, second[key][name]), f"{name} of parameter {key}"


# ---- closures and hooks -----------------------------------------------------------------------------


def test_closure_runs_once_with_gradients_and_its_loss_is_returned(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(model.set_grads(0).item())
        return calls[-1]

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert [loss] == calls
    other = Network()
    run(other, SparseOpt(other.parameters(), lr=0.1, masks=Masks(other), backend=backend.name), range(1))
    assert_same(model, other)
    assert optimizer.step() is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_step_runs_without_gradients(backend: Backend) -> None:
    """A gradient that itself requires grad (create_graph) makes no graph of the step."""
    p = Parameter(torch.ones(3))
    (p.square().sum()).backward(create_graph=True)
    assert p.grad.requires_grad
    SparseOpt([p], lr=0.25, momentum=0.9, backend=backend.name).step()
    assert p.is_leaf
    assert p.tolist() == [0.5, 0.5, 0.5]


def test_step_hooks(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, backend=backend.name)
    before = model[0].weight.detach().clone()
    seen = []

    def pre(opt: SparseOpt, args: tuple, kwargs: dict) -> None:
        assert opt is optimizer
        assert same_bits(model[0].weight, before)
        seen.append("pre")

    def post(opt: SparseOpt, args: tuple, kwargs: dict) -> None:
        assert not torch.equal(model[0].weight, before)
        seen.append("post")

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    model.set_grads(0)
    optimizer.step()
    assert seen == ["pre", "post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == ["pre", "post"]


def test_step_pre_hook_may_change_a_mask(backend: Backend) -> None:
    """How a user may drive dynamic sparse training: the very step that the hook precedes sees the mask."""
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=Masks(model), backend=backend.name)
    run(model, optimizer, range(2))

    def prune(*_: Any) -> None:
        model[0].weight_mask[1] = False

    optimizer.register_step_pre_hook(prune)
    run(model, optimizer, range(2, 3))
    assert not model[0].weight[1].any()
    assert not optimizer.state[model[0].weight]["momentum_buffer"][1].any()


def test_state_dict_hooks(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "more": 7})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(state["more"]))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", 7, "loaded"]


def test_profiler_names_the_step(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    model.set_grads(0)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SparseOpt.step", "Optimizer.zero_grad#SparseOpt.zero_grad"} <= names


# ---- parameter groups -------------------------------------------------------------------------------

OWN_VALUES = {
    "lr": 0.7,
    "momentum": 0.3,
    "dampening": 0.6,
    "weight_decay": 0.4,
    "nesterov": True,
    "maximize": True,
    "correction": "unnormalized",
    "ham_alpha": 3.0,
    "ham_beta": 0.5,
    "max_grad_norm": 0.01,
}


@pytest.mark.parametrize("key", OWN_VALUES)
def test_a_group_has_its_own(backend: Backend, key: str) -> None:
    """A value given for a group does to it what the same value for all does, and nothing to the others."""
    common = {"lr": 0.1, "momentum": 0.9, "backend": backend.name}

    # The gradient of one layer depends on the other: train on given gradients, not on a loss.
    def fixed(groups: Callable[[Network], Any], **kwargs: Any) -> Network:
        model = Network()
        optimizer = SparseOpt(groups(model), **(common | kwargs), masks=Masks(model))
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        return model

    mixed = fixed(
        lambda m: [{"params": m[0].parameters(), key: OWN_VALUES[key]}, {"params": m[2].parameters()}]
    )
    with_it = fixed(lambda m: m.parameters(), **{key: OWN_VALUES[key]})
    without = fixed(lambda m: m.parameters())
    assert_same(mixed[0], with_it[0])
    assert_same(mixed[2], without[2])
    assert not torch.equal(mixed[0].weight, without[0].weight)


def test_groups_take_the_defaults() -> None:
    model = Network()
    optimizer = SparseOpt([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}])
    first, second = optimizer.param_groups
    assert first["lr"] == 0.5
    assert second == {
        "params": second["params"],
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "correction": "layer",
        "ham_alpha": 0.0,
        "ham_beta": 0.0,
        "max_grad_norm": None,
        "foreach": None,
        "differentiable": False,
        "fused": None,
    }


def test_signature_is_that_of_sgd() -> None:
    """A drop-in replacement: every argument of SGD, in its place, of its kind and with its default."""
    ours = inspect.signature(SparseOpt).parameters
    theirs = inspect.signature(SGD).parameters
    positional = [n for n, p in theirs.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("how", ["tensor", "list", "generator", "named", "named-generator"])
def test_add_param_group_while_running(backend: Backend, how: str) -> None:
    """New parameters, masked or not, begin with their own first step; the others go on."""
    model, other = Network(), Network()
    named = how.startswith("named")
    start = model[0].named_parameters(prefix="0") if named else model[0].parameters()
    masks = model.masks_dict()
    late_mask = masks.pop(model[2].weight)
    optimizer = SparseOpt(start, lr=0.1, momentum=0.9, dampening=0.5, masks=masks, backend=backend.name)
    run(model, optimizer, range(3))

    masks[model[2].weight] = late_mask
    params = {
        "tensor": model[2].weight,
        "list": [model[2].weight],
        "generator": (p for p in [model[2].weight]),
        "named": [("2.weight", model[2].weight)],
        "named-generator": (pair for pair in [("2.weight", model[2].weight)]),
    }[how]
    optimizer.add_param_group({"params": params, "lr": 0.05})
    run(model, optimizer, range(3, 6))
    assert not model[2].weight[~late_mask].any()

    # The same, with the late group there from the start but without gradients at first.
    all_of_it = SparseOpt(
        [{"params": other[0].parameters()}, {"params": [other[2].weight], "lr": 0.05}],
        lr=0.1,
        momentum=0.9,
        dampening=0.5,
        masks=other.masks_dict(),
        backend=backend.name,
    )
    for step in range(6):
        other.set_grads(step)
        if step < 3:
            other[2].weight.grad = None
        all_of_it.step()
    assert_same(model, other)
    assert_same_state(optimizer, all_of_it)


def test_named_parameters_are_kept(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.named_parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    run(model, optimizer, range(2))


def test_a_parameter_replaced_in_its_group(backend: Backend) -> None:
    """Network surgery writes into ``param_groups``: what was known of the former parameter is forgotten."""
    model = Network()
    masks = model.masks_dict()
    optimizer = SparseOpt([model[0].weight, model[2].weight], lr=0.1, masks=masks, backend=backend.name)
    run(model, optimizer, range(2))
    new = Parameter(torch.ones(5, 6, dtype=torch.float64))
    new_mask = pattern_mask("half", (5, 6), torch.Generator().manual_seed(0))
    former = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["params"][0] = new
    del masks[former]
    masks[new] = new_mask
    new.grad = torch.ones_like(new)
    optimizer.step()
    fresh = Parameter(torch.ones(5, 6, dtype=torch.float64))
    fresh.grad = torch.ones_like(fresh)
    SparseOpt([fresh], lr=0.1, masks={fresh: new_mask}, backend=backend.name).step()
    assert same_bits(new, fresh)


def test_a_parameter_moved_to_another_group(backend: Backend) -> None:
    """Its hyperparameters are those of the group that it is in now."""
    a, b = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    optimizer = SparseOpt([{"params": [a, b]}, {"params": [], "lr": 2.0}], lr=1.0, backend=backend.name)
    for p in (a, b):
        p.grad = -torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    optimizer.step()
    assert a.tolist() == [2.0, 2.0, 2.0]
    assert b.tolist() == [3.0, 3.0, 3.0]


# ---- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to-none", "to-zero"])
@each_mapping
def test_zero_grad(backend: Backend, mapping: str, set_to_none: bool) -> None:
    """Both ways of it between steps train alike; the memory of a gradient may stay or move."""
    models = [Network(), Network()]
    for model in models:
        optimizer = SparseOpt(
            model.parameters(), lr=0.1, momentum=0.9, masks=model.masks(mapping), backend=backend.name
        )
        for step in range(6):
            x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step)).double()
            if model is models[0]:
                optimizer.zero_grad(set_to_none=set_to_none)
            else:
                for p in model.parameters():
                    p.grad = None
            model(x).square().sum().backward()
            optimizer.step()
    assert_same(*models)


def test_parameters_without_gradient_are_left_alone(backend: Backend) -> None:
    model = Network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0])
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, masks=Masks(model), backend=backend.name
    )
    run(model, optimizer, range(1))
    versions = [p._version for p in model[0].parameters()]
    run(model, optimizer, range(1, 3))
    assert_same(model[0], before)
    assert [p._version for p in model[0].parameters()] == versions
    assert set(optimizer.state) == set(model[2].parameters())


def test_step_with_no_gradient_at_all(backend: Backend) -> None:
    model = Network()
    before = copy.deepcopy(model)
    optimizer = SparseOpt(model.parameters(), max_grad_norm=1.0, masks=Masks(model), backend=backend.name)
    assert optimizer.step() is None
    assert_same(model, before)
    assert not optimizer.state


# ---- state_dict -------------------------------------------------------------------------------------


def test_state_dict_holds_momentum_buffers_and_nothing_else(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0, masks=Masks(model), backend=backend.name
    )
    run(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    for i, p in enumerate(model.parameters()):
        assert set(state["state"][i]) == {"momentum_buffer"}
        buffer = state["state"][i]["momentum_buffer"]
        assert (buffer.shape, buffer.dtype, buffer.device) == (p.shape, p.dtype, p.device)
        assert not buffer.requires_grad
        assert buffer.stride() == p.stride()
    assert set(SGD([Parameter(torch.ones(1))]).param_groups[0]) <= set(state["param_groups"][0])


def test_without_momentum_there_is_no_state(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    run(model, optimizer, range(2))
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.same_bits_as_sgd
@each_hyper
@pytest.mark.parametrize("start", ["SGD", "SparseOpt"])
def test_checkpoint_goes_to_the_other_optimizer_mid_run(backend: Backend, start: str, hyper: dict) -> None:
    def make(name: str, model: Network) -> torch.optim.Optimizer:
        if name == "SGD":
            return SGD(model.parameters(), **hyper, foreach=False)
        return SparseOpt(model.parameters(), **hyper, backend=backend.name)

    straight, switched = Network(), Network()
    run(straight, make("SGD", straight), range(12))

    first = make(start, switched)
    run(switched, first, range(6))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make("SparseOpt" if start == "SGD" else "SGD", switched)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(switched, second, range(6, 12))
    assert_same(straight, switched)


@pytest.mark.same_bits_as_sgd
@each_hyper
def test_masked_checkpoints_go_both_ways(backend: Backend, hyper: dict) -> None:
    """Masked SGD written by hand, three steps of each in turn, equals correction="none" all the way."""

    class ByHand(SGD):
        def step(self) -> None:
            for p, mask in self.masks.items():
                p.grad.mul_(mask)
            super().step()
            with torch.no_grad():
                for p, mask in self.masks.items():
                    p.mul_(mask)

    def make(name: str, model: Network) -> torch.optim.Optimizer:
        if name == "hand":
            optimizer = ByHand(model.parameters(), **hyper, foreach=False)
            optimizer.masks = model.masks_dict()
            return optimizer
        return SparseOpt(
            model.parameters(), **hyper, masks=Masks(model), correction="none", backend=backend.name
        )

    straight, switched = Network(), Network()
    run(straight, make("hand", straight), range(12))
    state = None
    for i, name in enumerate(["hand", "ours", "hand", "ours"]):
        optimizer = make(name, switched)
        if state is not None:
            optimizer.load_state_dict(state)
        run(switched, optimizer, range(3 * i, 3 * i + 3))
        state = copy.deepcopy(optimizer.state_dict())
    for p, q in zip(straight.parameters(), switched.parameters(), strict=True):
        assert torch.equal(p, q)


@each_hyper
@pytest.mark.parametrize("into", ["new", "running"])
@each_mapping
def test_save_and_load_mid_run(backend: Backend, mapping: str, into: str, hyper: dict) -> None:
    """Masks change before and after the checkpoint; a load into an optimizer that is running forgets all."""
    extra = {"ham_alpha": 2.0, "correction": "unnormalized", "max_grad_norm": 0.5}

    def make(model: Network) -> SparseOpt:
        return SparseOpt(
            model.parameters(), **hyper, **extra, masks=model.masks(mapping), backend=backend.name
        )

    def moving_masks(model: Network, optimizer: SparseOpt, steps: range) -> None:
        for step in steps:
            if step % 3 == 1 and mapping != "no-mask":
                generator = torch.Generator().manual_seed(step)
                model[0].weight_mask.copy_(pattern_mask("half", (9, 13), generator))
            model.set_grads(step)
            optimizer.step()

    straight = Network()
    whole = make(straight)
    moving_masks(straight, whole, range(12))

    model = Network()
    first = make(model)
    moving_masks(model, first, range(6))
    files = [io.BytesIO(), io.BytesIO()]
    torch.save(model.state_dict(), files[0])
    torch.save(first.state_dict(), files[1])
    if into == "new":
        model = Network(seed=5)
        second = make(model)
    else:
        second = first
        moving_masks(model, first, range(6, 9))
    for target, file in zip((model, second), files, strict=True):
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
    moving_masks(model, second, range(6, 12))
    assert_same(straight, model)
    assert_same_state(whole, second)


def test_loading_an_sgd_checkpoint_keeps_what_sgd_does_not_know() -> None:
    model = Network()
    own = {"correction": "none", "ham_alpha": 2.0, "ham_beta": 0.5, "max_grad_norm": 3.0}
    optimizer = SparseOpt(
        [{"params": model[0].parameters(), **own}, {"params": model[2].parameters(), "ham_alpha": 7.0}]
    )
    sgd = SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.25, momentum=0.5)
    optimizer.load_state_dict(sgd.state_dict())
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
    assert {key: optimizer.param_groups[0][key] for key in own} == own
    assert optimizer.param_groups[1]["ham_alpha"] == 7.0
    assert optimizer.param_groups[1]["correction"] == "layer"


def test_our_checkpoint_brings_our_hyperparameters() -> None:
    p = Parameter(torch.ones(2))
    saved = SparseOpt([p], correction="none", ham_alpha=2.0, max_grad_norm=3.0).state_dict()
    optimizer = SparseOpt([p])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["correction"] == "none"
    assert optimizer.param_groups[0]["ham_alpha"] == 2.0
    assert optimizer.param_groups[0]["max_grad_norm"] == 3.0


def test_old_checkpoints_load(backend: Backend) -> None:
    """Of the days when SGD had fewer options, and a buffer of None before the first step."""
    model, other = Network(), Network()
    old = {
        "state": {i: {"momentum_buffer": None} for i in range(4)},
        "param_groups": [
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.0, "nesterov": False}
            | {"params": [0, 1, 2, 3]}
        ],
    }
    optimizer = SparseOpt(model.parameters(), masks=Masks(model), backend=backend.name)
    optimizer.load_state_dict(old)
    run(model, optimizer, range(3))
    fresh = SparseOpt(
        other.parameters(), lr=0.1, momentum=0.9, dampening=0.5, masks=Masks(other), backend=backend.name
    )
    run(other, fresh, range(3))
    assert_same(model, other)
    assert_same_state(optimizer, fresh)


def test_a_checkpoint_that_does_not_fit_changes_nothing(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=Masks(model), backend=backend.name)
    run(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(SparseOpt([Parameter(torch.ones(2))]).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert same_bits(entry["momentum_buffer"], after["state"][i]["momentum_buffer"])


# ---- copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@each_mapping
def test_copies_of_model_masks_and_optimizer_together(backend: Backend, mapping: str, how: str) -> None:
    """The copy goes on as the original does, with masks of its own."""
    model = Network()
    masks = model.masks(mapping)
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=0.5, masks=masks, backend=backend.name
    )
    run(model, optimizer, range(3))
    bundle = (model, masks, optimizer)
    twin = copy.deepcopy(bundle) if how == "deepcopy" else pickle.loads(pickle.dumps(bundle))
    other, other_masks, other_optimizer = twin
    assert other_optimizer.param_groups[0]["params"][0] is other[0].weight
    assert other_optimizer._step_supports_amp_scaling
    if mapping != "no-mask":
        assert other_masks[other[0].weight] is other[0].weight_mask
        assert other_masks[other[0].weight] is not masks[model[0].weight]
        # A mask of the copy is changed: only the copy sees it.
        other[0].weight_mask[2] = False
        run(other, other_optimizer, range(3, 4))
        assert not other[0].weight[2].any()
        assert model[0].weight[2].any()
        model[0].weight_mask[2] = False
        run(model, optimizer, range(3, 4))
        run(model, optimizer, range(4, 8))
        run(other, other_optimizer, range(4, 8))
    else:
        run(model, optimizer, range(3, 8))
        run(other, other_optimizer, range(3, 8))
    assert_same(model, other)
    assert_same_state(optimizer, other_optimizer)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copy_of_the_optimizer_alone(backend: Backend, how: Callable[[Any], Any]) -> None:
    """Its parameters and masks are copied with it, before and after its first step."""
    model = Network()
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, masks=model.masks_dict(), backend=backend.name
    )
    for _ in range(2):
        twin = how(optimizer)
        grads = [torch.randn_like(p) for p in model.parameters()]
        for opt in (optimizer, twin):
            for p, grad in zip(opt.param_groups[0]["params"], grads, strict=True):
                p.grad = grad.clone()
            opt.step()
        for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
            assert p is not q
            assert same_bits(p, q)
        assert_same_state(optimizer, twin)


def test_shallow_copy_keeps_the_parameters(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    twin = copy.copy(optimizer)
    run(model, twin, range(2))
    other = Network()
    run(other, SparseOpt(other.parameters(), lr=0.1, masks=Masks(other), backend=backend.name), range(2))
    assert_same(model, other)


# ---- learning rate schedulers and tensor learning rates ---------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 3, base_momentum=0.5, max_momentum=0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=12, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.02, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.same_bits_as_sgd
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(backend: Backend, scheduler: str, tensor_lr: bool) -> None:
    """Learning rates, momenta and weights are those of torch.optim.SGD under the same scheduler."""
    models, rates = [Network(), Network()], []
    for model in models:
        rates.append([])
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
        if model is models[0]:
            optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, foreach=False)
        else:
            optimizer = SparseOpt(model.parameters(), lr=lr, momentum=0.9, backend=backend.name)
        schedule = SCHEDULERS[scheduler](optimizer)
        for step in range(12):
            model.set_grads(step)
            optimizer.step()
            plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
            schedule.step(1.0) if plateau else schedule.step()
            group = optimizer.param_groups[0]
            rates[-1].append((float(group["lr"]), group["momentum"]))
    assert rates[0] == rates[1]
    assert len(set(rates[1])) > 1
    assert_same(*models)


def test_scheduler_does_not_warn_of_the_order(backend: Backend, recwarn: pytest.WarningsRecorder) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    run(model, optimizer, range(1))
    schedule.step()
    assert not recwarn.list


def test_tensor_lr_is_shared_with_the_caller(backend: Backend) -> None:
    """What the caller writes into the tensor, the next step uses; the step never writes into it."""
    p = Parameter(torch.zeros(2, 3))
    lr = torch.tensor(0.5)
    optimizer = SparseOpt([p], lr=lr, masks={p: torch.ones(2, 3, dtype=torch.bool)}, backend=backend.name)
    assert optimizer.param_groups[0]["lr"] is lr
    p.grad = -torch.ones(2, 3)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert p.unique().tolist() == [0.75]
    assert lr.item() == 0.25
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).double()])
def test_tensor_lr_of_one_element(backend: Backend, lr: Tensor) -> None:
    p = Parameter(torch.zeros(3))
    p.grad = -torch.ones(3)
    SparseOpt([p], lr=lr, backend=backend.name).step()
    assert p.tolist() == [0.5, 0.5, 0.5]


def test_lr_zero_moves_the_momentum_only(backend: Backend) -> None:
    """As with SGD: a step at lr = 0 collects momentum, which the next step uses."""
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.0, momentum=0.5, masks=Masks(model), backend=backend.name)
    before = copy.deepcopy(model)
    run(model, optimizer, range(2))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())


# ---- automatic mixed precision ----------------------------------------------------------------------


def test_grad_scaler_finds_what_it_looks_for() -> None:
    assert SparseOpt._step_supports_amp_scaling is True
    assert "grad_scaler" not in inspect.signature(SparseOpt.step).parameters


@each_mapping
@pytest.mark.parametrize("unscale", [False, True], ids=["fused", "unscaled"])
def test_grad_scaler_equals_no_scaler(backend: Backend, mapping: str, unscale: bool) -> None:
    """A power of two scales without rounding: to the bit, with an overflow on the first step and later."""
    models = [Network(torch.float32), Network(torch.float32)]
    for model in models:
        optimizer = SparseOpt(
            model.parameters(),
            lr=0.1,
            momentum=0.9,
            dampening=0.5,
            max_grad_norm=0.5,
            masks=model.masks(mapping),
            backend=backend.name,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(8):
            overflow = step in (0, 1, 4)
            if model is models[0]:
                if not overflow:
                    run(model, optimizer, range(step, step + 1))
                continue
            scale = scaler.get_scale()
            model.set_grads(step, scale)
            scaler.scale(torch.ones(()))
            if overflow:
                model[2].weight.grad[0, 0] = torch.inf
            state = copy.deepcopy(list(model.parameters())), started(optimizer)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (scale / 2 if overflow else scale)
            assert not hasattr(optimizer, "grad_scale")
            if overflow:
                for p, q in zip(model.parameters(), state[0], strict=True):
                    assert same_bits(p, q)
                assert started(optimizer) == state[1]
    assert_same(*models)


@each_mapping
def test_unscale_and_clip(backend: Backend, mapping: str) -> None:
    """The gradients a user has unscaled and clipped are taken as they are."""
    models = [Network(torch.float32), Network(torch.float32)]
    for model in models:
        optimizer = SparseOpt(
            model.parameters(), lr=0.1, momentum=0.9, masks=model.masks(mapping), backend=backend.name
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=model is models[1])
        for step in range(4):
            model.set_grads(step, scaler.get_scale())
            scaler.scale(torch.ones(()))
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
    assert_same(*models)


def started(optimizer: SparseOpt) -> set[int]:
    """The parameters that made their first step: where the verdict of AMP stays on the device, a momentum
    buffer of zeros may be there before it."""
    state = optimizer.state_dict()["state"]
    return {i for i, own in state.items() if own["momentum_buffer"].any()}


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5])
def test_found_inf_leaves_everything_as_it_was(backend: Backend, found_inf: float) -> None:
    """It is a sum over devices, so any value but 0 counts: no weight, no state, no first step, no mask."""
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=Masks(model), backend=backend.name)
    model.set_grads(0)
    before = copy.deepcopy(model)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), torch.tensor(8.0)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.5) == 3.5
    assert_same(model, before)
    assert not started(optimizer)
    del optimizer.found_inf, optimizer.grad_scale

    run(model, optimizer, range(2))
    optimizer.found_inf = torch.tensor(found_inf)
    model[0].weight_mask[0].logical_not_()
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert_same(model, before)
    for i, entry in state["state"].items():
        assert same_bits(entry["momentum_buffer"], optimizer.state_dict()["state"][i]["momentum_buffer"])
    del optimizer.found_inf
    optimizer.step()
    assert not model[0].weight[~model[0].weight_mask].any()


def test_a_group_added_after_a_first_step_that_was_skipped(backend: Backend) -> None:
    """The next step of the others is still their first: dampening does not touch it."""
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer = SparseOpt([p], lr=1.0, momentum=0.9, dampening=0.5, backend=backend.name)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.add_param_group({"params": [q]})
    optimizer.step()
    assert p.tolist() == q.tolist() == [0.0] * 3
    optimizer.step()
    assert p.tolist() == q.tolist() == pytest.approx([-1.4] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_under_a_scaler(backend: Backend, dtype: torch.dtype) -> None:
    model = Network(dtype)
    optimizer = SparseOpt(model.parameters(), lr=0.05, momentum=0.9, masks=Masks(model), backend=backend.name)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    losses = []
    for _ in range(15):
        losses.append(model.set_grads(0, scaler.get_scale()).item())
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.8 * losses[0]
    assert all(not p[~mask].any() for p, mask in model.masks_dict().items())


def test_autocast_trains(backend: Backend) -> None:
    model = Network(torch.float32)
    optimizer = SparseOpt(model.parameters(), lr=0.05, momentum=0.9, masks=Masks(model), backend=backend.name)
    x, y = torch.randn(32, 13), torch.randn(32, 4)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
