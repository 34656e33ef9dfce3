"""SparseOpt: a fused, mask-aware SGD for sparse training in PyTorch."""

import warnings

try:
    with warnings.catch_warnings():
        # Nothing here needs NumPy but the extra `train`, which asks for it.
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "sparseopt_kernels needs PyTorch 2.6 or newer: pip install torch (see https://pytorch.org), "
        "then `sparseopt doctor` says: cpu tensors go to: cpu",
        name="torch",
    ) from None

from ._version import __version__
from .finished.apply_masks import apply_masks
from .finished.finalize import finalize
from .finished.load_dense import load_dense
from .finished.to_sparse import to_sparse
from .kernels import build_info
from .masks.feeding_norm import layers_feeding_norm
from .masks.mapping import Masks
from .optimizer import SparseOpt
from .schedules import warmup_cosine
from .topology.densities import layer_densities
from .topology.dynamic_sparse_training import DynamicSparseTraining
from .topology.gmp import GMP
from .topology.rigl import RigL
from .topology.set import SET
from .topology.sparsify import sparsify

__all__ = [
    "GMP",
    "SET",
    "DynamicSparseTraining",
    "Masks",
    "RigL",
    "SparseOpt",
    "__version__",
    "apply_masks",
    "build_info",
    "finalize",
    "layer_densities",
    "layers_feeding_norm",
    "load_dense",
    "sparsify",
    "to_sparse",
    "warmup_cosine",
]


def __dir__() -> list[str]:
    """Return the public names, and not those of modules."""
    return sorted(__all__)
