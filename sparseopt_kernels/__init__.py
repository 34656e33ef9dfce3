"""SparseOpt: a fused, mask-aware SGD for sparse training in PyTorch."""

from ._version import __version__
from .averaged import apply_masks
from .dense_checkpoint import load_dense
from .feeding_norm import layers_feeding_norm
from .finalized import finalize
from .kernels import build_info
from .masks import Masks
from .optimizer import SparseOpt
from .schedules import warmup_cosine
from .sparse_copy import to_sparse
from .topology.densities import layer_densities
from .topology.dynamic import SET, RigL
from .topology.sparsify import sparsify

__all__ = [
    "SET",
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
