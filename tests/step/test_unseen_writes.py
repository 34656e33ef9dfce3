"""Writes that PyTorch's versions do not count: noticed in a step, told by a call, found by a check."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import same_bits
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter
from torch.utils.dlpack import from_dlpack, to_dlpack

from sparseopt_kernels import native_library
from sparseopt_kernels import optimizer as optimizer_module
from sparseopt_kernels.optimizer import SparseOpt

MASK_TURNS, WEIGHT_TURNS = 256, 2048  # as the documentation says
NOTICED = r"without PyTorch counting it: by a collective"
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": lambda t: torch.from_numpy(t.detach().numpy()),
    "dlpack": lambda t: from_dlpack(to_dlpack(t.detach())),
    "storage": lambda t: t.new_empty(0).set_(t.untyped_storage(), 0, t.shape, t.stride()),
    "data": lambda t: t.data,
}
"""Tensors of the same memory, with a version of their own."""
each_write = pytest.mark.parametrize("how", WRITES)


@pytest.fixture
def noticing(backend: Backend) -> Backend:
    """A backend that notices: "cpu" compares, "reference" reads masks themselves and writes everything."""
    if backend.name not in ("cpu", "reference") or backend.isa == "device":
        pytest.skip("on a GPU nothing is compared")
    return backend


def make(
    shape: tuple[int, ...],
    backend: str,
    dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.bool,
    **options: Any,
) -> Any:
    """An optimizer of a parameter with a mask, four steps old, and both of these."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(torch.randn(shape, generator=generator).to(dtype))
    mask = (torch.rand(shape, generator=generator) < 0.2).to(mask_dtype)
    optimizer = SparseOpt([p], lr=0.1, momentum=0.9, masks={p: mask}, backend=backend, **options)
    p.grad = torch.randn(shape, generator=generator).to(dtype)
    for _ in range(4):
        optimizer.step()
    return p, mask, optimizer


def outside(p: Parameter, mask: Tensor, optimizer: SparseOpt) -> int:
    tensors = (p, optimizer.state[p]["momentum_buffer"])
    return sum(int((t[mask == 0] != 0).sum()) for t in tensors)


def active_near(mask: Tensor, near: int) -> int:
    """The active element that is nearest to this place, both counted in memory."""
    active = mask.flatten().nonzero()
    return int(active[(active - near).abs().argmin()])


def steps_until_masked(p: Parameter, mask: Tensor, optimizer: SparseOpt) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOTICED)
        masked = (mask == 0).to(p.dtype)
        for count in range(1, WEIGHT_TURNS + 1):
            optimizer.step()
            if not (p * masked).any() and not outside(p, mask, optimizer):  # the first is quick to tell
                return count
    raise AssertionError("never")


@each_write
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": torch.tensor(1e6)}], ids=["ready", "long-way"])
@pytest.mark.parametrize("shape", [(7,), (9, 4), (64, 64), (300, 300)], ids=str)
def test_a_mask_that_changes_everywhere_is_noticed_by_the_next_step(
    noticing: Backend, how: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    p, mask, optimizer = make(shape, noticing.name, **options)
    version = mask._version
    WRITES[how](mask).logical_not_()
    assert mask._version == version
    assert steps_until_masked(p, mask, optimizer) == 1
    assert p[mask].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("at", [0, 63, 64, 5_000, 89_999])
def test_one_element_of_a_mask_is_noticed_within_the_stated_number_of_steps(
    noticing: Backend, at: int, dtype: torch.dtype
) -> None:
    p, mask, optimizer = make((300, 300), noticing.name, dtype)
    place = active_near(mask, at)
    assert p.view(-1)[place] != 0
    WRITES["data"](mask).view(-1)[place] = False
    assert steps_until_masked(p, mask, optimizer) <= MASK_TURNS
    assert not p.view(-1)[place]


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("at", [0, 63, 64, 5_000, 89_999, None], ids=str)
def test_masks_of_floating_point_numbers(noticing: Backend, mask_dtype: torch.dtype, at: int | None) -> None:
    """Those of ``torch.nn.utils.prune``: a write to all of one by the next step, to an element as stated."""
    p, mask, optimizer = make((300, 300), noticing.name, mask_dtype=mask_dtype)
    if at is None:
        WRITES["data"](mask).copy_(1 - mask)
        assert steps_until_masked(p, mask, optimizer) == 1
        assert p[mask != 0].all()
    else:
        WRITES["data"](mask).view(-1)[active_near(mask, at)] = 0
        assert outside(p, mask, optimizer)
        assert steps_until_masked(p, mask, optimizer) <= MASK_TURNS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, None], ids=["one-weight", "all-weights"])
