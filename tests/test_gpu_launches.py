"""What a step of the GPU backends costs the host: launches, copies to the device, and no wait for it.

No GPU is needed: the kernels are replaced by stubs, or by the CUDA sources compiled for the CPU, and every
operation of PyTorch itself is seen. What a GPU would wait for is an operation that reads a tensor's value.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from backends import emulate
from resnet50 import resnet50_shapes
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from sparseopt_kernels import kernels
from sparseopt_kernels.kernels import device, triton, triton_plan
from sparseopt_kernels.kernels.contract import Inputs, Tensors
from sparseopt_kernels.optimizer import SparseOpt

Launches = list[dict[str, Any]]


# What torch.optim.Optimizer does around every step, for the profiler; and views, which do nothing.
OF_PYTORCH = ("_record_function_enter_new", "_record_function_exit", "detach", "view", "alias")


# Those that wait for the device, of the kind that shows here: among CPU tensors, a copy to the host does not.
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "index")


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch; those that read a value to go on are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        if name not in OF_PYTORCH:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The Triton backend on CPU tensors, whose kernels only note that they were launched."""
    pytest.importorskip("triton")
    from sparseopt_kernels.kernels import triton_step

    noted: Launches = []

    def stub(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                assert grid[0] > 0
                return lambda *args, **kwargs: noted.append({"kernel": name, "grid": grid, **kwargs})

        return Kernel()

    for name in ("masked_step", "dense_step", "masked_squares", "dense_squares"):
        monkeypatch.setattr(triton_step, name, stub(name))
    monkeypatch.setattr(triton.TRITON, "unavailable", lambda device: None)
    return noted


def parameters_and_masks(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[list[Parameter], dict[Parameter, Tensor]]:
    """Weights with a mask, all others without, all with a gradient."""
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return parameters, {p: torch.ones(p.shape, dtype=torch.bool) for p in parameters if p.ndim > 1}


class TestTriton:
    def test_a_resnet50_is_four_launches(self, launches: Launches) -> None:
        *convolutions, classifier = resnet50_shapes().values()
        shapes = [shape for weight in convolutions for shape in (weight, weight[:1], weight[:1])]
        shapes += [classifier, classifier[:1]]
        assert len(shapes) == 161
        parameters, masks = parameters_and_masks(shapes)
        assert sum(p.numel() for p in parameters) == 25_557_032
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
        for _ in range(3):
            launches.clear()
            optimizer.step()
            assert len(launches) == 4
            assert {launch["kernel"] for launch in launches} == {"masked_step", "dense_step"}

    def test_groups_share_launches(self, launches: Launches) -> None:
        """Up to eight: their rules are arguments of the kernel."""
        parameters, masks = parameters_and_masks([(4, 1024)] * 9)
        for count, expected in ((1, 1), (2, 1), (8, 1), (9, 2)):
            groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(parameters[:count])]
            some = {p: masks[p] for p in parameters[:count]}
            optimizer = SparseOpt(groups, masks=some, backend="triton")
            launches.clear()
            optimizer.step()
            assert len(launches) == expected

    def test_classes_of_rows(self, launches: Launches) -> None:
        """Short and long rows, aligned or not, with and without momentum buffer: a launch for each."""
        shapes = [(3, 512), (3, 513), (3, 520), (3, 27), (7,), (9,)]
        parameters, masks = parameters_and_masks(shapes)
        SparseOpt(parameters, masks=masks, backend="triton").step()
        classes = {(k["kernel"], k["ALIGNED"], k.get("BYTES")) for k in launches}
        assert classes == {
            ("masked_step", True, 64),
            ("masked_step", True, 128),
            ("masked_step", False, 64),
            ("masked_step", False, 128),
            ("dense_step", False, None),
        }
        assert len(launches) == len(classes)

    def test_a_gradient_that_is_not_aligned_moves_its_tensor_to_another_launch(
        self, launches: Launches
    ) -> None:
        parameters, masks = parameters_and_masks([(3, 512)])
        optimizer = SparseOpt(parameters, masks=masks, backend="triton")
        seen = []
        for offset in (0, 1, 4):
            parameters[0].grad = torch.zeros(3 * 512 + 4)[offset:][: 3 * 512].view(3, 512)
            launches.clear()
            optimizer.step()
            seen += [launch["ALIGNED"] for launch in launches]
        assert seen == [True, False, True]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_nothing_is_copied_while_gradients_stay(self, launches: Launches, dtype: torch.dtype) -> None:
        """No operation of PyTorch in a steady state; one copy, of eight bytes per tensor, when they move."""
        parameters, masks = parameters_and_masks([(8, 64), (5, 27), (9,)], dtype)
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
        for _ in range(2):
            optimizer.step()
        with Operations() as operations:
            for _ in range(3):
                optimizer.step()
        assert not operations.counts
        kept = [p.grad for p in parameters]  # so that the new ones are elsewhere
        for p in parameters:
            p.grad = torch.zeros_like(p)
        with Operations() as operations:
            optimizer.step()
        assert operations.counts["copy_"] == 1
        assert set(operations.counts) <= {"copy_", "empty_like", "lift_fresh", "_pin_memory"}
        assert len(kept) == 3

    def test_hyperparameters_are_no_copies(self, launches: Launches) -> None:
        parameters, masks = parameters_and_masks([(8, 64), (9,)])
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
        for _ in range(2):
            optimizer.step()
        with Operations() as operations:
            for lr in (0.3, 0.2):
                optimizer.param_groups[0].update(lr=lr, weight_decay=lr, nesterov=lr > 0.2, dampening=0.0)
                optimizer.step()
        assert not operations.counts


def scaled(optimizer: SparseOpt) -> None:
    vars(optimizer).update(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))


