"""PyTorch's own generic checks of an optimizer (its ``test/test_optim.py``), driven by an OptimizerInfo.

``OptimizerInfo`` and the inputs come from the private module that the PyTorch wheel ships; the checks are
those of ``TestOptimRenewed`` that concern an optimizer on the CPU, in our own words.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import pattern_mask
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparseopt_kernels.optimizer import SparseOpt

common = pytest.importorskip("torch.testing._internal.common_optimizers")

try:
    SGD_INFO = next(info for info in common.optim_db if info.optim_cls is torch.optim.SGD)
    OptimizerInput, OptimizerErrorEnum = common.OptimizerInput, common.OptimizerErrorEnum
except (AttributeError, StopIteration):
    pytest.skip("PyTorch's private description of optimizers has moved", allow_module_level=True)


def inputs(device: str, dtype: torch.dtype | None = None) -> list[Any]:
    """What SGD is tested with, and our own hyperparameters."""
    return [
        *SGD_INFO.optim_inputs_func(device=device),
        OptimizerInput(
            params=None, kwargs={"momentum": 0.9, "correction": "unnormalized"}, desc="unnormalized"
        ),
        OptimizerInput(params=None, kwargs={"correction": "none"}, desc="uncorrected"),
        OptimizerInput(params=None, kwargs={"lr": 1e-2, "ham_alpha": 2.0, "ham_beta": 0.1}, desc="HAM"),
        OptimizerInput(params=None, kwargs={"lr": 1e-2, "max_grad_norm": 1.0}, desc="norm limit"),
    ]


INFO = common.OptimizerInfo(
    SparseOpt,
    optim_inputs_func=inputs,
    scheduler_inputs=SGD_INFO.scheduler_inputs,
    optim_error_inputs_func=SGD_INFO.optim_error_inputs_func,
    supported_impls=("foreach", "fused"),
    supports_sparse=True,
    supports_complex=True,
    supports_fused_on=("cpu",),
)

INPUTS = INFO.optim_inputs_func(device="cpu")
each_input = pytest.mark.parametrize("given", INPUTS, ids=[i.desc.replace(" ", "-") for i in INPUTS])
each_masking = pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])


def mask_of(shape: torch.Size) -> Tensor:
    return pattern_mask("half", shape, torch.Generator().manual_seed(0))


@pytest.fixture
def make(backend: Backend, masked: bool) -> Any:
    """Construct the optimizer as the suite does, with a mask for each matrix where asked for."""

    def construct(params: Any, **kwargs: Any) -> SparseOpt:
        params = list(params)
        masks = {}
        if masked:
            members = [p for g in params for p in (g["params"] if isinstance(g, dict) else [g])]
            tensors = [p[1] if isinstance(p, tuple) else p for p in members]
            masks = {p: mask_of(p.shape) for p in tensors if p.ndim == 2}
            for p, mask in masks.items():  # as sparsify leaves them
                p.data *= mask
        return INFO.optim_cls(params, masks=masks, backend=backend.name, **kwargs)

    return construct


def keyword_arguments(given: Any) -> dict[str, Any]:
    """A copy, for a tensor learning rate is shared with the optimizer."""
    return copy.deepcopy(given.kwargs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def closure_loss(optimizer: SparseOpt, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weight.mv(x) + bias).pow(2).sum()
    loss.backward()
    return loss


# ---- the suite --------------------------------------------------------------------------------------

SCHEDULERS = [[], *INFO.scheduler_inputs]


@pytest.mark.parametrize("layout", ["contiguous", "non-contiguous"])
@each_masking
@each_input
def test_goes_right_direction(make: Any, given: Any, layout: str) -> None:
    """Down, or up where asked to, alone and under each set of schedulers."""
    gap = 1 if layout == "contiguous" else 2
    for schedulers in SCHEDULERS:
        generator = torch.Generator().manual_seed(3)
        weight = Parameter(torch.randn(10, 5, gap, generator=generator)[..., 0])
        bias = Parameter(torch.randn(10, gap, generator=generator)[..., 0])
        x = torch.randn(5, generator=generator)
        optimizer = make([weight, bias], **keyword_arguments(given))
        chosen = [scheduler(optimizer) for scheduler in schedulers]
        losses = []
        for _ in range(20):
            loss = optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x)).item()
            losses.append(loss)
            for scheduler in chosen:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(loss) if plateau else scheduler.step()
        if given.kwargs.get("maximize"):
            assert losses[-1] > losses[0]
        else:
            assert losses[-1] < losses[0]


@pytest.mark.parametrize("masked", [False], ids=["dense"])
def test_rosenbrock(make: Any) -> None:
    """A hard valley, one coordinate of the gradient at a time: float32 follows float64 all the way."""
    steps = []
    for narrow in (False, True):
        p = Parameter(torch.tensor([1.5, 1.5], dtype=torch.float32 if narrow else torch.float64))
        optimizer = make([p], lr=1e-4, momentum=0.9)
        for t in range(200):
            optimizer.zero_grad()
            x, y = p.detach().unbind()
            gradient = torch.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)])
            keep = torch.tensor([1.0, 0.0] if t % 2 else [0.0, 1.0])
            p.grad = (gradient * keep).to(p.dtype)
            optimizer.step()
        steps.append(p.detach().double())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-4)
    assert (steps[0] - 1).norm() < math.sqrt(0.5)


@each_masking
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_param_groups_with_their_own(make: Any, key: str) -> None:
    """What a group has set, it does; what it has not, it takes from the constructor."""
    for values in itertools.permutations([0.0, 1e-2]):
        weight, bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
        groups = [{"params": [weight], key: values[0]}, {"params": [bias]}]
        optimizer = make(groups, **{"lr": 1e-2, key: values[1]})
        assert [g[key] for g in optimizer.param_groups] == list(values)
        x = torch.randn(5)
        losses = [closure_loss(optimizer, weight, bias, x).item()]
        for _ in range(20):
            optimizer.step()
            losses.append(closure_loss(optimizer, weight, bias, x).item())
        assert losses[-1] < losses[0]


@each_masking
@each_input
def test_tensor_lr_equals_float_lr(make: Any, given: Any) -> None:
    models = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        generator = torch.Generator().manual_seed(0)
        weight = Parameter(torch.randn(10, 5, generator=generator))
        bias = Parameter(torch.randn(10, generator=generator))
        optimizer = make([weight, bias], **keyword_arguments(given) | {"lr": lr})
        x = torch.randn(5, generator=generator)
        for _ in range(3):
            optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
        models.append((weight, bias))
    for a, b in zip(*models, strict=True):
        assert torch.equal(a, b)


@each_masking
@each_input
def test_complex_is_two_real_numbers(make: Any, given: Any) -> None:
    """A complex parameter moves as its real view does. A mask of the view has each element twice: the
    ratios of fan-in are the same."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(10, 5, 2, generator=generator)
    as_complex, as_real = Parameter(torch.view_as_complex(value.clone())), Parameter(value.clone())
    one, other = make([as_complex], **keyword_arguments(given)), make([as_real], **keyword_arguments(given))
    for mask in one._masks.values():
        other._masks[as_real] = mask.unsqueeze(-1).expand(10, 5, 2)
    for _ in range(3):
        grad = torch.randn(10, 5, 2, generator=generator)
        as_complex.grad, as_real.grad = torch.view_as_complex(grad.clone()), grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(torch.view_as_real(as_complex), as_real)


