"""What is refused: by which error, in which words, and that nothing has been changed then."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import pattern_mask, same_bits
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels import kernels
from sparseopt_kernels.masks import Masks
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.sparsify import sparsify


def weights(count: int = 3) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(4, 9, generator=generator)) for _ in range(count)]


def mask_like(p: Tensor, seed: int = 0) -> Tensor:
    return pattern_mask("half", p.shape, torch.Generator().manual_seed(seed))


def words(*parts: str) -> str:
    """A pattern for these texts in this order, with anything between them."""
    return ".*".join(re.escape(part) for part in parts)


# ---- hyperparameters --------------------------------------------------------------------------------

NUMBERS = ["lr", "momentum", "dampening", "weight_decay", "ham_alpha", "ham_beta", "max_grad_norm"]
BAD_NUMBERS = [-0.1, float("nan"), float("-inf")]
HYPERPARAMETERS = [
    *(pytest.param({n: v}, words(n, str(v), "must be"), id=f"{n}={v}") for n in NUMBERS for v in BAD_NUMBERS),
    *(pytest.param({n: float("inf")}, words(n, "inf", "must be"), id=f"{n}=inf") for n in NUMBERS[:-1]),
    pytest.param({"max_grad_norm": 0.0}, words("max_grad_norm", "0", "must be"), id="max_grad_norm=0"),
    pytest.param({"lr": torch.tensor(-1.0)}, words("lr", "-1", "must be"), id="tensor-lr-negative"),
    pytest.param({"lr": torch.tensor(float("nan"))}, words("lr", "nan", "must be"), id="tensor-lr-nan"),
    pytest.param({"lr": torch.ones(2)}, words("lr", "2", "one"), id="tensor-lr-of-two"),
    pytest.param({"nesterov": True}, words("nesterov", "momentum"), id="nesterov-without-momentum"),
    pytest.param(
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        words("nesterov", "dampening"),
        id="nesterov-with-dampening",
    ),
    pytest.param(
        {"correction": "neuron"},
        words("correction", "'neuron'", "'layer'", "'unnormalized'", "'none'"),
        id="correction=neuron",
    ),
    pytest.param({"correction": None}, words("correction", "None", "'layer'"), id="correction=None"),
]


@pytest.mark.parametrize(("hyper", "message"), HYPERPARAMETERS)
def test_hyperparameters(hyper: dict[str, Any], message: str) -> None:
    """Of all groups, of one group, and of a group that comes later, which then is not there."""
    a, b, c = weights()
    with pytest.raises(ValueError, match=message):
        SparseOpt([a], **hyper)
    with pytest.raises(ValueError, match=message):
        SparseOpt([{"params": [a]}, {"params": [b], **hyper}])
    optimizer = SparseOpt([a])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [c], **hyper})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [c]})


def test_differentiable() -> None:
    a, b = weights(2)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        SparseOpt([a], differentiable=True)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        SparseOpt([{"params": [a]}, {"params": [b], "differentiable": True}])


def test_fused_and_foreach_together() -> None:
    with pytest.raises(RuntimeError, match=words("fused", "foreach")):
        SparseOpt(weights(1), fused=True, foreach=True)


@pytest.mark.parametrize(
    "flags", [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}], ids=str
)
def test_fused_or_foreach_are_accepted(backend: Backend, flags: dict[str, bool]) -> None:
    (p,) = weights(1)
    p.grad = torch.ones_like(p)
    optimizer = SparseOpt([p], **flags, backend=backend.name)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any()


# ---- parameters -------------------------------------------------------------------------------------


def test_a_parameter_in_two_groups() -> None:
    a, b, _ = weights()
    already = (
        r"params\[0\] of the new group is in the optimizer already, as param_groups\[0\]\['params'\]\[1\]"
    )
    with pytest.raises(ValueError, match=already):
        SparseOpt([{"params": [a, b]}, {"params": [b]}])
    optimizer = SparseOpt([a])
    with pytest.raises(ValueError, match="is in the optimizer already"):
        optimizer.add_param_group({"params": [a]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("named", [False, True], ids=["tensors", "named"])
def test_a_parameter_twice_in_a_group(named: bool) -> None:
    (a,) = weights(1)
    first, second = (
        ("a", "b") if named else (r"params\[0\] of the new group", r"params\[1\] of the new group")
    )
    with pytest.raises(ValueError, match=f"{second} is in the optimizer already, as {first}"):
        SparseOpt([("a", a), ("b", a)] if named else [a, a])


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        SparseOpt([])


@pytest.mark.parametrize(
    "params", [torch.ones(2), [1.0], [{"params": {torch.ones(2)}}]], ids=["tensor", "float", "set"]
)
def test_not_parameters(params: Any) -> None:
    with pytest.raises(TypeError):
        SparseOpt(params)


def test_a_parameter_that_is_no_leaf() -> None:
    (a,) = weights(1)
    with pytest.raises(ValueError, match="non-leaf"):
        SparseOpt([a * 2])


# ---- masks ------------------------------------------------------------------------------------------

BAD_MASKS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "shape": (lambda p: torch.ones(9, 4, dtype=torch.bool), ("shape (9, 4)", "(4, 9)")),
    "fewer-dimensions": (lambda p: torch.ones(36, dtype=torch.bool), ("shape (36,)", "(4, 9)")),
    "one-row": (lambda p: torch.ones(1, 9, dtype=torch.bool), ("shape (1, 9)", "(4, 9)")),
    "float": (torch.ones_like, ("torch.float32", "must be torch.bool")),
    "uint8": (lambda p: torch.ones(4, 9, dtype=torch.uint8), ("torch.uint8", "must be torch.bool")),
    "int64": (lambda p: torch.ones(4, 9, dtype=torch.int64), ("torch.int64", "must be torch.bool")),
    "device": (lambda p: torch.ones(4, 9, dtype=torch.bool, device="meta"), ("meta", "on cpu")),
    "sparse": (lambda p: torch.ones(4, 9, dtype=torch.bool).to_sparse(), ("torch.sparse_coo", "must be")),
    "list": (lambda p: [[True] * 9] * 4, ("list", "must be", "tensor")),
    "none": (lambda p: None, ("NoneType", "must be", "tensor")),
}
each_bad_mask = pytest.mark.parametrize("bad", BAD_MASKS)


@each_bad_mask
def test_masks_at_construction(bad: str) -> None:
    """The message calls the parameter by the name it was given, or by its place."""
    make, message = BAD_MASKS[bad]
    a, b, _ = weights()
    masks = {a: mask_like(a), b: make(b)}
    with pytest.raises(ValueError, match=words("mask for", "param_groups[0]['params'][1]", *message)):
        SparseOpt([a, b], masks=masks)
    with pytest.raises(ValueError, match=words("mask for", "'second'", *message)):
        SparseOpt([("first", a), ("second", b)], masks=masks)


@pytest.mark.parametrize("bad", ["shape", "float"])
def test_mask_buffers_of_a_model(bad: str) -> None:
    make, message = BAD_MASKS[bad]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(9, 4))
    model[1].register_buffer("weight_mask", make(model[1].weight))
    with pytest.raises(ValueError, match=words("'1.weight'", *message)):
        Masks(model)


def test_mask_for_a_parameter_the_optimizer_does_not_have() -> None:
    a, b, _ = weights()
    with pytest.raises(ValueError, match=words("mask for", "(4, 9)", "not among the optimizer's parameters")):
        SparseOpt([a], masks={a: mask_like(a), b: mask_like(b)})
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    masks = sparsify(model, 0.5, "uniform")
    with pytest.raises(ValueError, match=words("'1.weight'", "not among the optimizer's parameters")):
        SparseOpt(model[0].parameters(), masks=masks)


def test_masks_by_name_instead_of_by_parameter() -> None:
    (a,) = weights(1)
    with pytest.raises(ValueError, match=words("masks", "'weight'", "not among")):
        SparseOpt([("weight", a)], masks={"weight": mask_like(a)})


@pytest.mark.parametrize(
    "masks", [[torch.ones(4, 9)], torch.ones(4, 9), lambda p: p], ids=["list", "tensor", "function"]
)
def test_masks_that_are_no_mapping(masks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=words("masks", "mapping")):
        SparseOpt(weights(1), masks=masks)


# ---- backends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["backend", "SPARSEOPT_BACKEND"])
def test_unknown_backend(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says where the name came from, and which names there are."""
    if where == "SPARSEOPT_BACKEND":
        monkeypatch.setenv(where, "gpu")
    with pytest.raises(ValueError, match=words(where, "'gpu'", "'auto'", "'reference'", "'cpu'")):
        SparseOpt(weights(1), backend="gpu" if where == "backend" else "auto")


