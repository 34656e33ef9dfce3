"""Counts the memory traffic of a step on a GPU with inputs in another order, or active weights in groups:
``python benchmarks/mask_orders.py``. Nothing is timed and nothing runs on a GPU.

A masked step reads and writes p and b and reads g in the lines that hold an active weight (sectors of 32
bytes, or aligned pairs of them). It also reads the mask's bits, or a list of these lines if that is shorter.
Tensors without a mask are moved whole.

The traffic is counted for masks as they are; for masks with the inputs of each layer in another order, the
same for all its neurons; and for random masks whose active weights come in aligned groups. An order permutes
either

- single columns of the weight matrix; for convolutions larger than 1x1 this is only a comparison, because
  they could not read such a weight; or
- input channels with their kh * kw weights, which are adjacent in contiguous memory and apart in
  channels_last.

Each layer has its own order, or, in ResNet-50, all layers that read the same channels share one.

Masks are random (``sparsify``, ERK), or those of small networks that RigL and SET have trained on
scikit-learn's digits and on Fashion-MNIST. It takes three minutes on one core.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from networks import resnet50
from torch import Tensor, nn
from tqdm import tqdm

import sparseopt_kernels as sk
from sparseopt_kernels.lab.training.config import new_config
from sparseopt_kernels.lab.training.data import load_dataset
from sparseopt_kernels.lab.training.models import build_model
from sparseopt_kernels.lab.training.run import Run
from sparseopt_kernels.text_table import aligned

SPARSITIES = (0.9, 0.95, 0.99)
RESULTS = Path(__file__).parent / "results" / "mask_orders.csv"
WIDTHS = (8, 16, 32)  # weights in a line


class Memory(NamedTuple):
    """The size of a weight and of a line of memory, in bytes."""

    name: str
    itemsize: int
    line: int

    @property
    def width(self) -> int:
        """The number of weights in a line: one of ``WIDTHS``."""
        return self.line // self.itemsize


MEMORIES = (
    Memory("float32_sectors", 4, 32),
    Memory("float32_pairs", 4, 64),
    Memory("bfloat16_sectors", 2, 32),
    Memory("bfloat16_pairs", 2, 64),
)
RANDOM, AS_IS = "random", "as is"
_ACCESSES = 5  # p and b read and written, g read

Bools = npt.NDArray[np.bool_]
Permutation = npt.NDArray[np.intp]
Order = Callable[[Bools, int], Permutation]  # of pieces (see MOVES), by the weights in a line


class Case(NamedTuple):
    """The masks of a network, each of shape ``(out, in, *kernel)``."""

    network: str
    source: str  # of the masks
    sparsity: float
    masks: list[Bools]
    unmasked: int  # weights of parameters without a mask
    earlier: list[Bools] | None = None  # the masks halfway through their updates
    inputs: list[int] | None = None  # for each layer, the number of the channels that it reads

    @property
    def weights(self) -> int:
        return sum(mask.size for mask in self.masks) + self.unmasked


class Count(NamedTuple):
    """The traffic of a case's masked parameters in one arrangement, by the weights in a line."""

    layout: str
    arrangement: str
    live: dict[int, int]  # lines that hold an active weight
    mask_bytes: dict[int, int]  # read to find the active weights

    def step_bytes(self, case: Case, memory: Memory) -> int:
        """Return the bytes that a step moves, parameters without a mask included."""
        unmasked = _ACCESSES * memory.itemsize * case.unmasked
        live = _ACCESSES * memory.line * self.live[memory.width]
        return live + self.mask_bytes[memory.width] + unmasked


def live_lines(memory: Bools, width: int) -> int:
    """Return the number of lines of ``width`` weights with an active one. The first weight begins a line."""
    flat = memory.reshape(-1)
    return int(np.pad(flat, (0, -flat.size % width)).reshape(-1, width).any(axis=1).sum())