@each_masking
def test_deepcopy_copies_all_public_attributes(make: Any) -> None:
    optimizer = make([Parameter(torch.randn(2, 3))], lr=0.1, momentum=0.9)

    def public(instance: object) -> set[str]:
        return {name for name in dir(instance) if not name.startswith("_")}

    assert public(optimizer) == public(copy.deepcopy(optimizer))


@each_masking
def test_hooks(make: Any) -> None:
    """Pre hooks run before post hooks, global ones on the outside, each exactly once a step."""
    seen: list[int] = []
    p = Parameter(torch.ones(2, 3))
    optimizer = make([p], lr=0.1, momentum=0.9)

    def record(number: int) -> Any:
        return lambda *_: seen.append(number)

    handles = [
        register_optimizer_step_pre_hook(record(0)),
        optimizer.register_step_pre_hook(record(1)),
        optimizer.register_step_post_hook(record(2)),
        register_optimizer_step_post_hook(record(3)),
    ]
    try:
        p.grad = torch.ones(2, 3)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == [0, 1, 2, 3]


@each_masking
def test_load_state_dict_deep_copies(make: Any) -> None:
    """Two optimizers never share a buffer, and the saved state does not move with the run."""
    p = Parameter(torch.randn(4, 5))
    optimizer = make([p], lr=0.1, momentum=0.9)
    p.grad = torch.randn(4, 5)
    optimizer.step()
    saved = optimizer.state_dict()
    other = make([p], lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(saved))
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        for key, value in mine.items():
            assert value.data_ptr() != theirs[key].data_ptr()


