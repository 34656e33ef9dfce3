"""Bytes sent, and memory, on 1 to 512 GPUs, computed: ``python benchmarks/scale_model.py``.

``--measure`` trains a network of 100 million weights on 2 and 4 processes of this machine first (FSDP2,
gloo), and prints what was counted and measured beside what is computed. It takes two minutes and 8 GB of
memory.

What is computed:

- Bytes are those that one rank sends, if PyTorch's collectives are rings: ``2 (N - 1) / N`` of what is
  all-reduced over ``N`` ranks, ``(N - 1) / N`` of what is gathered or reduced and scattered. Gloo reduces
  and scatters by an all-reduce, so that its passes send a third more. DDP is that with
  ``broadcast_buffers=False``: else it sends a byte a weight more, for the masks.
- The network has square layers without biases, all masked, in float32.
- Memory is that of the training state, between two steps: parameters, gradients, momentum, masks, what RigL
  has explored, and the lists of the GPU backends. Activations are not in it; what FSDP2 gathers is named
  beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import sparseopt_kernels as sk
from sparseopt_kernels.kernels.gpu.lists import LISTED
from sparseopt_kernels.lab.machine import machine
from sparseopt_kernels.sharding import local_part, local_parts
from sparseopt_kernels.text_table import aligned

Engine = Literal["ddp", "fsdp"]
_FLOAT = 4  # bytes
_DIGIT_COUNTS = 3 * 2048 * 8  # bytes: of a choice of float32 scores, see topology/sharded_selection.py
_GATHERED = 72  # bytes of each layer, from each rank to each, in an update: sizes, counts and ties
_CHOICES = 2  # of RigL: what is dropped, and what grows
_FLAG = 8  # bytes: see step/rank_agreement.py
_SPARSITY = 0.9


class Network(NamedTuple):
    """Square layers, all masked."""

    layers: int
    width: int

    @property
    def weights(self) -> int:
        return self.layers * self.width**2


class Traffic(NamedTuple):
    """Bytes that one rank sends."""

    by_torch: float
    """In a step: weights and gradients, as dense training sends them."""
    by_step: float
    """In a step, because of the masks."""
    by_update: float
    """In an update of the masks by RigL, without the step; without small numbers."""


def computed_traffic(network: Network, ranks: int, engine: Engine) -> Traffic:
    share = (ranks - 1) / ranks
    weights = network.weights * _FLOAT
    if engine == "ddp":
        return Traffic(by_torch=2 * share * weights, by_step=0.0, by_update=0.0)
    # The weights are gathered for the forward and for the backward pass, and gradients reduced and scattered.
    by_layer = 2 * share * _CHOICES * _DIGIT_COUNTS + (ranks - 1) * _GATHERED
    return Traffic(
        by_torch=3 * share * weights, by_step=2 * share * _FLAG, by_update=network.layers * by_layer
    )


class Memory(NamedTuple):
    """Bytes on one rank."""

    state: float
    """Parameters, gradients and momentum, as dense training has them."""
    masks: float
    explored: float
    lists: float
    """Of the GPU backends: the bits of all sectors of 8 weights, and the largest list."""


def computed_memory(network: Network, ranks: int, engine: Engine) -> Memory:
    own = network.weights / (1 if engine == "ddp" else ranks)
    return Memory(state=3 * _FLOAT * own, masks=own, explored=own, lists=own / 8 * (1 + LISTED * (4 + 1)))


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that this rank sends by collectives, as rings send them."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.share = (ranks - 1) / ranks
        self.sent = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name.startswith("c10d::"):
            self.sent += self._sent(name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> float:
        if name == "allreduce_":
            return 2 * self.share * _bytes(args[0])
        if name in ("allgather_", "_allgather_base_"):
            return self.share * _bytes(args[0])
        if name == "_reduce_scatter_base_":
            return self.share * _bytes(args[1])
        raise NotImplementedError(f"{name} is not counted")


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_bytes, tensors))


def _local_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of the parts of this rank."""
    return sum(local.nbytes for local in local_parts(tensors) if local is not None)