def test_weights_outside_a_mask_are_noticed(
    noticing: Backend, dtype: torch.dtype, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broadcast of a dense weight by the next step, one weight later."""
    monkeypatch.setenv("SPARSEOPT_CPU_STRATEGY", "list")  # the other way, a step writes zeros there
    p, mask, optimizer = make((512, 300), noticing.name, dtype)
    mask[:, :32] = False
    optimizer.step()
    if count is None:
        WRITES["data"](p).fill_(1.0)
    else:
        WRITES["data"](p)[70, 8] = 1.0
    assert steps_until_masked(p, mask, optimizer) <= (1 if count is None else WEIGHT_TURNS)


@pytest.mark.skipif(native_library.MISSING is not None, reason="there is no native library")
@pytest.mark.parametrize("scenario", ["mask", "weights"])
def test_it_is_said_once_and_from_then_on_the_step_is_right(scenario: str) -> None:
    """To the last bit that of an optimizer whose user told."""
    p, mask, optimizer = make((64, 64), "cpu")
    q, other, told = make((64, 64), "cpu")
    for own, each in ((mask, optimizer), (other, told)):
        own[:, 16:] = False
        each.step()
    for parameter, own in ((p, mask), (q, other)):
        WRITES["data"](own if scenario == "mask" else parameter)[:, ::2] = True
    increment_version([other, q])
    told.step()
    with pytest.warns(UserWarning, match=NOTICED) as caught:
        optimizer.step()
    (record,) = caught
    assert record.filename == __file__
    assert "param_groups[0]['params'][0]" in str(record.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert same_bits(p, q)
            optimizer.step()
            told.step()
        WRITES["data"](mask)[:, ::4] = False
        optimizer.step()
    assert not outside(p, mask, optimizer)


@pytest.mark.skipif(native_library.MISSING is not None, reason="there is no native library")
@pytest.mark.parametrize("scenario", ["mask", "weights"])
def test_after_a_finding_the_step_is_short_again(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEOPT_CPU_STRATEGY", "list")
    p, mask, optimizer = make((64, 64), "cpu")
    mask[:, 16:] = False
    optimizer.step()
    WRITES["data"](mask if scenario == "mask" else p)[:, ::2] = True
    with pytest.warns(UserWarning, match=NOTICED):
        optimizer.step()
    optimizer.step()
    monkeypatch.setattr(optimizer_module, "make_step", lambda *_: pytest.fail("the long way again"))
    before = p.detach().clone()
    for _ in range(3):
        optimizer.step()
    assert not same_bits(p, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_negative_zero_outside_a_mask_is_not_reported(
    noticing: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the weights nor in a mask of floating-point numbers."""
    monkeypatch.setenv("SPARSEOPT_CPU_STRATEGY", "list")
    p, mask, optimizer = make((64, 64), noticing.name, dtype, mask_dtype=dtype)
    mask[:, :32] = 0
    optimizer.step()
    WRITES["data"](p)[:, :32] = -0.0
    WRITES["data"](mask)[mask == 0] = -0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(WEIGHT_TURNS):
            optimizer.step()
    assert not outside(p, mask, optimizer)


@each_write
def test_a_call_tells_of_a_write_at_once(backend: Backend, how: str) -> None:
    p, mask, optimizer = make((40, 300), backend.name)
    at = tuple(mask.nonzero()[-1])
    WRITES[how](mask)[at] = False
    increment_version(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not p[at]
    WRITES[how](p)[at] = 1.0
    increment_version(p)
    optimizer.step()
    assert not p[at]
    assert not outside(p, mask, optimizer)


def test_a_mask_in_another_order_than_its_parameter(noticing: Backend) -> None:
    layer: Any = nn.Conv2d(16, 32, 3)
    layer.to(memory_format=torch.channels_last)
    mask = torch.rand(32, 16, 3, 3) < 0.3
    optimizer = SparseOpt(
        [layer.weight], lr=0.1, momentum=0.9, masks={layer.weight: mask}, backend=noticing.name
    )
    layer.weight.grad = torch.ones_like(layer.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3 + MASK_TURNS):  # nothing is noticed where nothing was written
            optimizer.step()
    WRITES["data"](mask)[:] = torch.rand(32, 16, 3, 3) < 0.3
    assert steps_until_masked(layer.weight, mask, optimizer) == 1


@pytest.mark.skipif(native_library.MISSING is not None, reason="there is no native library")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": torch.tensor(1e6)}], ids=["ready", "long-way"])
def test_many_tensors_take_turns(options: dict[str, Any]) -> None:
    """Of 400, each step looks at 133 or 134: all of them have had their turn after three."""
    generator = torch.Generator().manual_seed(0)
    parameters = [Parameter(torch.randn(8, 40, generator=generator)) for _ in range(400)]
    masks = {p: torch.rand(8, 40, generator=generator) < 0.2 for p in parameters}
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="cpu", **options)
    for p in parameters:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    for at in (0, 1, 2, 399):
        WRITES["data"](masks[parameters[at]]).logical_not_()
        assert steps_until_masked(parameters[at], masks[parameters[at]], optimizer) <= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            optimizer.step()


def test_nothing_is_noticed_where_nothing_was_written(noticing: Backend) -> None:
    """Whatever the ends of tensors, through more turns than there are."""
    optimizers = [make(shape, noticing.name)[2] for shape in [(1,), (15,), (16,), (17,), (65,), (129, 129)]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers:
            for _ in range(2 * WEIGHT_TURNS // 8):
                optimizer.step()


class TestFullCheck:
    @pytest.fixture(autouse=True)
    def _check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SPARSEOPT_CHECK", "1")

    @pytest.mark.parametrize("what", ["mask", "weight", "momentum"])
    def test_it_finds_one_number(self, backend: Backend, what: str) -> None:
        p, mask, optimizer = make((40, 300), backend.name)
        tensor = {"mask": mask, "weight": p, "momentum": optimizer.state[p]["momentum_buffer"]}[what]
        at = tuple((~mask).nonzero()[-1])
        WRITES["data"](tensor)[at] = True
        before = p.detach().clone()
        message = r"SPARSEOPT_CHECK=1: .param_groups.* fails the check before a step: .*increment_version"
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert same_bits(p, before)

    def test_what_is_counted_passes(self, backend: Backend) -> None:
        p, mask, optimizer = make((40, 300), backend.name)
        with torch.no_grad():
            mask[:20] = False
            p.fill_(1.0)
        optimizer.step()
        assert not outside(p, mask, optimizer)
        optimizer.step()

    def test_after_an_error_all_parameters_are_trained(self, backend: Backend) -> None:
        """The step that raised was prepared for one parameter alone."""
        p, q = Parameter(torch.ones(40, 300)), Parameter(torch.ones(7))
        masks = {p: torch.rand(40, 300) < 0.2}
        optimizer = SparseOpt([p, q], lr=0.1, masks=masks, backend=backend.name)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        for _ in range(3):
            optimizer.step()
        q.grad = None
        WRITES["data"](masks[p]).logical_not_()
        with pytest.raises(RuntimeError, match="fails the check"):
            optimizer.step()
        increment_version(masks[p])
        q.grad = torch.ones_like(q)
        before = q.detach().clone()
        optimizer.step()
        assert (q < before).all()

    def test_steps_are_the_same(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        p, _, optimizer = make((40, 300), backend.name)
        monkeypatch.setenv("SPARSEOPT_CHECK", "0")
        q, _, unchecked = make((40, 300), backend.name)
        for each in (optimizer, unchecked):
            each.step()
        assert same_bits(p, q)

    def test_another_value_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SPARSEOPT_CHECK", "yes")
        with pytest.raises(ValueError, match="SPARSEOPT_CHECK is 'yes', it must be 1 or 0"):
            SparseOpt([Parameter(torch.ones(3))])


class Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.skipif(native_library.MISSING is not None, reason="there is no native library")
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": torch.tensor(1e6)}], ids=["ready", "long-way"])
def test_versions_are_raised_before_weights_are_written(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Ctrl-C can come anywhere between the two."""
    p, _, optimizer = make((64, 64), "cpu", **options)
    before, version = p.detach().clone(), p._version
    seen = []

    def counting(tensors: Any) -> None:
        seen.append(same_bits(p, before))
        increment_version(tensors)

    for module in ("make_step", "last_step"):
        monkeypatch.setattr(f"sparseopt_kernels.step.{module}.increment_version", counting)
    optimizer.step()
    assert seen == [True]
    assert p._version > version
    assert not same_bits(p, before)
