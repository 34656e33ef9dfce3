"""The parameters of a model that can be masked, and where their neurons lie.

Nothing here knows of masks, densities or optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import Parameter, UninitializedParameter

from ..neurons import Neurons
from ..user_warning import warn
from .patterns import Patterns

_DIM_0_IS_NEURONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DIM_1_IS_NEURONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_USUAL = _DIM_0_IS_NEURONS + _DIM_1_IS_NEURONS
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # the others have parameters of one dimension alone


class MaskableWeight(NamedTuple):
    """A weight that ``sparsify`` may mask: ``parameter`` is ``module``'s attribute ``attribute``."""

    name: str
    module: nn.Module
    attribute: str
    parameter: Parameter
    neurons: Neurons

    def is_usual(self) -> bool:
        """Return True for the weight of a ``Linear``, ``Conv1d-3d`` or ``ConvTranspose1d-3d`` layer, which is
        masked without being named in ``include``."""
        return self.attribute == "weight" and isinstance(self.module, _USUAL)


def neurons_of(module: nn.Module) -> Neurons:
    """Return the dimension of ``module``'s weights that counts its neurons.

    It is dimension 1 for ``ConvTranspose1d-3d``, and for ``Conv1D`` of Hugging Face's transformers, whose
    weight is ``(in, out)``. It is dimension 0 for all others: ``Linear`` and ``Conv1d-3d``; the stacked
    weights of ``MultiheadAttention`` and ``LSTM``, which have a row for each output; ``Embedding``, where a
    row is the vector of one token, as in the classifier that often shares its weight; and modules of unknown
    type.
    """
    if isinstance(module, _DIM_1_IS_NEURONS):
        return Neurons(dim=1, groups=module.groups)
    # By name: transformers need not be installed.
    if ("transformers.pytorch_utils", "Conv1D") in ((c.__module__, c.__name__) for c in type(module).__mro__):
        return Neurons(dim=1)
    return Neurons()


def pruned_by_pytorch(module: nn.Module) -> list[str]:
    """Return the names of the tensors of ``module`` itself that ``torch.nn.utils.prune`` computes.

    Such a ``weight`` is a plain attribute, the product of the parameter ``weight_orig`` and the buffer
    ``weight_mask``, which has the weight's dtype.
    """
    names = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
    return [n for n in names if f"{n}_mask" in module._buffers and n not in module._parameters]


def all_weights(model: nn.Module) -> list[MaskableWeight]:
    """Return the weights of a model that can be masked, in model order: the usual ones, and all other
    parameters of two dimensions or more.

    A weight that several layers share comes once, at its first usual place if it has one. Left out are
    biases, normalisation parameters, parameters with at most one dimension longer than 1, and those from
    which a layer computes its weight (parametrized, pruned).
    """
    found: dict[Parameter, MaskableWeight] = {}
    computed = {id(part) for module in _computed(model).values() for part in module.modules()}
    for module_name, module in model.named_modules():
        if id(module) in computed:
            continue
        neurons = neurons_of(module)
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            weight = MaskableWeight(
                name=qualified_name(module_name, attribute),
                module=module,
                attribute=attribute,
                parameter=parameter,
                neurons=neurons,
            )
            if not (weight.is_usual() or _is_other_weight(weight)):
                continue
            if parameter not in found:
                found[parameter] = weight
            elif weight.is_usual() and not found[parameter].is_usual():
                del found[parameter]  # so that it comes at its usual place
                found[parameter] = weight
    return list(found.values())


def names_of_parameters(model: nn.Module) -> dict[Parameter, list[str]]:
    """Return the names that a pattern may match for each parameter: its own and its layer's, wherever it is
    used."""
    names: dict[Parameter, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, []).extend((module_name, qualified_name(module_name, attribute)))
    return names


def maskable_weights(
    model: nn.Module, exclude: Sequence[str] = (), include: Sequence[str] = ()
) -> list[MaskableWeight]:
    """Return the weights that ``sparsify`` masks, in model order.

    They are the weights of all ``Linear``, ``Conv1d-3d`` and ``ConvTranspose1d-3d`` layers and those that
    ``include`` adds, without those that ``exclude`` names. A weight that several layers share comes once, and
    is found by each of its names. A layer whose weight is computed (parametrized, pruned) is left out, with a
    warning unless ``exclude`` names it.

    Args:
        model: any module.
        exclude: names, or shell-style patterns, of layers (``"fc"``, ``"layer1.*"``) or of their
            weights (``"fc.weight"``) to leave out.
        include: names or patterns of weights of other layers to add (``"self_attn.in_proj_weight"``,
            ``"*.wte"``). Weights that ``exclude`` names as well are left out.

    Raises:
        TypeError: ``exclude`` or ``include`` is a single string, or holds something that is no string.
        ValueError: a pattern matches no maskable weight; a weight is not initialised yet (a lazy layer before
            its first forward pass).
    """
    excluded, included = Patterns("exclude", exclude), Patterns("include", include)
    names = names_of_parameters(model)
    for name, module in _computed(model).items():
        if not excluded.match((name, qualified_name(name, "weight"))):
            if "weight" in pruned_by_pytorch(module):
                warn(f"layer {name!r} is left out: torch.nn.utils.prune has given it a mask already")
            else:
                warn(f"layer {name!r} is left out: its weight is not a parameter (parametrized)")
    chosen = []
    for weight in all_weights(model):
        # Both are called for every weight, because Patterns records what has matched.
        is_included = included.match(names[weight.parameter])
        is_excluded = excluded.match(names[weight.parameter])
        if not is_excluded and (is_included or weight.is_usual()):
            chosen.append(weight)
    excluded.check_all_met()
    included.check_all_met(
        ": parameters of one dimension, biases and normalisation parameters are never masked"
    )
    for weight in chosen:
        if isinstance(weight.parameter, UninitializedParameter):
            raise ValueError(
                f"{weight.name!r} is not initialised yet: run one forward pass before masking the model"
            )
    return chosen


def _computed(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers, by name, whose usual weight is computed from other tensors and is no parameter."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _USUAL) and module._parameters.get("weight") is None
    }


def _is_other_weight(weight: MaskableWeight) -> bool:
    """Tell if ``include`` may add this weight, which is not a usual one."""
    _, module, attribute, parameter, _ = weight
    if isinstance(module, _NORMS) or attribute == "bias" or attribute.startswith("bias_"):
        return False
    if attribute.removesuffix("_orig") in pruned_by_pytorch(module):
        return False
    return not isinstance(parameter, UninitializedParameter) and sum(n > 1 for n in parameter.shape) > 1


def qualified_name(module_name: str, attribute: str) -> str:
    """Return the name of a parameter or buffer in the model."""
    return f"{module_name}.{attribute}" if module_name else attribute
