"""The GPU backends on a GPU: against the oracle, without waiting, in CUDA graphs, on several devices.

What needs no GPU to be seen is elsewhere: the whole suite runs on Triton's interpreter and on the CUDA
sources compiled for the CPU. `benchmarks/gpu_report.py` runs this file first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import Backend
from oracle import Hyper
from side_by_side import PATTERNS, SideBySide, Spec, assert_rounds_every_number
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import kernels
from sparseopt_kernels.optimizer import SparseOpt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERYTHING = Hyper(
    lr=0.05, momentum=0.9, weight_decay=0.02, nesterov=True, maximize=True, ham_alpha=2.0, ham_beta=0.1
)


@pytest.fixture(params=["triton", "cuda", "reference"])
def on_gpu(request: pytest.FixtureRequest) -> Backend:
    reason = kernels.BACKENDS[request.param].unavailable(torch.device(DEVICE))
    if reason is not None:
        pytest.skip(f"backend {request.param!r} cannot run: {reason}")
    return Backend(request.param, device=DEVICE)


@pytest.fixture(params=["triton", "cuda"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The backends that have kernels of their own."""
    reason = kernels.BACKENDS[request.param].unavailable(torch.device(DEVICE))
    if reason is not None:
        pytest.skip(f"backend {request.param!r} cannot run: {reason}")
    return request.param


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Network:
    """Parameters of all classes of rows, with masks and gradients, and an optimizer."""

    def __init__(self, backend: str, device: str = DEVICE, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = []
        self.masks = {}
        for shape in [(64, 576), (48, 64), (16, 27), (5, 1031), (33,), (64,)]:
            p = Parameter(torch.randn(shape, generator=generator).to(device))
            p.grad = torch.zeros_like(p)
            self.parameters.append(p)
            if p.ndim > 1:
                self.masks[p] = (torch.rand(shape, generator=generator) < 0.2).to(device)
        options = {"lr": 0.1, "momentum": 0.9, **options}
        self.optimizer: Any = SparseOpt(self.parameters, **options, masks=self.masks, backend=backend)

    def set_grads(self, seed: int, moved: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters:
            values = torch.randn(p.shape, generator=generator).to(p.device)
            if moved:
                p.grad = values
            else:
                assert p.grad is not None
                p.grad.copy_(values)

    def step(self, seed: int, moved: bool = False) -> None:
        self.set_grads(seed, moved)
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        return [*self.parameters, *(self.optimizer.state[p]["momentum_buffer"] for p in self.parameters)]


def assert_same_state(a: Network, b: Network) -> None:
    for left, right in zip(a.state(), b.state(), strict=True):
        assert torch.equal(left, right)


# ---- against the oracle -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 8, 27, 64, 147, 513, 576, 1000, 4608, 20000])
def test_rows(on_gpu: Backend, columns: int, dtype: torch.dtype) -> None:
    specs = [Spec((9, columns), pattern, dtype) for pattern in ("half", "sparse90", "homogeneous", None)]
    SideBySide(on_gpu, specs, [EVERYTHING], seed=1).run(grad_scale=8.0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(on_gpu: Backend, pattern: str) -> None:
    specs = [Spec((70, 129), pattern, torch.float32), Spec((8, 4, 3, 3), pattern, torch.bfloat16)]
    SideBySide(on_gpu, specs, [replace(EVERYTHING, max_grad_norm=1.0)], seed=2).run()


@pytest.mark.parametrize("shape", [(), (1,), (4097,), (4097, 1), (0, 5), (5, 0), (33, 27, 1, 1)], ids=str)
def test_shapes(on_gpu: Backend, shape: tuple[int, ...]) -> None:
    specs = [Spec(shape, pattern, torch.float32) for pattern in ("half", None)]
    SideBySide(on_gpu, specs, [EVERYTHING], seed=3).run()


def test_groups_dtypes_and_transposed_convolutions(on_gpu: Backend) -> None:
    specs = [Spec((5, 33), pattern, dtype) for dtype in DTYPES for pattern in ("half", None, "sparse90")]
    specs.append(Spec((4, 5, 3, 3), "half", torch.float32, transposed_groups=2))
    rules = [
        Hyper(lr=0.1, momentum=0.9, max_grad_norm=1.0),
        Hyper(lr=0.02, weight_decay=0.1, correction="unnormalized", ham_alpha=3.0, max_grad_norm=4.0),
        Hyper(lr=0.3, momentum=0.5, nesterov=True, maximize=True, correction="none"),
        Hyper(lr=0.01, momentum=0.9, dampening=0.5, ham_beta=0.2, max_grad_norm=0.1),
    ]
    SideBySide(on_gpu, specs, rules * 3, seed=4).run(grad_scale=4.0)


@pytest.mark.parametrize("pattern", [None, "half"], ids=str)
@pytest.mark.parametrize("lr", [1.0, 0.3, 3e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_rounded(on_gpu: Backend, dtype: torch.dtype, lr: float, pattern: str | None) -> None:
    """Triton's interpreter does not round bfloat16: here it is seen."""
    assert_rounds_every_number(on_gpu, dtype, lr, pattern)


def test_amp_overflows(on_gpu: Backend) -> None:
    """On the first step, too: nothing changes, and the next step is still the first."""
    specs = [Spec((4, 37), "half", torch.float32), Spec((5,), None, torch.float32)]
    run = SideBySide(on_gpu, specs, [Hyper(lr=0.1, momentum=0.9, dampening=0.5)], seed=8)
    for found_inf in [1.0, 2.0, 0.0, 0.0, 1.0, 0.0, 8.0, 0.0] * 2:
        run.step(grad_scale=1024.0, found_inf=found_inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_and_walk_have_the_same_bits(kernel: str, dtype: torch.dtype) -> None:
    """Of masks that are new in each step, and of masks that stay."""
    if kernel == "triton" and dtype == torch.float64:
        pytest.skip("it is not one of Triton's")
    generator = torch.Generator().manual_seed(0)
    networks = []
    columns = (1, 7, 8, 27, 64, 147, 576, 1031, 4096)
    weights = [torch.randn(33, n, generator=generator).to(DEVICE, dtype) for n in columns]
    patterns = [
        (torch.rand(33, n, generator=generator) < 0.3 / (1 + i)).to(DEVICE) for i, n in enumerate(columns)
    ]
    for _ in range(2):
        parameters = [Parameter(w.clone()) for w in weights]
        masks = {p: mask.clone() for p, mask in zip(parameters, patterns, strict=True)}
        networks.append((parameters, masks, SparseOpt(parameters, 0.1, 0.9, masks=masks, backend=kernel)))
    for step in range(4):
        gradients = [torch.randn(w.shape, generator=generator).to(DEVICE, dtype) for w in weights]
        for parameters, _, _ in networks:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
        for mask in networks[1][1].values():
            mask.copy_(mask.clone())
        for _, _, optimizer in networks:
            optimizer.step()
        for ours, theirs in zip(networks[0][0], networks[1][0], strict=True):
            assert torch.equal(ours, theirs), (step, tuple(ours.shape))


def test_a_large_tensor(on_gpu: Backend) -> None:
    SideBySide(on_gpu, [Spec((2048, 4096), "sparse90", torch.float32)], [EVERYTHING], seed=5).step()


def test_grad_scaler(kernel: str) -> None:
    """GradScaler's tensors stay where they are; a step with an overflow is skipped."""
    network, other = Network(kernel), Network(kernel)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    for step in range(6):
        network.set_grads(step)
        other.set_grads(step)
        scaler.scale(torch.ones((), device=DEVICE))
        for p in network.parameters:
            assert p.grad is not None
            p.grad.mul_(scaler.get_scale())
        if step == 3:
            network.parameters[0].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(network.optimizer)
        scaler.update()
        if step != 3:
            other.optimizer.step()
    for ours, theirs in zip(network.state(), other.state(), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- without waiting --------------------------------------------------------------------------------


def amp(network: Network) -> None:
    network.optimizer.grad_scale = torch.full((), 8.0, device=DEVICE)
    network.optimizer.found_inf = torch.zeros((), device=DEVICE)


def new_masks(network: Network) -> None:
    for mask in network.masks.values():
        mask.logical_not_()


@pytest.mark.parametrize("event", [None, amp, new_masks], ids=["plain", "amp", "masks"])
def test_no_step_waits_for_the_device(kernel: str, event) -> None:
    lr = torch.full((), 0.1, device=DEVICE)
    network = Network(kernel, lr=lr, max_grad_norm=1.0)
    network.set_grads(0)
    with no_waiting():
        for _ in range(3):
            if event:
                event(network)
            network.optimizer.step()


def test_a_step_allocates_nothing(kernel: str) -> None:
    network = Network(kernel)
    for step in range(3):
        network.step(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    network.optimizer.step()
    assert torch.cuda.max_memory_allocated() == before


def test_another_stream(kernel: str) -> None:
    """A step is queued on the stream of its caller."""
    network, other = Network(kernel), Network(kernel)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(4):
            network.step(step, moved=True)
    torch.cuda.current_stream().wait_stream(stream)
    for step in range(4):
        other.step(step)
    assert_same_state(network, other)


# ---- CUDA graphs ------------------------------------------------------------------------------------


def captured(network: Network) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network.optimizer.step()
    return graph


@pytest.mark.parametrize("moved", [False, True], ids=["same-gradients", "gradients-that-moved"])
def test_a_captured_step_replays(kernel: str, moved: bool) -> None:
    """Also where gradients are elsewhere than in the steps before, and after other steps outside of it."""
    lr = torch.full((), 0.1, device=DEVICE)
    network, other = Network(kernel, lr=lr), Network(kernel)
    for step in range(3):
        network.step(step)
        other.step(step)
    network.set_grads(3, moved)
    graph_grads = [p.grad for p in network.parameters]
    graph = captured(network)
    for step in range(4, 8):
        for p, grad in zip(network.parameters, graph_grads, strict=True):
            p.grad = grad
        network.set_grads(step)
        other.set_grads(step)
        lr.fill_(0.01 * step)
        other.optimizer.param_groups[0]["lr"] = 0.01 * step
        graph.replay()
        other.optimizer.step()
        assert_same_state(network, other)
        if step == 5:  # eagerly, from other addresses
            network.step(100, moved=True)
            other.step(100)
            assert_same_state(network, other)


def test_graphs_after_one_step_and_after_each_other(kernel: str) -> None:
    """The second is replayed alone: it must not read what only the first has written."""
    network, other = Network(kernel), Network(kernel)
    network.step(0)
    other.step(0)
    captured(network)
    graph = captured(network)
    for step in range(1, 4):
        network.set_grads(step)
        graph.replay()
        other.step(step)
        assert_same_state(network, other)


def test_a_whole_iteration_replays(kernel: str) -> None:
    """Gradients are born in the graph, at addresses of its own."""
    network, other = Network(kernel), Network(kernel)
    network.step(0)
    other.step(0)
    targets = [torch.zeros_like(p) for p in network.parameters]

    def backward(of: Network) -> None:
        of.optimizer.zero_grad()
        loss = sum((p - t).square().sum() for p, t in zip(of.parameters, targets, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backward(network)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    network.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        backward(network)
        network.optimizer.step()
    for step in range(4):
        for target in targets:
            target.fill_(step)
        graph.replay()
        backward(other)
        other.optimizer.step()
        assert_same_state(network, other)


def test_a_first_step_cannot_be_captured(kernel: str) -> None:
    """And the step that the message asks for is a first step like any other."""
    network, other = Network(kernel), Network(kernel)
    with pytest.raises(RuntimeError, match="make one step outside the graph first"):
        captured(network)
    torch.cuda.synchronize()
    for step in range(3):
        network.step(step)
        other.step(step)
        assert_same_state(network, other)


# ---- devices ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device at most")
def test_two_devices(kernel: str) -> None:
    """One call per device, whichever is current."""
    networks = [Network(kernel, f"cuda:{i}") for i in range(2)]
    originals = [p for network in networks for p in network.parameters]
    copies = [Parameter(p.detach().clone()) for p in originals]
    masks_of_originals = {p: mask for network in networks for p, mask in network.masks.items()}
    masks = {c: masks_of_originals[p] for c, p in zip(copies, originals, strict=True) if p.ndim > 1}
    both = SparseOpt(copies, lr=0.1, momentum=0.9, masks=masks, backend=kernel)
    for step in range(3):
        for network in networks:
            network.step(step)
        for c, p in zip(copies, originals, strict=True):
            assert p.grad is not None
            c.grad = p.grad.clone()
        both.step()
    for c, p in zip(copies, originals, strict=True):
        assert torch.equal(c, p)
