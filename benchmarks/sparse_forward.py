"""The time of a forward pass and the size on disk of a ``Linear`` layer, dense and as CSR of ``to_sparse``:
``make sparse-forward``.

For each layer, sparsity and number of threads it prints median milliseconds, dense and CSR, and their ratio;
then the size of the saved state dict. The thresholds of ``to_sparse`` are chosen by these figures.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Sequence

import torch
from torch import nn

from sparseopt_kernels import finalize, sparsify, to_sparse
from sparseopt_kernels.lab.machine import machine
from sparseopt_kernels.lab.timing import CpuTimer, Rounds, Turn, processor_share, take_turns
from sparseopt_kernels.text_table import aligned

_BATCHES = {1: 20, 32: 4, 256: 1}  # by batch size, the passes in a row that are timed together


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Dense and CSR forward passes of a Linear layer.")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1024, 4096], help="in and out (default: 1024 4096)"
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.99])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is timed (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        print("PyTorch was built without MKL: there are no sparse copies to measure")
        return 1
    times, sizes = [], []
    for size in options.sizes:
        for sparsity in options.sparsities:
            dense, sparse = _layers(size, sparsity)
            cells = (f"{size}x{size}", f"{sparsity:g}")
            sizes.append((*cells, _megabytes(dense), _megabytes(sparse)))
            for threads in options.threads:
                torch.set_num_threads(threads)
                row = [_cell(dense, sparse, batch, options.rounds) for batch in _BATCHES]
                times.append((*cells, str(threads), *row))
    print(f"{machine()}, PyTorch {torch.__version__}, float32, medians of {options.rounds}, in milliseconds")
    print(f"other programs left {processor_share():.0%} of a processor")
    header = ("layer", "sparsity", "threads", *(f"batch {batch}: dense, CSR" for batch in _BATCHES))
    print("\n".join(aligned([header, *times])))
    print()
    print("\n".join(aligned([("state dict, MB", "sparsity", "dense", "CSR"), *sizes])))
    return 0


def _layers(size: int, sparsity: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = nn.Linear(size, size)
    sparsify(layer, sparsity)
    sparse = to_sparse(layer)
    return finalize(layer).eval(), sparse


def _cell(dense: nn.Module, sparse: nn.Module, batch: int, rounds: int) -> str:
    x = torch.randn(batch, next(dense.parameters()).shape[1])
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-4)
        passes = _BATCHES[batch]
        turns = {"dense": Turn(lambda: dense(x), steps=passes), "csr": Turn(lambda: sparse(x), steps=passes)}
        found = take_turns(turns, CpuTimer(), Rounds(timed=rounds, warmup=2))
    dense_ms, csr_ms = found["dense"].p50_ms, found["csr"].p50_ms
    return f"{_short(dense_ms)} {_short(csr_ms)} ({dense_ms / csr_ms:.1f}x)"


def _short(ms: float) -> str:
    """Format with three digits."""
    return f"{ms:.{max(0, 2 - math.floor(math.log10(ms)))}f}"


def _megabytes(layer: nn.Module) -> str:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    return f"{len(file.getvalue()) / 1e6:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