class Measured(NamedTuple):
    """What one rank has measured and counted. Bytes."""

    counted: Traffic
    on_the_wire: Traffic
    """As the network interface of the machine counts it, a share of one rank."""
    state: float
    masks: float
    explored: float
    peak: float
    """The largest memory of the process in a step and an update, without what it had before the network."""
    step_seconds: float
    update_seconds: float


def measure(rank: int, ranks: int, network: Network, optimizer: str, folder: str) -> None:
    """Train the network on one rank, and save a ``Measured`` in the folder.

    Args:
        optimizer: ``"dense"``: PyTorch's SGD without masks, or ``"sparse"``.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=ranks)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    images = torch.randn(8, network.width)
    before = _memory("VmRSS")
    mesh = init_device_mesh("cpu", (ranks,))
    with torch.device("meta"):
        model = nn.Sequential(
            *(nn.Linear(network.width, network.width, bias=False) for _ in range(network.layers))
        )
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            local_part(p).normal_(std=network.width**-0.5)
    dst = None
    if optimizer == "dense":
        opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    else:
        masks = sk.sparsify(model, _SPARSITY, "uniform", seed=0)
        opt = sk.SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
        dst = sk.RigL(masks, update_every=1, stop_at=math.inf, skip_step=False)

    def backward() -> None:
        opt.zero_grad()
        model(images).square().mean().backward()

    for _ in range(3):  # all buffers are there then
        backward()
        opt.step()
    _reset_peak()
    passes, steps, updates = [_watched(ranks, backward)], [], []
    for _ in range(3):
        steps.append(_watched(ranks, opt.step))
        if dst is not None:
            updates.append(_watched(ranks, dst.step))
            opt.step()  # whose masks are new
        passes.append(_watched(ranks, backward))
    wire, counted = ([_middle([s[i] for s in found]) for found in (passes, steps, updates)] for i in (0, 1))
    parameters = [*model.parameters()]
    state = [
        *parameters,
        *(p.grad for p in parameters),
        *(own["momentum_buffer"] for own in opt.state.values()),
    ]
    measured = Measured(
        counted=Traffic(*counted),
        on_the_wire=Traffic(*wire),
        state=_local_bytes(state),
        masks=0 if dst is None else _local_bytes(masks.values()),
        explored=0 if dst is None else _local_bytes(dst.state_dict()["explored"]),
        peak=_memory("VmHWM") - before,
        step_seconds=_middle([s[2] for s in steps]),
        update_seconds=_middle([s[2] for s in updates]),
    )
    Path(folder, f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def _watched(ranks: int, action: Any) -> tuple[float, float, float]:
    """Return what an action of all ranks sends, by the interface and as counted, and its seconds."""
    dist.barrier()
    before, started = _sent_bytes(), time.perf_counter()
    with Counter(ranks) as counter:
        action()
    seconds = time.perf_counter() - started
    dist.barrier()
    return (_sent_bytes() - before) / ranks, counter.sent, seconds


def _middle(numbers: list[float]) -> float:
    return sorted(numbers)[len(numbers) // 2] if numbers else 0.0


def _sent_bytes() -> int:
    """Return how many bytes the loopback interface has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("there is no loopback interface in /proc/net/dev")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured_on(ranks: int, network: Network, optimizer: str) -> Measured:
    """Run :func:`measure` on that many processes. Return what rank 0 has, with the largest memory of all."""
    with TemporaryDirectory() as folder:
        arguments = ranks, network, optimizer, folder
        torch.multiprocessing.spawn(measure, arguments, nprocs=ranks)  # type: ignore[no-untyped-call]
        found = []
        for rank in range(ranks):
            counted, on_the_wire, *numbers = json.loads(Path(folder, f"{rank}.json").read_text())
            found.append(Measured(Traffic(*counted), Traffic(*on_the_wire), *numbers))
    first = found[0]
    return first._replace(peak=max(own.peak for own in found), state=max(own.state for own in found))


