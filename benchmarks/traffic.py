"""The memory that one step of the Triton backend touches: ``python benchmarks/traffic.py``. Nothing is timed.

It is a step with unchanged masks. The kernels run in Triton's interpreter, where their loads and stores are
recorded. Each sector of 32 bytes that a launch reads counts once, and each that it writes counts once more,
as if caches were perfect; the same is counted for aligned pairs of sectors, 64 bytes, which some memories
deliver. Tensors begin at multiples of 64 bytes here, as they do on a GPU. All layers are measured whole:
nothing is sampled or scaled.

The exit status is 1 if a layer with rows of 27 columns or more and 100 000 weights or more is not within 1.02
of the floor.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import numpy as np
import numpy.typing as npt
import torch
import triton
from networks import resnet50, sector_floor_bytes
from torch import Tensor, nn
from tqdm import tqdm
from triton.runtime import interpreter

import sparseopt_kernels as sk
from sparseopt_kernels.kernels.contract import Inputs
from sparseopt_kernels.kernels.gpu import plan as gpu_plan
from sparseopt_kernels.kernels.gpu.plan import GpuPlan
from sparseopt_kernels.kernels.gpu.tables import SectorLaunch, SectorRow
from sparseopt_kernels.kernels.gpu.triton import TritonKernels
from sparseopt_kernels.lab.training.models import resnet
from sparseopt_kernels.text_table import aligned

SPARSITIES = (0.0, 0.8, 0.9, 0.95, 0.97, 0.99)
BOUND, BOUND_COLUMNS, BOUND_WEIGHTS = 1.02, 27, 100_000
RESULTS = Path(__file__).parent / "results" / "traffic.csv"
_DENSE_SGD = 5  # accesses of each weight: p and b read and written, g read
# Few programs with large chunks, because any program takes milliseconds in the interpreter. The sectors of
# the tensors that a launch touches are the same, but fewer chunks have an owner; see ``_layers``.
_CHUNK, _TRUE_CHUNK = 1 << 16, TritonKernels.chunk
_ROWS = 512

Numbers = npt.NDArray[np.uint64]


class Layer(NamedTuple):
    """The traffic of one parameter in a step. All fields after ``weights`` are bytes."""

    name: str
    columns: int  # of a row; 0: a dense tensor
    weights: int
    size: int  # of a weight
    floor: int
    sectors: float
    pairs: float


class Touched(NamedTuple):
    """The memory that a launch reads and writes: the sorted distinct numbers of pieces of ``unit`` bytes."""

    read: Numbers
    written: Numbers
    unit: int = 32  # a sector

    def in_pairs(self) -> Touched:
        return Touched(_distinct(self.read // 2), _distinct(self.written // 2), 2 * self.unit)

    def bytes_in_all(self) -> int:
        return self.unit * (len(self.read) + len(self.written))

    def bytes_of(self, tensor: Tensor) -> int:
        """Return the bytes read and written in the memory of a tensor."""
        address, size = tensor.data_ptr(), tensor.nbytes
        ends = np.array([address // self.unit, (address + size - 1) // self.unit + 1], dtype=np.uint64)
        return self.unit * sum(int(np.diff(np.searchsorted(n, ends))[0]) for n in (self.read, self.written))


def measure(model: nn.Module, masks: Mapping[nn.Parameter, Tensor]) -> list[Layer]:
    """Return the traffic of one step by parameter."""
    names: dict[Tensor, str] = {}
    for name, p in model.named_parameters():
        names[p], p.grad = name, torch.ones_like(p)
    layers: list[Layer] = []
    first_step: list[bool] = []

    class MeteredPlan(GpuPlan):
        def step(self, inputs: Inputs) -> None:
            if not first_step:
                first_step.append(True)
                super().step(inputs)
                return
            with _intercepted() as launches:
                super().step(inputs)
            assert self._placed is not None
            for launch, touched in zip(self._placed.layout.launches, launches, strict=True):
                assert isinstance(launch, SectorLaunch)
                layers.extend(self._layers(launch, touched, inputs))

        def _layers(self, launch: SectorLaunch, touched: Touched, inputs: Inputs) -> Iterator[Layer]:
            """Yield the launch's traffic by parameter: its own memory, the owners of its chunks, and an equal
            share of the rest, which is tables and scalars."""
            own = {}
            for i, row in zip(launch.members, launch.table.tolist(), strict=True):
                param, sectors, factors = self._params[i], self._listed[i].sectors, self._factors[i]
                memory = [param.parameter, param.momentum_buffer, inputs.gradients[i]]
                memory += [*(sectors or ()), *(factors or ())]
                own[i] = [t for t in memory if t is not None], SectorRow(*row)
            costs = []
            for seen in (touched, touched.in_pairs()):
                known = {i: sum(map(seen.bytes_of, memory)) for i, (memory, _) in own.items()}
                shared = seen.bytes_in_all() - sum(known.values()) - seen.bytes_of(launch.chunk_to_tensor)
                chunks = {i: -(-row.length // _TRUE_CHUNK) for i, (_, row) in own.items()}
                costs.append({i: known[i] + shared / len(own) + 4 * chunks[i] for i in own})
            for i in own:
                p, mask = self._params[i].parameter, self._params[i].mask
                columns = 0 if mask is None else mask[0].numel()
                floor = sector_floor_bytes(p, mask)
                yield Layer(names[p], columns, p.numel(), p.itemsize, floor, costs[0][i], costs[1][i])

    with (
        patch.object(gpu_plan, "GpuPlan", MeteredPlan),
        patch.multiple(TritonKernels, chunk=_CHUNK, rows=_ROWS, list_rows=_ROWS),
    ):
        optimizer = sk.SparseOpt(
            names, lr=0.1, momentum=0.9, weight_decay=5e-4, masks=masks, backend="triton"
        )
        optimizer.step()
        optimizer.step()
    assert len(layers) == len(names), "the reference backend has updated a parameter"
    return layers


@contextmanager
def _intercepted() -> Iterator[list[Touched]]:
    """Yield a list to which the memory of each launch in the block is added. All loads and stores of the
    interpreter pass through the two patched functions."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launches: list[Touched] = []
    read: list[Numbers] = []
    written: list[Numbers] = []

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        read.append(_touched(pointers.data, mask.data))
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        written.append(_touched(pointers.data, mask.data))
        return store(self, pointers, value, mask, *rest)

    def noted_launch(self: Any, *arguments: Any, **keywords: Any) -> None:
        read.clear()
        written.clear()
        launch(self, *arguments, **keywords)
        launches.append(Touched(_distinct(np.concatenate(read)), _distinct(np.concatenate(written))))

    with (
        patch.multiple(builder, create_masked_load=noted_load, create_masked_store=noted_store),
        patch.object(executor, "__call__", noted_launch),
    ):
        yield launches