def limited(optimizer: SparseOpt) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = 1.0


def tensor_lr(optimizer: SparseOpt) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


def new_mask(optimizer: SparseOpt) -> None:
    for mask in optimizer._masks.values():
        mask.logical_not_()


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.compiled)])
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    request.getfixturevalue("launches")
    if request.param == "cuda":
        emulate(request.getfixturevalue("cuda"), monkeypatch)
    return request.param


@pytest.mark.parametrize("event", [scaled, limited, tensor_lr, new_mask])
def test_nothing_waits_for_the_device(
    backend_name: str, event: Callable[[SparseOpt], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not AMP, not the gradient norm, not a tensor learning rate, not a mask that changed, not the first
    step. (test_gpu.py asks PyTorch itself, which sees more, on a GPU.)"""
    # It looks at masks on the CPU, where all of them are here.
    monkeypatch.setattr("sparseopt_kernels.preparation._warn_of_concentration", lambda *_: None)
    parameters, masks = parameters_and_masks([(8, 64), (5, 27), (9,)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, dampening=0.1, masks=masks, backend=backend_name)
    with Operations():
        optimizer.step()
        for _ in range(2):
            event(optimizer)
            optimizer.step()


def test_amp_adds_no_operation(backend_name: str) -> None:
    parameters, masks = parameters_and_masks([(8, 64), (9,)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
    scaled(optimizer)
    for _ in range(2):
        optimizer.step()
    with Operations() as operations:
        optimizer.step()
    assert not operations.counts


def test_a_step_of_cuda_is_one_launch_for_each_table(
    cuda: ModuleType, cuda_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tested at one tensor, at the most that a launch can carry, and at one more, also of parameter groups;
    no copies at all."""
    emulate(cuda, monkeypatch)
    count = ctypes.CDLL(str(cuda_library)).cuda_on_cpu_launches
    count.restype = ctypes.c_int64
    limit = cuda.LAUNCH_CAPACITY
    for tensors, groups, expected in ((1, 1, 1), (limit, 1, 1), (limit + 1, 1, 2), (9, 4, 1), (9, 5, 2)):
        parameters, masks = parameters_and_masks([(2, 16)] * tensors)
        split = [{"params": parameters[i::groups]} for i in range(groups)]
        optimizer = SparseOpt(split, lr=0.5, momentum=0.9, masks=masks, backend="cuda")
        for _ in range(2):
            optimizer.step()
        for p in parameters:
            p.grad = torch.ones_like(p)
        before = count()
        with Operations() as operations:
            optimizer.step()
        assert count() - before == expected
        assert not operations.counts
        assert all((p == -0.5).all() for p in parameters)


# ---- CUDA graphs, as far as the host is concerned ---------------------------------------------------


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What it holds is whether a graph is being captured, as far as this package can tell."""
    state = [False]
    for module in (device, triton):
        monkeypatch.setattr(module, "capturing", lambda: state[0])
    kept = list(device._read_by_graphs)
    yield state
    device._read_by_graphs[:] = kept


def test_a_first_step_in_a_graph_is_refused(backend_name: str, capture: list[bool]) -> None:
    """And the step that the message asks for is a first step like any other."""
    for refused in (False, True):
        parameters, masks = parameters_and_masks([(8, 64), (9,)])
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
        if refused:
            capture[0] = True
            with pytest.raises(RuntimeError, match="make one step outside the graph first"):
                optimizer.step()
            capture[0] = False
            assert not optimizer.state
        for p in parameters:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
        momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
        if backend_name == "cuda":  # the kernels of the other are stubs
            assert all((b == 1.9).all() for b in momenta)
        assert len(momenta) == 2


def test_a_mask_that_changed_is_refused_in_a_graph(backend_name: str, capture: list[bool]) -> None:
    parameters, masks = parameters_and_masks([(8, 64)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
    for _ in range(2):
        optimizer.step()
    new_mask(optimizer)
    capture[0] = True
    with pytest.raises(RuntimeError, match="make one step outside the graph first"):
        optimizer.step()
    capture[0] = False
    optimizer.step()
    capture[0] = True
    optimizer.step()


def test_each_graph_has_tables_of_its_own(
    launches: Launches, capture: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied while a graph is captured is there when that graph has run, and not before. Here the
    gradients move after the step before the graphs: other launches are needed."""
    parameters, masks = parameters_and_masks([(8, 64), (12,)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
    optimizer.step()
    for p in parameters:
        p.grad = torch.zeros(p.numel() + 1)[1:].view_as(p)
    copied: list[Tensor] = []
    copies = []
    upload = device.upload

    def counted(values: Tensor, to: torch.device) -> Tensor:
        copied.append(upload(values, to))
        return copied[-1]

    for module in (triton, triton_plan):
        monkeypatch.setattr(module, "upload", counted)
    for capturing in (True, True, False, True, True):
        copied.clear()
        capture[0] = capturing
        optimizer.step()
        copies.append(len(copied))
    # Two tables of owners, that of the tensors, that of the gradients; once they are made outside, they stay.
    assert copies == [4, 4, 4, 0, 0]


class Pinning(TorchDispatchMode):
    """Copies within a capture are refused, as PyTorch refuses them, unless from pinned memory or to it."""

    def __init__(self, capture: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.capture, self.pinned, self.sources = capture, list[Tensor](), list[Tensor]()
        monkeypatch.setattr(device, "_staging", {})
        monkeypatch.setattr(device, "_needs_pinning", lambda device: True)
        monkeypatch.setattr(device, "_pinned", self.pin)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self.pinned_copy(tensor))

    def pin(self, nbytes: int) -> Tensor:
        assert not self.capture[0], "memory is pinned within a capture"
        self.pinned.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.pinned[-1]

    def pinned_copy(self, tensor: Tensor) -> Tensor:
        return self.pin(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(storage == own.untyped_storage().data_ptr() for own in self.pinned)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ == "copy_" and self.capture[0] and not self.is_pinned(args[0]):
            assert self.is_pinned(args[1]), "a graph would copy from memory that is not pinned"
            self.sources.append(args[1])
        return function(*args, **(kwargs or {}))


def test_a_graph_copies_from_pinned_memory_of_its_own(
    launches: Launches, capture: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, masks = parameters_and_masks([(8, 64), (12,), (5, 33)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
    with Pinning(capture, monkeypatch) as pinning:
        optimizer.step()
        for _ in range(3):  # graphs, one after the other, with gradients of their own
            for p in parameters:
                p.grad = torch.zeros(p.numel() + 1)[1:].view_as(p)
            capture[0] = True
            optimizer.step()
            capture[0] = False
        # Of each: two tables of owners, that of the tensors, that of the gradients' addresses.
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in pinning.sources)
        assert len(places) >= 3 * 4
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
        addresses = [p.grad.data_ptr() for p in parameters if p.grad is not None]
        assert pinning.sources[-1].tolist() == addresses


def test_a_graph_too_many_is_refused(
    launches: Launches, capture: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, masks = parameters_and_masks([(8, 64)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
    monkeypatch.setattr(device, "_LEAST_STAGING", 0)
    with Pinning(capture, monkeypatch):
        optimizer.step()
        capture[0] = True

        def capture_many() -> None:
            for _ in range(100):
                for p in parameters:
                    p.grad = torch.zeros(p.numel() + 1)[1:].view_as(p)
                optimizer.step()

        with pytest.raises(RuntimeError, match="make one step outside of a graph between them"):
            capture_many()
        capture[0] = False
        optimizer.step()
        capture[0] = True
        optimizer.step()


# ---- devices ----------------------------------------------------------------------------------------


def test_tensors_on_two_devices_are_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own tensors, and AMP's scalars where they are."""
    calls: list[tuple[Sequence[Tensors], Inputs]] = []

    class Plan:
        def __init__(self, tensors: Sequence[Tensors]) -> None:
            self.tensors = tensors

        def step(self, inputs: Inputs) -> None:
            calls.append((self.tensors, inputs))

    class Backend:
        unavailable = staticmethod(lambda device: None)
        host_scalars = staticmethod(lambda device: False)
        supports = staticmethod(lambda tensors: True)
        plan = Plan

    monkeypatch.setattr(kernels, "backend_for", lambda name, device: Backend)
    parameters = [Parameter(torch.zeros(3, device=place)) for place in ("cpu", "meta", "cpu")]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9)
    scaled(optimizer)
    optimizer.step()
    first, second, third = parameters
    assert [[t.parameter for t in tensors] for tensors, _ in calls] == [[first, third], [second]]
    assert [inputs.gradients for _, inputs in calls] == [[first.grad, third.grad], [second.grad]]
    for tensors, inputs in calls:
        assert inputs.found_inf is not None
        assert inputs.grad_scale is not None
        assert inputs.found_inf.device == inputs.grad_scale.device == tensors[0].parameter.device