def least_mask_bytes(weights: int, live: int, width: int) -> int:
    """Return the bytes read to find the active weights: all bits of the mask, or, if that is less, a list of
    the ``live`` lines with a 4-byte number and the bits of each."""
    return min(-(-weights // 8), live * (4 + width // 8))


def _columns(mask: Bools) -> Bools:
    return mask.reshape(len(mask), -1, 1)


def _channels(mask: Bools) -> Bools:
    return mask.reshape(*mask.shape[:2], -1)


def _channels_apart(mask: Bools) -> Bools:
    return np.moveaxis(mask, 1, -1).reshape(-1, mask.shape[1], 1)


# By layout and kind of piece: reshapes a mask to (rows, pieces, weights of a piece) in the order of memory.
MOVES: dict[tuple[str, str], Callable[[Bools], Bools]] = {
    ("contiguous", "columns"): _columns,
    ("contiguous", "channels"): _channels,
    ("channels_last", "channels"): _channels_apart,
}


def at_random(pieces: Bools, width: int) -> Permutation:
    return np.random.default_rng(0).permutation(pieces.shape[1])


def by_fan_out(pieces: Bools, width: int) -> Permutation:
    """Return the order with the most active weights first."""
    return np.argsort(-pieces.sum(axis=(0, 2)), kind="stable")


def greedily(pieces: Bools, width: int) -> Permutation:
    """Return an order built greedily, group by group, where a group has the pieces that share a line.

    Each group begins with the remaining piece of largest fan-out. The next one is that with the largest
    ``overlap / sqrt(fan-out)``, where overlap counts the rows in which the group is already active.
    """
    active: Bools = np.logical_or.reduce(pieces, axis=2)
    rows, count = active.shape
    size = width if pieces.shape[2] == 1 else -(-width // pieces.shape[2]) + 1
    fan_out = active.sum(axis=0)
    by_piece = np.ascontiguousarray(active.T)
    free = np.ones(count, dtype=bool)
    order: list[int] = []
    for position in range(count):
        if position % size == 0:
            union, overlap = np.zeros(rows, dtype=bool), np.zeros(count, dtype=np.intp)
            score = fan_out
        else:
            score = overlap / np.sqrt(np.maximum(fan_out, 1))
        chosen = int(np.where(free, score, -1).argmax())
        order.append(chosen)
        free[chosen] = False
        new = (by_piece[chosen] & ~union).nonzero()[0]
        union[new] = True
        overlap += active[new].sum(axis=0)
    return np.array(order, dtype=np.intp)


ORDERS = {"at random": at_random, "by fan-out": by_fan_out, "greedily": greedily}


def packed(mask: Bools) -> Bools:
    """Return the mask with each row's active weights at its beginning. If rows are whole numbers of lines, no
    order of columns has fewer live lines."""
    rows = mask.reshape(len(mask), -1)
    is_packed: Bools = np.arange(rows.shape[1]) < rows.sum(axis=1, keepdims=True)
    return is_packed


def in_groups(mask: Bools, size: int) -> Bools:
    """Return a random mask of the same density whose rows consist of groups of ``size`` equal weights."""
    rows, columns = len(mask), prod(mask.shape[1:])
    groups = np.zeros(rows * -(-columns // size), dtype=bool)
    groups[np.random.default_rng(0).permutation(groups.size)[: round(mask.mean() * groups.size)]] = True
    return groups.reshape(rows, -1).repeat(size, axis=1)[:, :columns]


def counts(case: Case) -> Iterator[Count]:
    """Yield the counts of the masks as they are, in each order, packed, and of random masks in groups."""
    yield _count("contiguous", AS_IS, case.masks)
    for (layout, what), pieces in MOVES.items():
        if what == "channels" and all(prod(mask.shape[2:]) == 1 for mask in case.masks):
            continue  # the same as columns
        masks = [pieces(mask) for mask in case.masks]
        if layout == "channels_last":
            yield _count(layout, AS_IS, masks)
        for name, order in ORDERS.items():
            yield _count(layout, f"{what} {name}", masks, order, masks)
        if case.earlier is not None:
            before = [pieces(mask) for mask in case.earlier]
            yield _count(layout, f"{what} greedily, by earlier masks", masks, greedily, before)
        if case.inputs is not None and what == "channels":
            together = _of_equal_inputs(masks, case.inputs)
            yield _count(layout, f"{what} greedily, one order per input", masks, greedily, together)
    yield _count("contiguous", "rows packed", [packed(mask) for mask in case.masks])
    for size in (8, 16) if case.source == RANDOM else ():
        yield _count("contiguous", f"groups of {size}", [in_groups(mask, size) for mask in case.masks])


def _as_is(pieces: Bools, width: int) -> Permutation:
    return np.arange(pieces.shape[1])


def _count(
    layout: str,
    arrangement: str,
    masks: Sequence[Bools],
    order: Order = _as_is,
    seen: Sequence[Bools] | None = None,
) -> Count:
    """Count the traffic with the pieces of each mask in the order made from the mask ``seen`` (default: the
    mask itself)."""
    live, mask_bytes = dict.fromkeys(WIDTHS, 0), dict.fromkeys(WIDTHS, 0)
    for mask, model in zip(masks, seen or masks, strict=True):
        for width in WIDTHS:
            lines = live_lines(mask[:, order(model, width)], width)
            live[width] += lines
            mask_bytes[width] += least_mask_bytes(mask.size, lines, width)
    return Count(layout, arrangement, live, mask_bytes)


def _of_equal_inputs(masks: Sequence[Bools], inputs: Sequence[int]) -> list[Bools]:
    """Return for each layer the concatenated rows of all layers that read the same channels."""
    return [np.concatenate([m for m, i in zip(masks, inputs, strict=True) if i == own]) for own in inputs]


METHODS = {"rigl": "RigL", "set": "SET"}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": resnet50,
    "ResNet-20": lambda: build_model("resnet20", (3, 32, 32), 10),
    "ResNet-20, digits": lambda: build_model("resnet20", (1, 8, 8), 10),
    "MLP, Fashion-MNIST": lambda: build_model("mlp", (1, 28, 28), 10),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "ResNet-20, digits": {"data": "digits", "model": "resnet20"},
    "MLP, Fashion-MNIST": {"data": "fashion-mnist", "model": "mlp", "epochs": 8, "update_every": 50},
}
_EXAMPLES = 20_000  # the most training examples, and the most test examples
_HALFWAY = 3 / 8  # of the epochs: masks change in the first three quarters


def random_case(network: str, sparsity: float) -> Case:
    """Return a case with the random ERK masks of ``sparsify``."""
    model = NETWORKS[network]()
    case = _case(network, RANDOM, sparsity, model, sk.sparsify(model, sparsity, "erk"))
    return case._replace(inputs=resnet50_inputs()) if network == "ResNet-50" else case


def trained_case(network: str, method: str, sparsity: float) -> Case:
    """Train by masked SGD, print the test accuracy, and return a case with the final masks."""
    options = TRAININGS[network]
    config = new_config({**options, "sparsity": sparsity, "method": method, "device": "cpu", "threads": 1})
    run = Run(config, load_dataset(config.data).first(_EXAMPLES, _EXAMPLES), "sgd", seed=0)
    earlier: list[Bools] = []
    while not run.done:
        row = run.train_epoch()
        if run.epoch == round(_HALFWAY * config.epochs):
            earlier = _arrays(run.masks)
    tqdm.write(f"{network}, {METHODS[method]}, {sparsity}: test accuracy {row.test_accuracy:.3f}")
    return _case(network, METHODS[method], sparsity, run.model, run.masks)._replace(earlier=earlier)


def resnet50_inputs() -> list[int]:
    """Return the number of the channels that each layer of ``networks.resnet50`` reads.

    The blocks of a stage add to the same channels. Their first convolutions read these, and so do the first
    convolution and the shortcut of the next stage.
    """
    inputs, read, last = [0], 1, 1
    for blocks in (3, 4, 6, 3):
        for block in range(blocks):
            inputs += [read, last + 1, last + 2]
            last += 2
            if block == 0:
                inputs.append(read)
                read = last = last + 1
    return [*inputs, read]


def _case(network: str, source: str, sparsity: float, model: nn.Module, masks: sk.Masks) -> Case:
    unmasked = sum(p.numel() for p in model.parameters() if p not in masks)
    return Case(network, source, sparsity, _arrays(masks), unmasked)


def _arrays(masks: Mapping[nn.Parameter, Tensor]) -> list[Bools]:
    return [mask.numpy().copy() for mask in masks.values()]


def main(results: Path = RESULTS) -> int:
    """Count, print and write the table, and return the exit status."""
    cases = [partial(random_case, network, sparsity) for network in NETWORKS for sparsity in SPARSITIES]
    for network in TRAININGS:
        cases += [partial(trained_case, network, method, s) for method in METHODS for s in SPARSITIES]
    counted = [(case, list(counts(case))) for case in (make() for make in tqdm(cases, unit="network"))]
    print("Bytes per weight that a step moves at least: momentum, weight decay, ERK")
    for (network, source), group in groupby(counted, lambda item: item[0][:2]):
        found = list(group)
        for memory in MEMORIES:
            print(f"\n{network}, {source} masks, {memory.name.replace('_', ', ')}")
            print("\n".join(aligned(_table(found, memory))))
    _write(results, counted)
    print(f"\nwritten to {results}")
    return 0


def _table(found: Sequence[tuple[Case, list[Count]]], memory: Memory) -> list[list[str]]:
    """Return bytes per weight by arrangement and sparsity, and in brackets the ratio to the same layout as it
    is."""
    rows = [["layout", "arrangement", *(str(case.sparsity) for case, _ in found)]]
    for same in zip(*(of_case for _, of_case in found), strict=True):
        cells = []
        for (case, of_case), count in zip(found, same, strict=True):
            as_is = next(other for other in of_case if other[:2] == (count.layout, AS_IS))
            now, before = (which.step_bytes(case, memory) for which in (count, as_is))
            cells.append(f"{now / case.weights:.2f} ({now / before:.2f})")
        rows.append([*same[0][:2], *cells])
    return rows


def _write(path: Path, counted: Sequence[tuple[Case, list[Count]]]) -> None:
    """Write a row for each case and arrangement: live lines, mask bytes and bytes of a step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("version", "network", "masks", "sparsity", "layout", "arrangement", "weights"),
                *(f"live_{width}" for width in WIDTHS),
                *(f"mask_bytes_{width}" for width in WIDTHS),
                *(f"{memory.name}_bytes" for memory in MEMORIES),
            ]
        )
        for case, of_case in counted:
            for count in of_case:
                writer.writerow(
                    [
                        *(sk.__version__, *case[:3], *count[:2], case.weights),
                        *(count.live[width] for width in WIDTHS),
                        *(count.mask_bytes[width] for width in WIDTHS),
                        *(count.step_bytes(case, memory) for memory in MEMORIES),
                    ]
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*fan-in is concentrated")
    sys.exit(main())
