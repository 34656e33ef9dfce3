"""Boolean masks that live in the model: making them, finding them again, asking about them.

What a kernel derives from a mask (packed bits, lists of active blocks) is the kernel's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .layers import Neurons, maskable_weights, neurons_of
from .topology.densities import Distribution, layer_densities
from .topology.seeding import generator

Correction = Literal["layer", "unnormalized", "none"]


class Masks(Mapping[Parameter, Tensor]):
    """The masks registered in a model, by parameter, in model order.

    A mask is a boolean buffer ``<name>_mask`` (True = active) beside the parameter ``<name>``, of its
    shape and on its device. ``Masks`` only refers to those buffers: it holds no copy, so
    ``model.to()``, ``load_state_dict`` and writes in place are all seen through it.

    Args:
        model: a module in which :func:`sparsify` (or the user) has registered masks: the trained model,
            its ``deepcopy``, or one that was unpickled.

    Raises:
        ValueError: the model has no mask, or a mask's dtype is not bool or its shape not the parameter's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[Parameter, tuple[str, nn.Module, str]] = {}
        for module_name, module in model.named_modules():
            for attribute, parameter in module._parameters.items():
                mask = module._buffers.get(f"{attribute}_mask")
                if parameter is None or mask is None or parameter in self._places:
                    continue
                name = f"{module_name}.{attribute}" if module_name else attribute
                check_mask(mask, parameter, name)
                self._places[parameter] = (name, module, f"{attribute}_mask")
        if not self._places:
            raise ValueError(
                "the model has no mask: call sparsify(model, sparsity=...) first, "
                "or register a boolean buffer weight_mask beside a weight"
            )

    def __getitem__(self, parameter: Parameter) -> Tensor:
        return _buffer(*self._places[parameter])

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def tensors(self) -> list[Tensor]:
        """All masks, in the order of iteration: ``list(self.values())``, sooner."""
        tensors = [module._buffers.get(buffer) for _, module, buffer in self._places.values()]
        if any(tensor is None for tensor in tensors):
            return list(self.values())  # raises
        return cast("list[Tensor]", tensors)

    # Mapping compares items, and comparing tensors gives tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def named(self) -> dict[str, Parameter]:
        """The masked parameters by their qualified name in the model."""
        return {name: parameter for parameter, (name, _, _) in self._places.items()}

    def neurons(self, parameter: Parameter) -> Neurons:
        """Which dimension of a masked parameter counts its neurons."""
        return neurons_of(self._places[parameter][1])

    def fan_in(self, parameter: Parameter) -> Tensor:
        """The number of active weights of each neuron: int64, of shape ``(neurons,)``."""
        return fan_in(self[parameter], self.neurons(parameter))

    def nnz(self) -> int:
        """The number of active weights in all masks."""
        return sum(int(mask.count_nonzero()) for mask in self.values())

    def sparsity(self) -> float:
        """The fraction of the masked parameters' weights that is inactive, in [0, 1]."""
        return 1.0 - self.nnz() / max(1, sum(mask.numel() for mask in self.values()))

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.nnz()} active weights, sparsity {self.sparsity():.4f})"


def _buffer(name: str, module: nn.Module, buffer: str) -> Tensor:
    mask = module._buffers.get(buffer)
    if mask is None:
        raise ValueError(f"the mask of {name!r} is gone from the model: make Masks(model) anew")
    return mask


def fan_in(mask: Tensor, neurons: Neurons) -> Tensor:
    """``fan_in_i``, the number of active weights of each neuron: int64, of shape ``(neurons,)``."""
    return mask.reshape(neurons.grid(mask.shape)).count_nonzero(dim=(1, 3)).flatten()


