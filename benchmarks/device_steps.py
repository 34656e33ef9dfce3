"""Makes a few steps on a GPU with each backend and checks their results, for compute-sanitizer to look at.

    python benchmarks/device_steps.py

The layers are small, because each access is checked: rows of odd lengths, dense tensors, layers whose live
sectors are listed and others whose sectors are all visited. Masks are new, stay, and change.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run the code that is checked out

from sparseopt_kernels.kernels import BACKENDS
from sparseopt_kernels.lab.bench.checks import WRONG, References
from sparseopt_kernels.lab.bench.contestants import sparseopt
from sparseopt_kernels.lab.bench.network import Network, Shape

SHAPES: list[Shape] = [(16, 3, 3, 3), (16,), (40, 64), (7, 1001), (5000,), (3, 5001)]
SPARSITIES = (0.5, 0.97)
DTYPES = (torch.float32, torch.bfloat16)


def steps(backend: str, sparsity: float, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Make steps, and tell if the weights are right. Then the masks change; these steps are only made."""
    network = Network.of_shapes(SHAPES, sparsity, "uniform", device, dtype)
    contestant = sparseopt(network.copy(), backend, max_grad_norm=1.0)
    contestant.warm_up()
    is_right = References(network, {"max_grad_norm": 1.0}).are_met_by(contestant)
    for mask in network.masks.values():
        mask.copy_(mask.roll(1, dims=-1))
    contestant.step()
    contestant.step()
    return is_right


def main(device: torch.device | str = "cuda", backends: tuple[str, ...] = ("triton", "cuda")) -> int:
    """Make all steps and return the exit status: 1 if results are wrong or nothing runs."""
    here = [name for name in backends if BACKENDS[name].unavailable(torch.device(device)) is None]
    wrong = False
    for backend in here:
        for dtype in DTYPES:
            for sparsity in SPARSITIES:
                is_right = steps(backend, sparsity, dtype, device)
                wrong |= not is_right
                print(f"{backend}, {dtype}, sparsity {sparsity}: {'ok' if is_right else WRONG}", flush=True)
    if not here:
        print("No backend of SparseOpt runs on this device.")
    return 1 if wrong or not here else 0


if __name__ == "__main__":
    sys.exit(main())
