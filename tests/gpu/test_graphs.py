"""CUDA graphs, as far as the host is concerned: what is refused in them, what they copy and keep. No GPU is
needed, as in ``test_launches.py``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from noted_launches import Launches, new_mask
from parameters import parameters_and_masks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseopt_kernels.kernels.gpu import device, triton
from sparseopt_kernels.kernels.gpu import plan as gpu_plan
from sparseopt_kernels.kernels.gpu import tables as gpu_tables
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.skipped_steps import SkippedStep


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
