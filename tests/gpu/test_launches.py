"""What a step of the GPU backends costs the host: launches, copies to the device, and no wait for it.

No GPU is needed: the kernels are replaced by stubs, or by the CUDA sources compiled for the CPU, and every
operation of PyTorch itself is seen. What a GPU would wait for is an operation that reads a tensor's value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import emulate
from networks import RESNET20, RESNET50
from operations import Operations
from parameters import move_gradients, parameters_and_masks
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from sparseopt_kernels import kernels
from sparseopt_kernels.kernels.contract import Inputs, ParamFactors, ParamState, UnseenWrite
from sparseopt_kernels.kernels.gpu import device, triton
from sparseopt_kernels.kernels.gpu import plan as gpu_plan
from sparseopt_kernels.kernels.gpu import tables as gpu_tables
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.skipped_steps import SkippedStep

Launches = list[dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The Triton backend on CPU tensors, whose kernels only note that they were launched."""
    pytest.importorskip("triton")
    noted: Launches = []

    class Loaded:
        def __init__(self, name: str, constants: dict[str, Any]) -> None:
            self.name, self.constants = name, constants

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert grid[0] > 0
            return lambda *_: noted.append({"kernel": self.name, "grid": grid, **self.constants})

    def load(kernel: Any, device: torch.device, arguments: list[Any], constants: dict[str, Any]) -> Any:
        return triton.Loaded(Loaded(kernel.__name__, constants), 1 << 30)

    monkeypatch.setattr(triton, "_load", load)
    monkeypatch.setattr(triton, "LOADED", {})
    monkeypatch.setattr(triton.TRITON, "unavailable", lambda device: None)
    return noted


class TestTriton:
    @pytest.mark.parametrize("network", ["ResNet-20", "ResNet-50"])
    def test_a_network_is_one_launch(self, launches: Launches, network: str) -> None:
        """Rows of 27 and 147 weights and a bias of 10 included; two more where masks are new, by whether rows
        are whole vectors, and those that make lists."""
        parameters, masks = parameters_and_masks({"ResNet-20": RESNET20, "ResNet-50": RESNET50}[network])
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="triton")
        optimizer.step()
        kernels = Counter(launch["kernel"] for launch in launches)
        # Of dense tensors, and, for nothing, of what the next step launches.
        assert kernels == {"count_rows": 1, "list_sectors": 1, "masked_step": 2, "sector_step": 2}
        for _ in range(3):
            launches.clear()
            optimizer.step()
            assert [launch["kernel"] for launch in launches] == ["sector_step"]

    def test_groups_share_launches(self, launches: Launches) -> None:
        """Up to eight: their rules are arguments of the kernel."""
        parameters, masks = parameters_and_masks([(4, 1024)] * 9)
        for count, expected in ((1, 1), (2, 1), (8, 1), (9, 2)):
            groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(parameters[:count])]
            some = {p: masks[p] for p in parameters[:count]}
            optimizer = SparseOpt(groups, masks=some, backend="triton")
            optimizer.step()
            launches.clear()
            optimizer.step()
            assert len(launches) == expected

    def test_tensors_with_and_without_momentum_share_a_launch(self, launches: Launches) -> None:
        parameters, masks = parameters_and_masks([(4, 64), (4, 64), (9,)])
        groups = [{"params": parameters[:1], "momentum": 0.9}, {"params": parameters[1:], "momentum": 0.0}]
        optimizer = SparseOpt(groups, masks=masks, backend="triton")
        optimizer.step()
        launches.clear()
        optimizer.step()
        assert [launch["MOMENTUM"] for launch in launches] == [True]

    def test_what_has_a_launch_of_its_own(self, launches: Launches) -> None:
        """Memory that is not aligned, and rows of less than a sector."""
        parameters, masks = parameters_and_masks([(3, 512), (3, 513), (3, 27), (3, 8), (7,), (9,)])
        for aligned, columns in ((True, 8), (False, 7)):
            more, their_masks = parameters_and_masks([(3, columns)])
            optimizer = SparseOpt(parameters + more, masks={**masks, **their_masks}, backend="triton")
            optimizer.step()
            launches.clear()
            optimizer.step()
            assert {launch["ALIGNED"] for launch in launches} == {True, aligned}

    def test_a_gradient_that_is_not_aligned_moves_its_tensor_to_another_launch(
        self, launches: Launches
    ) -> None:
        """As those of DistributedDataParallel may be. The rest is accessed by vectors still."""
        parameters, masks = parameters_and_masks([(3, 512)])
        optimizer = SparseOpt(parameters, masks=masks, backend="triton")
        optimizer.step()
        seen = []
        for offset in (0, 1, 4):
            parameters[0].grad = torch.zeros(3 * 512 + 4)[offset:][: 3 * 512].view(3, 512)
            launches.clear()
            optimizer.step()
            seen += [(launch["ALIGNED"], launch["GRADS_ALIGNED"]) for launch in launches]
        assert seen == [(True, True), (True, False), (True, True)]

    def test_one_pass_has_no_kernel_for_gradients_that_alone_are_not_aligned(
        self, launches: Launches
    ) -> None:
        parameters, masks = parameters_and_masks([(3, 512)])
        parameters[0].grad = torch.zeros(3 * 512 + 1)[1:].view(3, 512)
        SparseOpt(parameters, masks=masks, backend="triton").step()
        aligned = {launch["kernel"]: launch.get("ALIGNED") for launch in launches}
        assert (aligned["masked_step"], aligned["sector_step"]) == (False, True)

    def test_where_all_goes_weight_by_weight_gradients_need_no_launch_of_their_own(
        self, launches: Launches
    ) -> None:
        parameters, masks = parameters_and_masks([(3, 7), (5, 6)])
        optimizer = SparseOpt(parameters, masks=masks, backend="triton")
        optimizer.step()
        parameters[0].grad = torch.zeros(3 * 7 + 1)[1:].view(3, 7)
        launches.clear()
        optimizer.step()
        assert [launch["kernel"] for launch in launches] == ["sector_step"]

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
        kept = move_gradients(parameters)
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
    step. (test_on_device.py asks PyTorch itself, which sees more, on a GPU.)"""
    # It looks at masks on the CPU, where all of them are here.
    monkeypatch.setattr("sparseopt_kernels.step.preparation.warn_of_concentration", lambda *_: None)
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


# ---- CUDA graphs, as far as the host is concerned ---------------------------------------------------


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What it holds is whether a graph is being captured, as far as this package can tell."""
    state = [False]
    for module in (device, gpu_plan):
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