def correction_factors(mask: Tensor, neurons: Neurons, correction: Correction = "layer") -> Tensor:
    """``c_i``, what the gradient of each neuron is multiplied by: float64, broadcasts against the mask.

    ``"layer"`` is Eq. 12, ``sqrt((1 - s_i) / (1 - s_avg)) = sqrt(fan_in_i / mean fan_in)``: exactly 1
    where all neurons have the same fan-in. ``"unnormalized"`` is ``sqrt(1 - s_i)``, the preconditioner D
    of section 4.1 alone. ``"none"`` is 1. An empty neuron of a mask that is not empty gets 0.
    """
    counts = fan_in(mask, neurons).double()
    if correction == "none":
        factors = torch.ones_like(counts)
    else:
        full = mask.numel() / max(1, counts.numel())
        divisor = counts.mean() if correction == "layer" else full
        factors = (counts / divisor).nan_to_num(0.0).sqrt()
    groups, segments, per_group, _ = neurons.grid(mask.shape)
    leading = mask.shape[: neurons.dim + 1]
    factors = factors.view(groups, 1, per_group).expand(groups, segments, per_group).reshape(leading)
    return factors.view(leading + (1,) * (mask.ndim - len(leading)))


def check_mask(mask: Tensor, parameter: Tensor, name: str) -> None:
    """Raise ``ValueError``, naming the parameter, unless ``mask`` is a mask for it."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask for {name!r} is a {type(mask).__name__}, it must be a boolean tensor")
    if mask.shape != parameter.shape:
        raise ValueError(
            f"mask for {name!r} has shape {tuple(mask.shape)}, the parameter has {tuple(parameter.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask for {name!r} has dtype {mask.dtype}, it must be torch.bool")
    if mask.layout is not torch.strided:
        raise ValueError(f"mask for {name!r} has layout {mask.layout}, it must be torch.strided")
    if mask.is_inference():
        raise ValueError(f"mask for {name!r} was made under torch.inference_mode: changes to it go unseen")
    if mask.device != parameter.device:
        raise ValueError(f"mask for {name!r} is on {mask.device}, the parameter is on {parameter.device}")


def sparsify(
    model: nn.Module,
    sparsity: float,
    distribution: Distribution = "erk",
    *,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Masks:
    """Give the maskable weights of a model random masks, and zero what lies outside them.

    Each layer gets exactly ``round(density * numel)`` active weights, uniformly at random, so that the
    fan-in differs from neuron to neuron. The masks are registered as persistent boolean buffers
    ``weight_mask`` and travel with ``state_dict``, ``.to()``, ``deepcopy`` and checkpoints. They are
    drawn on the CPU: the same on every device and every rank.

    Args:
        model: masked in place: ``Linear``, ``Conv1d-3d`` and ``ConvTranspose1d-3d`` weights.
        sparsity: fraction of the maskable weights to switch off, in [0, 1).
        distribution: how the layers share it: ``"erk"``, ``"er"`` or ``"uniform"``
            (see :func:`layer_densities`).
        exclude: layers to leave dense, by name or shell-style pattern (``"fc"``, ``"layer1.*"``).
        seed: of the random masks.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), ``distribution`` is unknown, a pattern of ``exclude``
            matches nothing, the model has nothing to mask, or it is masked already.
    """
    weights = list(maskable_weights(model, exclude))
    if not weights:
        raise ValueError("model has nothing to mask: no Linear, Conv or ConvTranspose weight is left")
    for name, module, attribute, _, _ in weights:
        if hasattr(module, f"{attribute}_mask"):
            raise ValueError(
                f"{name!r} has a mask already ({attribute}_mask): "
                "use Masks(model) for the masks of a masked model"
            )
    densities = layer_densities({w.name: tuple(w.parameter.shape) for w in weights}, sparsity, distribution)
    for layer, (name, module, attribute, parameter, _) in enumerate(weights):
        active = round(densities[name] * parameter.numel())
        order = torch.randperm(parameter.numel(), generator=generator(seed, layer, 0))
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[order[:active]] = True
        mask = mask.view(parameter.shape).to(parameter.device)
        module.register_buffer(f"{attribute}_mask", mask)
        with torch.no_grad():
            parameter.masked_fill_(~mask, 0.0)
    return Masks(model)