def comparison(network: Network) -> Iterator[str]:
    """Yield the table of what is measured and computed for a network on 2 and 4 processes."""
    header = ["ranks", "optimizer", "a pass: MB", "a step: B", "an update: KB", "state: MB", "for masks: MB"]
    lines = [[*header, "peak: MB", "step: ms", "update: ms"]]
    for ranks in (2, 4):
        lines.append(_dense(measured_on(ranks, network, "dense"), network, ranks))
        lines.append(_sparse(measured_on(ranks, network, "sparse"), network, ranks))
    yield f"{network.weights / 1e6:.1f} million weights in {network.layers} layers; {machine()}"
    yield "what one rank sends: by the interface / counted / computed; its memory: counted / computed"
    yield from aligned(lines)


def _dense(own: Measured, network: Network, ranks: int) -> list[str]:
    traffic, memory = computed_traffic(network, ranks, "fsdp"), computed_memory(network, ranks, "fsdp")
    return [
        str(ranks),
        "SGD (foreach), dense",
        _three(own.on_the_wire.by_torch, own.counted.by_torch, traffic.by_torch, 1e6),
        _three(own.on_the_wire.by_step, own.counted.by_step, 0, 1),
        "",
        f"{own.state / 1e6:.1f} / {memory.state / 1e6:.1f}",
        "",
        f"{own.peak / 1e6:.0f}",
        f"{own.step_seconds * 1e3:.0f}",
        "",
    ]


def _sparse(own: Measured, network: Network, ranks: int) -> list[str]:
    traffic, memory = computed_traffic(network, ranks, "fsdp"), computed_memory(network, ranks, "fsdp")
    line = _dense(own, network, ranks)
    line[1] = "SparseOpt, RigL"
    line[3] = _three(own.on_the_wire.by_step, own.counted.by_step, traffic.by_step, 1)
    line[4] = _three(own.on_the_wire.by_update, own.counted.by_update, traffic.by_update, 1e3)
    line[6] = f"{(own.masks + own.explored) / 1e6:.1f} / {(memory.masks + memory.explored) / 1e6:.1f}"
    line[9] = f"{own.update_seconds * 1e3:.0f}"
    return line


def _three(wire: float, counted: float, computed: float, unit: float) -> str:
    return " / ".join(f"{number / unit:.0f}" for number in (wire, counted, computed))


NETWORKS = [Network(24, 2048), Network(60, 4096), Network(150, 8192)]
"""Of 100 million, 1 billion and 10 billion weights."""
RANKS = (1, 8, 64, 512)


def table() -> Iterator[str]:
    """Yield the table of what is computed."""
    header = ["weights", "layers", "GPUs", "engine", "weights, gradients: MB a step"]
    header += [
        "for the masks: B a step",
        "MB an update",
        "memory: MB",
        "of it masks, lists: MB",
        "gathered: MB",
    ]
    lines = [header]
    for network in NETWORKS:
        for ranks in RANKS:
            if ranks > 1:
                lines.append(_line(network, ranks, "ddp"))
            lines.append(_line(network, ranks, "fsdp"))
    yield "computed, not measured: bytes that one GPU sends, if collectives are rings, and memory of one GPU"
    yield from aligned(lines)


def _line(network: Network, ranks: int, engine: Engine) -> list[str]:
    traffic, memory = computed_traffic(network, ranks, engine), computed_memory(network, ranks, engine)
    # The layer that is computed and the next one, and in the backward pass the gradients of one.
    gathered = 0.0 if engine == "ddp" else 3 * _FLOAT * network.width**2
    return [
        f"{network.weights / 1e6:,.0f} M",
        str(network.layers),
        str(ranks),
        "one" if ranks == 1 else engine,
        f"{traffic.by_torch / 1e6:,.0f}",
        f"{traffic.by_step:.0f}",
        f"{traffic.by_update / 1e6:.1f}",
        f"{sum(memory) / 1e6:,.0f}",
        f"{sum(memory[1:]) / 1e6:,.0f}",
        f"{gathered / 1e6 * (ranks > 1):,.0f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="train on 2 and 4 processes first")
    args = parser.parse_args()
    if args.measure:
        print("\n".join(comparison(Network(6, 4096))), end="\n\n")
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