def assert_refused_until_a_step_outside(optimizer: SparseOpt, capture: list[bool]) -> None:
    capture[0] = True
    with pytest.raises(RuntimeError, match="make one step outside the graph first"):
        optimizer.step()
    capture[0] = False
    optimizer.step()
    capture[0] = True
    optimizer.step()


def test_a_mask_that_changed_is_refused_in_a_graph(backend_name: str, capture: list[bool]) -> None:
    parameters, masks = parameters_and_masks([(8, 64)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
    for _ in range(2):
        optimizer.step()
    new_mask(optimizer)
    assert_refused_until_a_step_outside(optimizer, capture)


def test_the_step_after_one_that_was_left_out_is_refused_in_a_graph(
    backend_name: str, capture: list[bool]
) -> None:
    """The masks are known by then, but no step was made with them."""
    parameters, masks = parameters_and_masks([(8, 64)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
    for _ in range(2):
        optimizer.step()
    new_mask(optimizer)
    left_out = SkippedStep(masks)
    optimizer.step()
    assert_refused_until_a_step_outside(optimizer, capture)
    del left_out


def test_a_kernel_that_is_not_loaded_is_refused_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA loads none then."""
    pytest.importorskip("triton")
    monkeypatch.setattr(triton, "capturing", lambda: True)
    kernel = SimpleNamespace(warmup=lambda *_, **__: pytest.fail("it is compiled"))
    with pytest.raises(RuntimeError, match="make one step like it outside the graph"):
        triton._load(kernel, torch.device("cpu"), [], {})


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

    for module in (triton, gpu_tables):
        monkeypatch.setattr(module, "upload", counted)
    for capturing in (True, True, False, True, True):
        copied.clear()
        capture[0] = capturing
        optimizer.step()
        copies.append(len(copied))
    # The table of the tensors, that of the gradients; once they are made outside, they stay.
    assert copies == [2, 2, 2, 0, 0]


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
        # Of each: the table of the tensors, that of the gradients' addresses.
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in pinning.sources)
        assert len(places) == 3 * 2
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
        addresses = [p.grad.data_ptr() for p in parameters if p.grad is not None]
        assert pinning.sources[-1].tolist() == addresses


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_four_graphs_after_each_other(
    launches: Launches, capture: list[bool], monkeypatch: pytest.MonkeyPatch, max_grad_norm: float | None
) -> None:
    """Then a step outside is due, even if it is the very one before the graphs. Optimizers do not share."""
    optimizers, places = [], []
    for _ in range(2):
        parameters, masks = parameters_and_masks([(8, 64)])
        optimizers.append(
            SparseOpt(parameters, 0.1, 0.9, masks=masks, max_grad_norm=max_grad_norm, backend="triton")
        )
        places.append([(p, p.grad) for p in parameters])

    def capture_until_refused() -> int:
        capture[0] = True
        captured = -1

        def capture_more() -> None:
            nonlocal captured
            while captured < 100:
                captured += 1
                for optimizer, own in zip(optimizers, places, strict=True):
                    for p, _ in own:
                        p.grad = torch.zeros(p.numel() + 1)[1:].view_as(p)
                    optimizer.step()

        with pytest.raises(RuntimeError, match="make one step outside of a graph between them"):
            capture_more()
        capture[0] = False
        return captured

    monkeypatch.setattr(device, "_LEAST_STAGING", 0)
    monkeypatch.setattr(device, "_wanted", {})
    with Pinning(capture, monkeypatch):
        for _ in range(2):
            for optimizer, own in zip(optimizers, places, strict=True):
                for p, gradient in own:
                    p.grad = gradient
                optimizer.step()
            assert 4 <= capture_until_refused() < 20


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_what_a_graph_reads_is_kept(
    launches: Launches, capture: list[bool], max_grad_norm: float | None
) -> None:
    """Tables, addresses, lists; neither the boolean masks, which are not read, nor the parameters."""
    parameters, masks = parameters_and_masks([(8, 64), (12,)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, max_grad_norm=max_grad_norm, backend="triton")
    optimizer.step()
    before = len(device._read_by_graphs)
    capture[0] = True
    optimizer.step()
    kept = device._read_by_graphs[before:]
    memory = [t for own in kept if isinstance(own, tuple) for shared in own for t in shared._memory]
    plan = optimizer._prepared.batches[0].plan
    assert isinstance(plan, gpu_plan.GpuPlan)
    assert plan._placed is not None
    sectors = plan._listed[0].sectors
    assert sectors is not None
    factors = plan._factors[0]
    assert factors is not None
    read = [*plan._placed.layout.memory(), *plan._placed.gradients, *sectors, *factors]
    assert all(any(t is own for own in memory) for t in read)
    assert not any(t.dtype == torch.bool or any(t is p for p in parameters) for t in memory)


def test_memory_is_kept_for_other_streams(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a list was made on one stream, and a table on another, is all the same to a third."""
    stream = [7]
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(gpu_plan, "current_stream", lambda device: stream[0])
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(current_stream=lambda device: stream[0]))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, on: told.append((id(tensor), on)))
    parameters, masks = parameters_and_masks([(8, 64)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, backend="triton")
    optimizer.step()
    for on, offset in ((8, 1), (9, 1), (8, 0)):
        stream[0] = on
        parameters[0].grad = torch.zeros(8 * 64 + 1)[offset:][: 8 * 64].view(8, 64)
        optimizer.step()
        plan = optimizer._prepared.batches[0].plan
        assert isinstance(plan, gpu_plan.GpuPlan)
        assert plan._placed is not None
        sectors = plan._listed[0].sectors
        factors = plan._factors[0]
        assert sectors is not None
        assert factors is not None
        for tensor in (*plan._placed.layout.memory(), *plan._placed.gradients, *sectors, *factors):
            assert (id(tensor), on) in told


def test_a_default_device_changes_nothing(backend_name: str) -> None:
    """Tables are made on the host, wherever tensors are made by default."""
    parameters, masks = parameters_and_masks([(8, 64), (5, 27), (9,)])
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend=backend_name)
    with torch.device("meta"):
        for _ in range(2):
            optimizer.step()


# ---- devices ----------------------------------------------------------------------------------------


def test_tensors_on_two_devices_are_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own tensors, and AMP's scalars where they are."""
    calls: list[tuple[Sequence[ParamState], Inputs]] = []

    class Plan:
        def __init__(self, params: Sequence[ParamState], factors: Sequence[ParamFactors | None]) -> None:
            assert [*factors] == [None] * len(params)  # there is no mask
            self.params = params

        def step(self, inputs: Inputs) -> None:
            calls.append((self.params, inputs))

        def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
            return []

        def native_table(self) -> None:
            return None

    class Backend:
        unavailable = staticmethod(lambda device: None)
        host_scalars = staticmethod(lambda device: False)
        supports = staticmethod(lambda param: True)
        plan = Plan

    monkeypatch.setattr(kernels, "backend_for", lambda name, device: Backend)
    parameters = [Parameter(torch.zeros(3, device=place)) for place in ("cpu", "meta", "cpu")]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9)
    scaled(optimizer)
    optimizer.step()
    first, second, third = parameters
    assert [[param.parameter for param in params] for params, _ in calls] == [[first, third], [second]]
    assert [inputs.gradients for _, inputs in calls] == [[first.grad, third.grad], [second.grad]]
    for params, inputs in calls:
        assert inputs.found_inf is not None
        assert inputs.grad_scale is not None
        assert inputs.found_inf.device == inputs.grad_scale.device == params[0].parameter.device
