"""SparseOpt: a fused, mask-aware SGD for sparse training in PyTorch."""

from ._version import __version__
from .feeding_norm import layers_feeding_norm
from .kernels import build_info
from .masks import Masks
from .optimizer import SparseOpt
from .schedules import warmup_cosine
from .topology.densities import layer_densities
from .topology.dynamic import SET, RigL
from .topology.gmp import GMP
from .topology.sparsify import sparsify

__all__ = [
    "GMP",
    "SET",
    "Masks",
    "RigL",
    "SparseOpt",
    "__version__",
    "build_info",
    "layer_densities",
    "layers_feeding_norm",
    "sparsify",
    "warmup_cosine",
]