def _touched(addresses: Numbers, mask: npt.NDArray[np.bool_]) -> Numbers:
    """Return the sectors of one access. An element lies at a multiple of its size, so within one sector."""
    return _distinct(_no_repeats(addresses[mask.astype(bool)] // 32))


def _distinct(numbers: Numbers) -> Numbers:
    """Return the sorted distinct numbers. ``np.unique`` hashes and is many times slower."""
    return _no_repeats(np.sort(numbers))


def _no_repeats(numbers: Numbers) -> Numbers:
    new = np.ones(len(numbers), dtype=bool)
    new[1:] = numbers[1:] != numbers[:-1]
    return numbers[new]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: resnet(3, 10, blocks=3),
    "ResNet-50": resnet50,
    "ResNet-50, bfloat16": lambda: resnet50().bfloat16(),
    "4096x4096": lambda: nn.Linear(4096, 4096, bias=False),
}


def main(
    networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS,
    sparsities: Sequence[float] = SPARSITIES,
    results: Path = RESULTS,
) -> int:
    """Measure, print and write the table, and return the exit status."""
    torch.set_num_threads(1)
    measured: dict[str, dict[float, list[Layer]]] = {name: {} for name in networks}
    runs = [(name, sparsity) for name in networks for sparsity in sparsities]
    with tqdm(runs, unit="step") as progress:
        for name, sparsity in progress:
            progress.set_description(f"{name}, sparsity {sparsity}")
            model = networks[name]()
            measured[name][sparsity] = measure(model, sk.sparsify(model, sparsity, "erk"))
    print("Distinct memory touched in one step of SparseOpt: momentum, weight decay, ERK masks")
    for name, by_sparsity in measured.items():
        _print_network(name, by_sparsity)
    _write(results, measured)
    print(f"\nwritten to {results}")
    return _verdict(measured)


def _print_network(name: str, by_sparsity: Mapping[float, list[Layer]]) -> None:
    layers = next(iter(by_sparsity.values()))
    print(f"\n{name}, {sum(layer.weights for layer in layers)} weights, bytes per weight:")
    rows = [["sparsity", "sectors", "pairs", "floor", "/ floor", "/ dense SGD"]]
    for sparsity, layers in by_sparsity.items():
        total = _total(layers)
        sectors, pairs, least = (cost / total.weights for cost in (total.sectors, total.pairs, total.floor))
        figures = (sectors, pairs, least, _ratio(total), _of_dense(total))
        rows.append([str(sparsity), *(f"{figure:.3f}" for figure in figures)])
    print("\n".join(aligned(rows)))
    print("sectors / floor of the worst layer, by columns of a row and sparsity:")
    rows = [["columns", *map(str, by_sparsity), "at most"]]
    for columns in sorted({layer.columns for layer in layers}):
        ratios = [max(map(_ratio, _of_columns(found, columns))) for found in by_sparsity.values()]
        required = str(BOUND) if columns >= BOUND_COLUMNS else ""
        rows.append([str(columns or "dense"), *(f"{ratio:.3f}" for ratio in ratios), required])
    print("\n".join(aligned(rows)))


def _verdict(measured: Mapping[str, Mapping[float, list[Layer]]]) -> int:
    """Print the layers that break the bound, and return the exit status: 1 if there are any, else 0."""
    broken = 0
    for name, by_sparsity in measured.items():
        for sparsity, layers in by_sparsity.items():
            for layer in layers:
                # Less than the floor would mean that some accesses were not recorded.
                assert _ratio(layer) >= 1, f"{layer} has less than the floor"
                is_bound = layer.columns >= BOUND_COLUMNS and layer.weights >= BOUND_WEIGHTS
                if is_bound and _ratio(layer) > BOUND:
                    broken = 1
                    print(
                        f"{name}, sparsity {sparsity}: {layer.name}, of {layer.columns} columns, touches "
                        f"{_ratio(layer):.3f} times the floor, it must be at most {BOUND}",
                        file=sys.stderr,
                    )
    return broken


def _write(path: Path, measured: Mapping[str, Mapping[float, list[Layer]]]) -> None:
    """Write a row for each network and sparsity, and one for each number of columns in it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("version", "triton", "network", "sparsity", "columns", "weights", "sectors_bytes"),
                *("pairs_bytes", "floor_bytes", "of_floor", "of_floor_worst_layer", "of_dense_sgd"),
            ]
        )
        for name, by_sparsity in measured.items():
            for sparsity, layers in by_sparsity.items():
                classes: dict[object, list[Layer]] = {"all": layers}
                for columns in sorted({layer.columns for layer in layers}):
                    classes[columns or "dense"] = _of_columns(layers, columns)
                for label, members in classes.items():
                    sum_ = _total(members)
                    costs = (f"{cost:.0f}" for cost in (sum_.sectors, sum_.pairs, sum_.floor))
                    ratios = (
                        _ratio(sum_),
                        max(map(_ratio, members)),
                        _of_dense(sum_),
                    )
                    writer.writerow(
                        [
                            *(sk.__version__, triton.__version__, name, sparsity, label, sum_.weights),
                            *(*costs, *(f"{ratio:.4f}" for ratio in ratios)),
                        ]
                    )


def _of_columns(layers: Sequence[Layer], columns: int) -> list[Layer]:
    return [layer for layer in layers if layer.columns == columns]


def _total(layers: Sequence[Layer]) -> Layer:
    _, _, weights, sizes, least, sectors, pairs = zip(*layers, strict=True)
    return Layer("all", 0, sum(weights), sizes[0], sum(least), sum(sectors), sum(pairs))


def _ratio(layer: Layer) -> float:
    return layer.sectors / layer.floor


def _of_dense(layer: Layer) -> float:
    return layer.sectors / layer.weights / (_DENSE_SGD * layer.size)


if __name__ == "__main__":
    sys.exit(main())