@each_masking
@each_input
def test_save_load_equality_with_weights_only(make: Any, given: Any) -> None:
    """A checkpoint needs no pickled code, and what is loaded is what was saved."""
    weight, bias = Parameter(torch.randn(2, 3)), Parameter(torch.randn(2))
    optimizer = make([weight, bias], **keyword_arguments(given))
    x = torch.randn(3)
    optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(optimizer.state_dict()["state"], loaded["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == loaded["param_groups"]


@each_masking
@each_input
def test_state_dict_deterministic(make: Any, given: Any) -> None:
    """One run, and one that is saved and loaded after each step, end in the same bits."""
    generator = torch.Generator().manual_seed(0)
    value, x = torch.randn(2, 3, generator=generator), torch.randn(3, generator=generator)
    runs = []
    for reload in (False, True):
        weight, bias = Parameter(value.clone()), Parameter(torch.zeros(2))
        optimizer = make([weight, bias], **keyword_arguments(given))
        for _ in range(6):
            optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
            if reload:
                state = optimizer.state_dict()
                optimizer = make([weight, bias], **keyword_arguments(given))
                optimizer.load_state_dict(state)
        runs.append((weight, bias))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@each_masking
def test_load_state_dict_with_and_without_names(make: Any) -> None:
    """Names are kept where they are saved, and not needed where they are not."""
    p = Parameter(torch.randn(4, 5))
    p.grad = torch.randn(4, 5)
    named = make([("w", p)], lr=0.1, momentum=0.9)
    unnamed = make([p], lr=0.1, momentum=0.9)
    for optimizer in (named, unnamed):
        optimizer.step()
    states = named.state_dict(), unnamed.state_dict()
    unnamed.load_state_dict(states[0])
    named.load_state_dict(states[1])
    assert named.param_groups[0]["param_names"] == ["w"]
    for optimizer in (named, unnamed):
        optimizer.step()


@each_masking
def test_step_is_noop_when_params_have_no_grad(make: Any) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    optimizer = make(params, momentum=0.9, weight_decay=0.1, max_grad_norm=1.0)
    before = copy.deepcopy(params)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@each_input
@pytest.mark.parametrize("masked", [False], ids=["dense"])
def test_step_is_noop_for_zero_grads(make: Any, given: Any) -> None:
    """Without weight decay and HAM's beta, a gradient of 0 moves nothing."""
    if given.kwargs.get("weight_decay") or given.kwargs.get("ham_beta"):
        pytest.skip("decays without a gradient, as it should")
    p = Parameter(torch.randn(5, 2))
    before = p.detach().clone()
    optimizer = make([p], **keyword_arguments(given))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)


@each_masking
@each_input
def test_grad_scaling_with_autocast_goes_right_direction(make: Any, given: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(10, 5, generator=generator))
    bias = Parameter(torch.randn(10, generator=generator))
    x = torch.randn(5, generator=generator)
    optimizer = make([weight, bias], **keyword_arguments(given))
    before = (weight.mv(x) + bias).pow(2).sum().item()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (weight.mv(x) + bias).pow(2).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    after = (weight.mv(x) + bias).pow(2).sum().item()
    assert after > before if given.kwargs.get("maximize") else after < before


@each_masking
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_implementation_flags_change_nothing(make: Any, flag: str) -> None:
    """``foreach`` and ``fused`` choose an implementation in PyTorch; here they change nothing."""
    runs = []
    for value in (None, True, False):
        generator = torch.Generator().manual_seed(0)
        weight = Parameter(torch.randn(10, 5, generator=generator))
        bias = Parameter(torch.randn(10, generator=generator))
        x = torch.randn(5, generator=generator)
        optimizer = make([weight, bias], lr=0.1, momentum=0.9, **{flag: value})
        for _ in range(3):
            optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
        runs.append((weight, bias))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


@each_masking
@each_input
def test_mixed_dtypes(make: Any, given: Any) -> None:
    """Parameters of every dtype in one optimizer, each updated as it is alone (the norm limit apart)."""
    if "max_grad_norm" in given.kwargs:
        pytest.skip("the norm is one over all parameters")
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    values = [torch.randn(3, 4, generator=generator).to(kind) for kind in kinds]
    grads = [torch.randn(3, 4, generator=generator).to(kind) for kind in kinds]
    together = [Parameter(value.clone()) for value in values]
    alone = [Parameter(value.clone()) for value in values]
    optimizers = [make(together, **keyword_arguments(given))]
    optimizers.extend(make([p], **keyword_arguments(given)) for p in alone)
    for params in (together, alone):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
    for optimizer in optimizers * 2:
        optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def error_inputs() -> Iterator[Any]:
    yield from INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    "case", list(error_inputs()), ids=lambda c: c.optimizer_error_input.desc.replace(" ", "-")
)
def test_errors(case: Any) -> None:
    """What PyTorch refuses, we refuse, with the same kind of error; our messages are our own. A duplicate
    in a group, of which PyTorch warns that it will be an error, is one."""
    given = case.optimizer_error_input
    params = [Parameter(torch.randn(1))] if given.params is None else given.params
    kind = ValueError if issubclass(case.error_type, Warning) else case.error_type
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    with pytest.raises(kind):
        SparseOpt(params, **given.kwargs)


def test_lazily_made_layers_train(backend: Backend) -> None:
    """A model built on the meta device and given memory later, as large models are."""
    with torch.device("meta"):
        model = nn.Linear(5, 3)
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    model(torch.randn(2, 5)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)
