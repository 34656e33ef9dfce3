"""Which parameters of a model can be masked.

Nothing here knows of masks, densities or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import Parameter, UninitializedParameter

from .neurons import Neurons
from .user_warning import warn

_DIM_0_IS_NEURONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DIM_1_IS_NEURONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class MaskableWeight(NamedTuple):
    """A weight that ``sparsify`` may mask: ``parameter`` is ``module``'s attribute ``attribute``."""

    name: str
    module: nn.Module
    attribute: str
    parameter: Parameter
    neurons: Neurons


def neurons_of(module: nn.Module) -> Neurons:
    """Where the neurons of ``module.weight`` lie; dimension 0 for a module of unknown type."""
    if isinstance(module, _DIM_1_IS_NEURONS):
        return Neurons(dim=1, groups=module.groups)
    return Neurons()


def pruned_by_pytorch(module: nn.Module) -> list[str]:
    """The tensors of ``module`` itself that ``torch.nn.utils.prune`` computes, by name.

    Such a ``weight`` is a plain attribute, the product of the parameter ``weight_orig`` and the buffer
    ``weight_mask``, which has the weight's dtype.
    """
    names = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
    return [n for n in names if f"{n}_mask" in module._buffers and n not in module._parameters]


class Exclusion:
    """The layers that a caller leaves out, by name or shell-style pattern, and which patterns were met.

    Raises:
        TypeError: ``patterns`` is a single string.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        if isinstance(patterns, str):
            raise TypeError(
                f"exclude must be a sequence of names, not one string: use exclude=({patterns!r},)"
            )
        self._patterns = tuple(patterns)
        self._met: set[str] = set()

    def has(self, *names: str) -> bool:
        """Whether a pattern matches one of the names of a weight."""
        hits = {pattern for pattern in self._patterns if any(fnmatchcase(n, pattern) for n in names)}
        self._met |= hits
        return bool(hits)

    def check_all_met(self) -> None:
        """Raise ``ValueError`` for a pattern that has matched nothing: it is misspelt."""
        for pattern in self._patterns:
            if pattern not in self._met:
                raise ValueError(f"exclude has {pattern!r}, which matches no maskable weight")


def maskable_weights(model: nn.Module, exclude: Sequence[str] = ()) -> Iterator[MaskableWeight]:
    """The weights of all ``Linear``, ``Conv1d-3d`` and ``ConvTranspose1d-3d`` layers, in model order.

    A weight shared by several layers is yielded once, under its first name. Biases and normalisation
    parameters are never among them. A layer whose weight is computed (parametrized, pruned) is left out,
    with a warning.

    Args:
        model: any module.
        exclude: names, or shell-style patterns, of layers (``"fc"``, ``"layer1.*"``) or of their
            weights (``"fc.weight"``) to leave out.

    Raises:
        TypeError: ``exclude`` is a single string.
        ValueError: a pattern of ``exclude`` matches no maskable weight; a weight is not initialised yet
            (a lazy layer before its first forward pass).
    """
    exclusion = Exclusion(exclude)
    seen = set()
    for module_name, module in model.named_modules():
        if not isinstance(module, _DIM_0_IS_NEURONS + _DIM_1_IS_NEURONS):
            continue
        # A parametrized layer (weight_norm, ...) computes its weight: there is no parameter to mask.
        parameter = module._parameters.get("weight")
        if parameter is None:
            pruned = "weight" in pruned_by_pytorch(module)
            reason = "pruned by torch.nn.utils.prune" if pruned else "parametrized"
            warn(f"layer {module_name!r} is left out: its weight is not a parameter ({reason})")
            continue
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        name = f"{module_name}.weight" if module_name else "weight"
        if exclusion.has(module_name, name):
            continue
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name!r} is not initialised yet: run one forward pass before masking the model"
            )
        yield MaskableWeight(name, module, "weight", parameter, neurons_of(module))
    exclusion.check_all_met()
