"""A copy of a masked model for inference on a CPU, with large sparse ``Linear`` weights in CSR."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..masks.registered_masks import MaskedParameter, masked_parameters
from ..user_warning import warn
from .finalize import Model, finalize

# Measured by `benchmarks/sparse_forward.py`: smaller or denser layers were slower for some batch sizes.
LEAST_WEIGHTS = 2**19
LARGEST_DENSITY = 0.1

_DTYPES = (torch.float32, torch.float64)  # the dtypes for which MKL has sparse products
_ROWS_AT_ONCE = 64  # rows of the input: more do not fit into the cache (2 to 7 times slower with 2048)
_PARTS = ("crow_indices", "col_indices", "values")


def to_sparse(model: Model) -> Model:
    """Return a copy of a model for inference on a CPU, whose large sparse ``Linear`` weights are CSR.

    The copy has no masks and is in eval mode; no parameter requires a gradient, and ``train()`` is an error.
    ``model`` is not changed. A layer becomes a :class:`~sparseopt_kernels.finished.to_sparse.SparseLinear`
    if its type is ``nn.Linear``, it is float32 or float64 on a CPU, and has at least 2**19 weights of which
    at most a tenth is not zero. All others stay dense, convolutions too: there CSR is slower, or does not
    exist.

    Weights that are zero count, masked or not: a finalized model is converted as well. Save the copy as a
    whole (``torch.save(sparse, path)``), or its ``state_dict``, which holds plain tensors and loads into the
    ``to_sparse`` copy of the same model with masks of the same sparsity.

    Args:
        model: with masks of :func:`sparsify` or ``torch.nn.utils.prune``, or with zeros in its weights.

    Raises:
        ValueError: a mask is not valid.

    Warns:
        UserWarning: all layers stay dense, because none is large and sparse enough, or because PyTorch was
            built without MKL; or as :func:`finalize`.
    """
    places = masked_parameters(model)
    sparse = copy.deepcopy(model, _memo(places))
    if places:
        finalize(sparse)
    sparse.eval().requires_grad_(False)
    if not _has_mkl():
        warn("PyTorch was built without MKL: to_sparse leaves all layers dense, CSR would be slower")
        return sparse
    converted: dict[Tensor, Tensor] = {}
    for module in [*sparse.modules()]:
        if type(module) is nn.Linear and _pays(module.weight):
            _convert(module, converted)
    if not converted:
        warn(
            "to_sparse leaves all layers dense: none is an nn.Linear on the CPU, of float32 or float64, with "
            f"at least {LEAST_WEIGHTS:,} weights and a density of at most {LARGEST_DENSITY}"
        )
    _read_no_weights(sparse)
    return sparse


class SparseLinear(nn.Linear):
    """A ``Linear`` layer for inference whose weight is ``torch.sparse_csr``.

    :func:`~sparseopt_kernels.to_sparse` makes it. ``weight`` is made of the buffers ``crow_indices``,
    ``col_indices`` (int32) and ``values``: PyTorch can neither copy nor convert a module with the CSR tensor
    itself. ``load_state_dict`` takes other active weights and another number of them.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A ``torch.sparse_csr`` tensor ``(out_features, in_features)`` that shares the buffers' memory."""
        shape = (self.out_features, self.in_features)
        # Indices are checked when they are loaded: a check in each call would cost more than the product.
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices, self.values, shape, check_invariants=False
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias`` in the dtype of the weight; autocast leaves it alone."""
        if torch.is_autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):
                return self._multiply(input.to(self.values.dtype))
        return self._multiply(input)

    def _multiply(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        weight = self.weight
        if rows.shape[0] == 1 and _has_mkl():
            product = linear(rows, weight, self.bias)
        else:
            product = torch.cat(
                [self._columns(weight, part).t() for part in torch.split(rows, _ROWS_AT_ONCE)]
            )
        return product.view(*input.shape[:-1], self.out_features)

    def _columns(self, weight: Tensor, rows: Tensor) -> Tensor:
        if self.bias is None:
            return weight @ rows.t()
        return torch.addmm(self.bias[:, None], weight, rows.t())

    def train(self, mode: bool = True) -> SparseLinear:
        """Do nothing for ``mode=False``.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            raise RuntimeError(
                "a model of to_sparse is for inference: train the masked model, then call to_sparse again"
            )
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.values.dtype not in _DTYPES:
            raise TypeError(f"a sparse weight must be float32 or float64, and became {self.values.dtype}")
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = {name: state_dict[prefix + name] for name in _PARTS if prefix + name in state_dict}
        reason = self._why_not(given)
        if reason is not None:  # the kernels would read beyond the memory of the input
            *_, error_msgs = rest
            error_msgs.append(f"the sparse weight {prefix}weight cannot be loaded: {reason}")
            state_dict = {key: t for key, t in state_dict.items() if key.removeprefix(prefix) not in _PARTS}
        elif given:
            for name in ("col_indices", "values"):  # the number of active weights may differ
                self._buffers[name] = getattr(self, name).new_empty(len(given[name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _why_not(self, parts: dict[str, Any]) -> str | None:
        """Return why ``parts`` do not form a weight of this layer; None if they do, or if there are none."""
        if not parts:
            return None
        if len(parts) < len(_PARTS):
            return f"it has {' and '.join(parts)}, it must have {', '.join(_PARTS)}"
        shape = (self.out_features, self.in_features)
        try:
            crow_indices, col_indices, values = (parts[name] for name in _PARTS)
            torch.sparse_csr_tensor(crow_indices, col_indices, values, shape, check_invariants=True)
        except (RuntimeError, TypeError) as error:
            return str(error)
        return None

    def extra_repr(self) -> str:
        """Return the description of ``nn.Linear``, and the number of active weights."""
        return f"{super().extra_repr()}, active={len(self.values)}"


def _memo(places: list[MaskedParameter]) -> dict[int, Any]:
    """Return a ``deepcopy`` memo with copies of the weights that ``torch.nn.utils.prune`` computes.

    ``deepcopy`` itself refuses tensors with an autograd history.
    """
    computed = [
        getattr(place.module, place.buffer.removesuffix("_mask")) for place in places if place.is_pruned
    ]
    return {id(tensor): tensor.detach().clone() for tensor in computed}


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def _pays(weight: Tensor) -> bool:
    """Tell if CSR is faster than dense for this weight."""
    if weight.dtype not in _DTYPES or weight.device.type != "cpu" or weight.numel() < LEAST_WEIGHTS:
        return False
    most = math.ceil(LARGEST_DENSITY * weight.numel())  # sparsify rounds the number of active weights
    return int(weight.count_nonzero()) <= most


def _convert(layer: nn.Linear, converted: dict[Tensor, Tensor]) -> None:
    """Turn a layer into a ``SparseLinear`` in place, so that its hooks and references to it stay valid.

    Args:
        converted: the CSR tensors made so far, by weight: layers may share a weight.
    """
    weight = layer.weight
    if weight not in converted:
        with warnings.catch_warnings():
            # PyTorch warns once per process that CSR is in beta; the warning would name this line.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            converted[weight] = weight.detach().to_sparse_csr()
    csr = converted[weight]
    del layer._parameters["weight"]
    layer.__class__ = SparseLinear
    # MKL uses 4-byte indices; others would be converted in each call.
    layer.register_buffer("crow_indices", csr.crow_indices().to(torch.int32))
    layer.register_buffer("col_indices", csr.col_indices().to(torch.int32))
    layer.register_buffer("values", csr.values())


def _read_no_weights(model: nn.Module) -> None:
    """Switch off the fused path of ``nn.Transformer`` in eval mode, which reads the weights of its layers as
    dense tensors instead of calling the layers."""
    for module in model.modules():
        if any(isinstance(part, SparseLinear) for part in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