@pytest.mark.parametrize("where", ["backend", "SPARSEOPT_BACKEND"])
def test_backend_that_cannot_run_says_why(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.BACKENDS["cpu"], "unavailable", lambda device: "the reason")
    if where == "SPARSEOPT_BACKEND":
        monkeypatch.setenv(where, "cpu")
    with pytest.raises(RuntimeError, match=words("'cpu'", "cannot run", "the reason")) as error:
        SparseOpt(weights(1), backend="cpu" if where == "backend" else "auto")
    assert ("SPARSEOPT_BACKEND" in str(error.value)) == (where == "SPARSEOPT_BACKEND")


def test_auto_falls_back_to_the_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("SPARSEOPT_BACKEND", raising=False)
    monkeypatch.setattr(kernels.BACKENDS["cpu"], "unavailable", lambda device: "a reason of this test alone")
    assert kernels.backend_for("auto", torch.device("cpu")) is kernels.BACKENDS["reference"]
    (p,) = weights(1)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = SparseOpt([p], lr=0.5)
    optimizer.step()
    optimizer.step()
    assert torch.equal(p, before - 1.0)
    (warning,) = recwarn.list
    assert warning.category is RuntimeWarning
    assert re.search(words("reference", "'cpu'", "a reason of this test alone"), str(warning.message))


