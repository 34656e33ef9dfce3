"""Tensors of every kind under the optimizer: layouts, complex numbers, masks that move, autograd, memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backends import Backend, norm_error
from oracle import Hyper, Layer, Oracle
from side_by_side import assert_close, pattern_mask, same_bits
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks import Masks
from sparseopt_kernels.optimizer import SparseOpt

RULE = Hyper(lr=0.1, momentum=0.9, weight_decay=0.01, max_grad_norm=4.0)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def optimizer_of(backend: Backend, params: list[Tensor], masks: dict, rule: Hyper = RULE) -> SparseOpt:
    return SparseOpt(params, **rule.__dict__, masks=masks, backend=backend.name)


class Watched:
    """One parameter under an optimizer and the oracle; the caller arranges its memory in any way."""

    def __init__(
        self, backend: Backend, parameter: Parameter, mask: Tensor | None, rule: Hyper = RULE
    ) -> None:
        self.backend, self.parameter = backend, parameter
        self.masks = {} if mask is None else {parameter: mask}
        self.optimizer = optimizer_of(backend, [parameter], self.masks, rule)
        self.layer = Layer(parameter, mask)
        self.oracle = Oracle([(rule, {"p": self.layer})])
        self.steps = 0

    def step(self, grad: Tensor) -> None:
        """Step with a gradient as it is, layout and all, and compare."""
        self.parameter.grad = grad
        copied = grad.detach().clone()
        if self.parameter in self.masks:
            self.layer.set_mask(self.masks[self.parameter])
        self.optimizer.step()
        self.oracle.step({"p": copied})
        self.steps += 1
        assert same_bits(self.parameter.grad, copied)
        buffer = self.optimizer.state[self.parameter]["momentum_buffer"]
        real = self.parameter.real.dtype if self.parameter.is_complex() else self.parameter.dtype
        tolerance, error = self.backend.tolerance(real), norm_error([copied])
        assert_close(f"step {self.steps}", self.parameter, self.layer.p, self.layer.p_terms, tolerance, error)
        assert_close(f"step {self.steps}, b", buffer, self.layer.b, self.layer.b_terms, tolerance, error)
        self.resume()

    def resume(self) -> None:
        """Let the oracle go on from what is there."""
        fresh = Layer(self.parameter, None)
        self.layer.p = fresh.p
        buffer = self.optimizer.state[self.parameter].get("momentum_buffer")
        self.layer.b = None if buffer is None else Layer(buffer, None).p


def randn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.complex(*torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(shape: tuple[int, ...], seed: int = 0, pattern: str = "half") -> Tensor:
    return pattern_mask(pattern, shape, torch.Generator().manual_seed(seed))


# ---- memory formats ---------------------------------------------------------------------------------


def transposed(t: Tensor) -> Tensor:
    """The same values with the order of the dimensions reversed in memory."""
    return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))


def with_gaps(t: Tensor) -> Tensor:
    """The same values, every other place in memory, NaN between them."""
    wide = torch.empty(*t.shape, 2, dtype=t.dtype)
    wide.fill_(True if t.dtype == torch.bool else torch.nan)
    wide[..., 0] = t
    return wide[..., 0]


def off_by_one(t: Tensor) -> Tensor:
    """The same values at an address that no vector is aligned to, inside a larger buffer."""
    whole = torch.ones(t.numel() + 7, dtype=t.dtype)
    whole[3 : 3 + t.numel()] = t.reshape(-1)
    return whole[3 : 3 + t.numel()].view(t.shape)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "channels-last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": transposed,
    "gaps": with_gaps,
    "unaligned": off_by_one,
}


@pytest.mark.parametrize("pattern", [None, "half", "sparse99"], ids=str)
@pytest.mark.parametrize("grad_format", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_memory_formats(backend: Backend, format: str, grad_format: str, pattern: str | None) -> None:
    """Parameter and gradient in any two formats, the mask in a third, a buffer loaded in a fourth."""
    shape = (9, 6, 5, 7)
    parameter = Parameter(FORMATS[format](randn(shape)))
    assert parameter.stride() == FORMATS[format](randn(shape)).stride()
    mask = None if pattern is None else random_mask(shape, pattern=pattern)
    watched = Watched(backend, parameter, mask)
    for step in range(10):
        if mask is not None and step % 3 == 1:
            mask_format = list(FORMATS.values())[step % len(FORMATS)]
            watched.masks[parameter] = mask_format(random_mask(shape, step, pattern))
        if step == 6:
            buffer = watched.optimizer.state[parameter]["momentum_buffer"]
            watched.optimizer.state[parameter]["momentum_buffer"] = transposed(buffer)
        watched.step(FORMATS[grad_format](randn(shape, seed=step)))


def test_gradients_in_another_format_each_step(backend: Backend) -> None:
    shape = (8, 4, 3, 3)
    watched = Watched(backend, Parameter(randn(shape)), random_mask(shape))
    formats = list(FORMATS.values())
    for step in range(10):
        watched.step(formats[step % len(formats)](randn(shape, seed=step)))


def test_expanded_gradient(backend: Backend) -> None:
    """A gradient with stride 0."""
    for mask in (None, random_mask((5, 33))):
        watched = Watched(backend, Parameter(randn((5, 33))), mask)
        for step in range(3):
            watched.step(randn((5, 1), seed=step).expand(5, 33))


@pytest.mark.parametrize("change", ["clone", "channels-last", "half-and-back", "bfloat16"])
def test_memory_that_moves_between_steps(backend: Backend, change: str) -> None:
    """``model.to()`` gives a parameter other memory without any sign but the address."""
    shape = (6, 5, 3, 3)
    parameter = Parameter(randn(shape, torch.float32))
    watched = Watched(backend, parameter, random_mask(shape))
    for step in range(3):
        watched.step(randn(shape, torch.float32, step))
    parameter.grad = None
    former = parameter.data
    parameter.data = {
        "clone": former.clone,
        "channels-last": lambda: former.clone(memory_format=torch.channels_last),
        "half-and-back": lambda: former.half().float(),
        "bfloat16": former.bfloat16,
    }[change]()
    before = former.clone()
    if change == "bfloat16":  # the buffer goes with it, as load_state_dict would cast it
        watched.optimizer.load_state_dict(watched.optimizer.state_dict())
    watched.resume()
    for step in range(3, 6):
        watched.step(randn(shape, parameter.dtype, step))
    assert same_bits(former, before), "the memory that the parameter has left was written"


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_memory_read_in_another_order_between_steps(backend: Backend, masked: bool) -> None:
    """The same address and the same shape, other strides."""
    parameter = Parameter(randn((33, 33)))
    watched = Watched(backend, parameter, random_mask((33, 33)) if masked else None)
    for step in range(6):
        watched.step(randn((33, 33), seed=step))
        if step == 2:
            parameter.grad = None
            parameter.data = parameter.data.t()
            watched.resume()


@pytest.mark.parametrize("pattern", [None, "half", "sparse99", "tail", "full"], ids=str)
@each_float
def test_nothing_is_written_beside_a_tensor(
    backend: Backend, dtype: torch.dtype, pattern: str | None
) -> None:
    """Parameters, buffers and gradients that are views of one flat buffer, as sharded training has them:
    what lies before, between and behind them stays as it is."""
    shape, gap = (7, 37), 5
    size = shape[0] * shape[1]

    def place(flat: Tensor, i: int) -> Tensor:
        start = gap + i * (size + gap)
        return flat[start : start + size].view(shape)

    flats = [randn((3 * (size + gap) + gap,), dtype, seed) for seed in range(3)]
    before = [flat.clone() for flat in flats]
    params = [Parameter(place(flats[0], i)) for i in range(3)]
    masks = {} if pattern is None else {p: random_mask(shape, i, pattern) for i, p in enumerate(params)}
    optimizer = optimizer_of(backend, params, masks)
    for i, p in enumerate(params):
        p.grad = place(flats[1], i)
        optimizer.state[p]["momentum_buffer"] = place(flats[2], i)
    for _ in range(3):
        optimizer.step()
    inside = torch.zeros(flats[0].shape, dtype=torch.bool)
    for i in range(3):
        place(inside, i).fill_(True)
    assert same_bits(flats[1], before[1])
    for flat, former in zip(flats, before, strict=True):
        assert same_bits(flat[~inside], former[~inside])
    assert not torch.equal(flats[0], before[0])
    if pattern != "full" and pattern is not None:
        for p, mask in masks.items():
            assert not p[~mask].any()


# ---- complex, sparse, odd dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, "half", "empty-rows"], ids=str)
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (7, 27), (4, 3, 3, 3)], ids=str)
def test_complex(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, pattern: str | None) -> None:
    """Pairs of real numbers; the buffer is complex as the parameter is; masks change on the way."""
    mask = None if pattern is None else random_mask(shape, pattern=pattern)
    watched = Watched(backend, Parameter(randn(shape, dtype)), mask)
    for step in range(8):
        if mask is not None and step % 3 == 2:
            mask.copy_(random_mask(shape, step, pattern))
        watched.step(randn(shape, dtype, step))
    assert watched.optimizer.state[watched.parameter]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy-ball", "nesterov"])
def test_complex_without_a_mask_is_sgd(backend: Backend, nesterov: bool) -> None:
    """To rounding: PyTorch multiplies by a complex number where we multiply two real ones."""
    ours, theirs = (Parameter(randn((6, 9), torch.complex128)) for _ in range(2))
    common = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    optimizer = SparseOpt([ours], **common, backend=backend.name)
    sgd = torch.optim.SGD([theirs], **common, foreach=False)
    for step in range(5):
        ours.grad, theirs.grad = (randn((6, 9), torch.complex128, step) for _ in range(2))
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_conjugated_and_negated_gradients(backend: Backend) -> None:
    """Gradients that are lazy views: the conj and neg bits of PyTorch."""
    watched = Watched(backend, Parameter(randn((4, 9), torch.complex128)), random_mask((4, 9)))
    for step in range(3):
        watched.step(randn((4, 9), torch.complex128, step).conj())
    watched = Watched(backend, Parameter(randn((4, 9))), random_mask((4, 9)))
    for step in range(3):
        grad = randn((4, 9), torch.complex128, step).conj().imag
        assert grad.is_neg()
        watched.step(grad)


def test_negated_gradient_of_a_single_number(backend: Backend) -> None:
    """One number is contiguous whatever its stride: its neg bit is all that tells."""
    imaginary = Parameter(torch.ones(1, 1))
    z = torch.complex(torch.zeros(1, 1), imaginary).conj()
    torch.view_as_real(z.resolve_conj()).sum().backward()
    assert imaginary.grad.item() == -1.0
    SparseOpt([imaginary], lr=1.0, backend=backend.name).step()
    assert imaginary.item() == 2.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
def test_sparse_gradient_of_a_dense_parameter(backend: Backend, dtype: torch.dtype, momentum: float) -> None:
    """Embedding(sparse=True) without a mask: the same as with the dense gradient."""
    params = [Parameter(randn((10, 4), dtype)) for _ in range(2)]
    for p in params:
        optimizer = SparseOpt([p], lr=0.1, momentum=momentum, max_grad_norm=1.0, backend=backend.name)
        for step in range(4):
            values = randn((3, 4), dtype, step)
            grad = torch.sparse_coo_tensor(
                [[1, 7, 1]], values, (10, 4), check_invariants=True
            )  # 1 comes twice
            p.grad = grad if p is params[0] else grad.to_dense()
            optimizer.step()
            assert p.grad.is_sparse == (p is params[0])
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this PyTorch ties a gradient to its dtype")
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_gradient_of_a_narrow_parameter(backend: Backend, dtype: torch.dtype, masked: bool) -> None:
    parameter = Parameter(randn((5, 33), dtype))
    parameter.grad_dtype = torch.float32
    watched = Watched(backend, parameter, random_mask((5, 33)) if masked else None)
    for step in range(4):
        watched.step(randn((5, 33), torch.float32, step))


# ---- masks that move --------------------------------------------------------------------------------


def masked_layer(seed: int = 0, pattern: str = "sparse99") -> nn.Linear:
    """A layer sparse enough for a backend to skip most of its memory."""
    layer = nn.Linear(517, 23, bias=False)
    with torch.no_grad():
        layer.weight.copy_(randn((23, 517), torch.float32, seed))
    layer.register_buffer("weight_mask", random_mask((23, 517), seed, pattern))
    return layer


def give_gradient(layer: nn.Linear, seed: int) -> None:
    layer.weight.grad = randn((23, 517), torch.float32, seed)


def settled(backend: Backend, **kwargs: float) -> tuple[nn.Linear, SparseOpt]:
    """A masked layer after three steps: nothing is stale, a backend may skip what it likes."""
    layer = masked_layer()
    common = {"lr": 0.1, "momentum": 0.9} | kwargs
    optimizer = SparseOpt(layer.parameters(), **common, masks=Masks(layer), backend=backend.name)
    for step in range(3):
        give_gradient(layer, step)
        optimizer.step()
    return layer, optimizer


def assert_masked(layer: nn.Linear, optimizer: SparseOpt) -> None:
    buffer = optimizer.state[layer.weight].get("momentum_buffer")
    for tensor in (layer.weight,) if buffer is None else (layer.weight, buffer):
        assert not tensor[~layer.weight_mask].any()
        assert tensor[layer.weight_mask].any()


@torch.no_grad()
def _overwrite(layer: nn.Linear, optimizer: SparseOpt, how: str) -> None:
    weight, mask = layer.weight, layer.weight_mask
    other = masked_layer(seed=7)
    buffer = optimizer.state[weight]["momentum_buffer"]
    if how == "weights-init":
        nn.init.ones_(weight)
    elif how == "one-weight":
        at = (~mask).nonzero()[-1]
        weight[tuple(at)] = 1.0
    elif how == "weights-load_state_dict":
        layer.load_state_dict({"weight": torch.ones_like(weight), "weight_mask": mask.clone()})
    elif how == "weights-data-replaced":
        weight.data = torch.ones_like(weight)
    elif how == "buffer-in-place":
        buffer.fill_(1.0)
    elif how == "buffer-replaced":
        optimizer.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    elif how == "optimizer-load_state_dict":
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0]["momentum_buffer"].fill_(1.0)
        optimizer.load_state_dict(state)
    elif how == "mask-in-place":
        mask.copy_(other.weight_mask)
    elif how == "mask-one-bit":
        mask[tuple(mask.nonzero()[0])] = False
    elif how == "mask-logical":
        mask.logical_and_(other.weight_mask).logical_or_(random_mask((23, 517), 8, "sparse99"))
    elif how == "mask-through-a-view":
        mask.view(-1)[: 23 * 200].logical_not_()
    elif how == "mask-data-replaced":
        mask.data = other.weight_mask
    elif how == "mask-replaced":
        layer.weight_mask = other.weight_mask
    elif how == "mask-load_state_dict":
        layer.load_state_dict(other.state_dict())
    elif how == "mask-registered-anew":
        del layer.weight_mask
        layer.register_buffer("weight_mask", other.weight_mask)


@pytest.mark.parametrize(
    "how",
    [
        "weights-init",
        "one-weight",
        "weights-load_state_dict",
        "weights-data-replaced",
        "buffer-in-place",
        "buffer-replaced",
        "optimizer-load_state_dict",
        "mask-in-place",
        "mask-one-bit",
        "mask-logical",
        "mask-through-a-view",
        "mask-data-replaced",
        "mask-replaced",
        "mask-load_state_dict",
        "mask-registered-anew",
    ],
)
def test_next_step_zeroes_what_lies_outside_the_mask(backend: Backend, how: str) -> None:
    """Whatever was changed, by whatever means, and however much a backend skips otherwise; and the active
    weights go on from what is there, as those of an optimizer that was just made."""
    layer, optimizer = settled(backend)
    _overwrite(layer, optimizer, how)
    give_gradient(layer, 50)
    fresh_layer = copy.deepcopy(layer)
    fresh_layer.weight.grad = layer.weight.grad.clone()
    fresh = SparseOpt(
        fresh_layer.parameters(), lr=0.1, momentum=0.9, masks=Masks(fresh_layer), backend=backend.name
    )
    fresh.state[fresh_layer.weight]["momentum_buffer"] = optimizer.state[layer.weight][
        "momentum_buffer"
    ].clone()
    optimizer.step()
    fresh.step()
    assert_masked(layer, optimizer)
    assert same_bits(layer.weight, fresh_layer.weight)
    for step in range(3):
        give_gradient(layer, 60 + step)
        optimizer.step()
        assert_masked(layer, optimizer)


def test_a_plain_dict_of_masks_is_looked_at_each_step(backend: Backend) -> None:
    """Entries of the dict replaced, removed and added while training."""
    layers = [masked_layer(0), masked_layer(1)]
    a, b = (layer.weight for layer in layers)
    masks = {a: layers[0].weight_mask}
    optimizer = SparseOpt([a, b], lr=0.1, momentum=0.9, masks=masks, backend=backend.name)

    def step(seed: int) -> None:
        for layer in layers:
            give_gradient(layer, seed)
        optimizer.step()

    step(0)
    assert not a[~masks[a]].any()
    assert b.all()
    masks[a] = random_mask((23, 517), 5, "sparse99")
    step(1)
    assert not a[~masks[a]].any()
    masks[b] = random_mask((23, 517), 6)
    step(2)
    assert not b[~masks[b]].any()
    del masks[a]
    step(3)
    assert a.all()
    masks[a] = masks.pop(b)  # as many as before, of another parameter
    step(4)
    assert not a[~masks[a]].any()
    assert b.all()
    del masks[a]
    step(5)
    assert a.all()


def test_a_mask_shared_by_two_parameters(backend: Backend) -> None:
    layers = [masked_layer(0), masked_layer(1)]
    mask = layers[0].weight_mask
    masks = {layer.weight: mask for layer in layers}
    optimizer = SparseOpt(list(masks), lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
    for step in range(6):
        if step % 2:
            mask.copy_(random_mask((23, 517), step, "sparse99"))
        for layer in layers:
            give_gradient(layer, step)
        optimizer.step()
        for p in masks:
            assert not p[~mask].any()
            assert p[mask].all()


def test_mask_of_a_parameter_that_gets_its_gradient_later(backend: Backend) -> None:
    """What never had a gradient is left alone, as SGD would; its first step sees the mask of that step."""
    layers = [masked_layer(0), masked_layer(1)]
    masks = {layer.weight: layer.weight_mask for layer in layers}
    optimizer = SparseOpt(list(masks), lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
    for step in range(4):
        give_gradient(layers[0], step)
        if step % 2:
            layers[1].weight_mask.copy_(random_mask((23, 517), step, "sparse99"))
        optimizer.step()
        assert layers[1].weight.all()
    give_gradient(layers[1], 9)
    optimizer.step()
    assert_masked(layers[1], optimizer)


def test_masks_that_change_while_a_momentum_waits_without_gradient(backend: Backend) -> None:
    """Pruned and grown again between two gradients: the weight and its momentum start at 0."""
    layer, optimizer = settled(backend)
    former = layer.weight_mask.clone()
    layer.weight.grad = None
    layer.weight_mask[:12] = False
    optimizer.step()
    layer.weight_mask.copy_(former)
    optimizer.step()
    assert not layer.weight[:12].any()
    assert not optimizer.state[layer.weight]["momentum_buffer"][:12].any()
    assert layer.weight[12:].any()
    give_gradient(layer, 10)
    layer.weight.grad[:12] = 0.0
    optimizer.step()
    assert not layer.weight[:12].any()


def test_momentum_switched_off_and_on_again(backend: Backend) -> None:
    """The buffer waits, as with SGD; what masks have pruned meanwhile has no momentum when it is back."""
    layer, optimizer = settled(backend)
    group = optimizer.param_groups[0]
    waiting = optimizer.state[layer.weight]["momentum_buffer"].clone()
    group["momentum"] = 0.0
    give_gradient(layer, 10)
    optimizer.step()
    assert same_bits(optimizer.state[layer.weight]["momentum_buffer"], waiting)
    layer.weight_mask[:12] = False
    optimizer.step()
    assert not layer.weight[:12].any()
    group["momentum"] = 0.9
    optimizer.step()
    assert_masked(layer, optimizer)


def test_momentum_switched_on_mid_run_begins_with_a_first_step(backend: Backend) -> None:
    layer = masked_layer()
    optimizer = SparseOpt(layer.parameters(), lr=0.1, dampening=0.5, masks=Masks(layer), backend=backend.name)
    for step in range(3):
        give_gradient(layer, step)
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0].update(momentum=0.9, correction="none")
    optimizer.step()
    expected = torch.where(layer.weight_mask, layer.weight.grad, 0.0)  # dampening waits for the second step
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], expected)


def test_two_optimizers_take_turns_on_one_model(backend: Backend) -> None:
    """Each sees that the other has written, and neither leaves anything outside the mask."""
    layer = masked_layer()
    masks = Masks(layer)
    optimizers = [
        SparseOpt(layer.parameters(), lr=lr, momentum=0.9, masks=masks, backend=backend.name)
        for lr in (0.1, 0.01)
    ]
    for step in range(8):
        if step % 3 == 2:
            layer.weight_mask.copy_(random_mask((23, 517), step, "sparse99"))
        give_gradient(layer, step)
        optimizers[step % 2].step()
        assert_masked(layer, optimizers[step % 2])


# ---- autograd ---------------------------------------------------------------------------------------


def test_autograd_notices_the_update(backend: Backend) -> None:
    """A backward pass through a weight that a step has changed is an error, not a wrong gradient."""
    layer, optimizer = settled(backend)
    x = torch.randn(3, 517, requires_grad=True)
    loss = layer(x).sum()
    version = layer.weight._version
    optimizer.step()
    assert layer.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_in_inference_mode(backend: Backend) -> None:
    """A step there, the first one too, leaves parameters and buffers that steps elsewhere go on from."""
    results = []
    for inference in (False, True):
        layer = masked_layer()
        optimizer = SparseOpt(
            layer.parameters(), lr=0.1, momentum=0.9, masks=Masks(layer), backend=backend.name
        )
        for step in range(4):
            give_gradient(layer, step)
            with torch.inference_mode(inference and step != 2):
                optimizer.step()
        results.append((layer.weight, optimizer.state[layer.weight]["momentum_buffer"]))
    for a, b in zip(*results, strict=True):
        assert not b.is_inference()
        assert same_bits(a, b)


def test_only_updated_parameters_change_version(backend: Backend) -> None:
    a, b, c = (Parameter(torch.ones(3, 4)) for _ in range(3))
    a.grad, c.grad = torch.ones(3, 4), torch.ones(3, 4)
    optimizer = SparseOpt([a, b, c], lr=0.1, masks={c: random_mask((3, 4))}, backend=backend.name)
    versions = [p._version for p in (a, b, c)]
    optimizer.step()
    changed = [p._version > v for p, v in zip((a, b, c), versions, strict=True)]
    assert changed == [True, False, True]


def test_parameters_stay_leaves(backend: Backend) -> None:
    layer, optimizer = settled(backend)
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert layer.weight.grad_fn is None
    assert not optimizer.state[layer.weight]["momentum_buffer"].requires_grad


def test_frozen_parameter_with_a_gradient_is_updated_as_sgd_does(backend: Backend) -> None:
    p, q = (torch.ones(4) for _ in range(2))
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    SparseOpt([p], lr=0.5, backend=backend.name).step()
    torch.optim.SGD([q], lr=0.5).step()
    assert torch.equal(p, q)


def test_a_weight_shared_by_two_layers(backend: Backend) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    model[0].register_buffer("weight_mask", random_mask((6, 6)))
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert not model[1].weight[~model[0].weight_mask].any()


# ---- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_zero_grad_frees_the_gradients(backend: Backend, masked: bool) -> None:
    """Nothing that is kept from step to step holds a gradient."""
    p = Parameter(torch.ones(4, 9))
    masks = {p: random_mask((4, 9))} if masked else {}
    optimizer = optimizer_of(backend, [p], masks)
    for _ in range(3):
        p.grad = torch.ones(4, 9)
        grad = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert grad() is None


LARGE = (4, 1_000_000)  # 16 MB in float32


def large_optimizer(backend: Backend, pattern: str | None) -> tuple[Parameter, SparseOpt, dict]:
    parameter = Parameter(torch.ones(LARGE))
    parameter.grad = torch.ones(LARGE)
    masks = {} if pattern is None else {parameter: random_mask(LARGE, pattern=pattern)}
    rule = Hyper(lr=0.1, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
    optimizer = optimizer_of(backend, [parameter], masks, rule)
    optimizer.step()  # the first step makes the momentum buffer
    optimizer.step()
    return parameter, optimizer, masks


each_pattern = pytest.mark.parametrize("pattern", [None, "half", "sparse99"], ids=str)


@each_pattern
def test_no_temporary_as_large_as_a_parameter(backend: Backend, pattern: str | None) -> None:
    """What PyTorch allocates during a step of the native backend, and during one after a mask changed."""
    if backend.name == "reference" or backend.is_slow:
        pytest.skip("the reference is written to be read, and makes temporaries; so does an interpreter")
    parameter, optimizer, masks = large_optimizer(backend, pattern)
    for mask in (None, *masks.values()):
        if mask is not None:
            mask[0, :1000] = False
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        allocated = [event.self_cpu_memory_usage for event in profile.events()]
        assert sum(size for size in allocated if size > 0) < parameter.nbytes / 2


@each_pattern
def test_peak_memory_of_a_step(backend: Backend, pattern: str | None) -> None:
    """As the operating system sees it, so that C++ is counted too."""
    if backend.name == "reference" or backend.is_slow:
        pytest.skip("the reference is written to be read, and makes temporaries; so does an interpreter")
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("peak memory can be reset on Linux only")
    parameter, optimizer, masks = large_optimizer(backend, pattern)

    def kilobytes(what: str) -> int:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(what))
        return int(line.split()[1])

    for mask in (None, *masks.values()):
        if mask is not None:
            mask[0, :1000] = False
        gc.collect()
        try:
            reset.write_text("5")
        except OSError as error:
            pytest.skip(f"peak memory cannot be reset here: {error}")
        before = kilobytes("VmRSS")
        optimizer.step()
        assert (kilobytes("VmHWM") - before) * 1024 < parameter.nbytes / 2