def test_the_variable_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEOPT_BACKEND", "gpu")
    SparseOpt(weights(1), backend="reference")


def test_backend_for_another_device() -> None:
    a = Parameter(torch.ones(2, 2, device="meta"))
    with pytest.raises(RuntimeError, match=words("'cpu'", "cannot run", "meta")):
        SparseOpt([a], backend="cpu")
    (b,) = weights(1)
    if kernels.BACKENDS["cpu"].unavailable(torch.device("cpu")) is None:
        optimizer = SparseOpt([b], backend="cpu")
        with pytest.raises(RuntimeError, match=words("'cpu'", "cannot run", "meta")):
            optimizer.add_param_group({"params": [a]})
        assert len(optimizer.param_groups) == 1


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    if kernels.BACKENDS["cpu"].unavailable(torch.device("cpu")) is not None:
        pytest.skip("there is no native library")
    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "avx9000")
    (p,) = weights(1)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = SparseOpt([p], momentum=0.9, backend="cpu")
    with pytest.raises((RuntimeError, ValueError), match=words("SPARSEOPT_CPU_ISA", "avx9000")):
        optimizer.step()
    assert same_bits(p, before)
    assert not optimizer.state


# ---- a failed step changes nothing ------------------------------------------------------------------


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
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
        kwargs = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "max_grad_norm": 1.0}
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


# ---- sparsify and Masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    model = nn.Linear(9, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words("sparsity", str(sparsity))):
        sparsify(model, sparsity)
    assert model.state_dict().keys() == before.keys()
    assert same_bits(model.weight, before["weight"])


def test_a_model_with_nothing_to_mask() -> None:
    with pytest.raises(ValueError, match=r"mask"):
        sparsify(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), 0.5)
    with pytest.raises(ValueError, match=words("no mask", "sparsify")):
        Masks(nn.Linear(3, 3))


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay", "ham_alpha", "ham_beta"])
@pytest.mark.parametrize("value", ["0.1", None])
def test_a_hyperparameter_that_is_no_number(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, it must be a finite number >= 0"):
        SparseOpt(weights(1), **{name: value})


@pytest.mark.parametrize("name", ["masks", "backend"])
def test_a_group_with_what_is_one_for_all(name: str) -> None:
    with pytest.raises(ValueError, match=f"a parameter group has '{name}'"):
        SparseOpt([{"params": weights(1), name: None}])
