"""``sparsify``: chooses the first masks of a network, checks everything, and then writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..finished.load_dense import register_load_advice, remove_load_advice
from ..masks.layers import MaskableWeight, maskable_weights, names_of_parameters
from ..masks.mapping import Masks, check_model
from ..masks.registered_masks import masked_parameters
from ..masks.shared_memory import overlapping_pairs
from ..neurons import fan_in
from ..sharding import check_sharding, local_part, reshard, sharded_like
from ..user_warning import warn
from .densities import Distribution, check_request, share_densities
from .initial_masks import Init, check_min_fan_in, initial_mask
from .seeding import generator
from .sparsify_notices import notice_of_dead_neurons, notice_of_dense_weights, notice_of_zeros


def sparsify(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    distribution: Distribution | None = None,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    init: Init = "random",
    min_fan_in: int = 0,
    seed: int = 0,
) -> Masks:
    """Make a model sparse: give its weights masks, in place, and zero the weights outside them.

    Masked are the weights of ``Linear``, ``Conv1d-3d`` and ``ConvTranspose1d-3d`` layers, and those that
    ``include`` names. A warning says which other weights stay dense. A layer whose weight is computed
    (parametrized, or pruned by ``torch.nn.utils.prune``) is left out, with a warning.

    Each layer gets exactly ``round(density * numel)`` active weights (:func:`layer_densities`), and at least
    one. They are chosen uniformly at random, so that the fan-in differs from neuron to neuron, or are those
    of largest magnitude. Random masks are drawn on the CPU: they are the same on every device and every rank,
    with the native library or without.

    The masks are registered as persistent boolean buffers ``weight_mask``. ``state_dict``, ``.to()``,
    ``deepcopy`` and checkpoints carry them.

    Call it before or after ``fully_shard`` (FSDP2), on every rank alike. After it, each rank draws the mask
    of a layer and keeps its rows of it. Nothing is sent, except with ``init="magnitude"``, which gathers one
    layer after the other.

    Args:
        model: masked in place. Layers that have masks already keep them, if ``exclude`` or ``sparsity``
            leaves them out.
        sparsity: fraction of the weights that becomes inactive, in [0, 1). Or a dict with the sparsity of
            each layer: ``{"layer1.*": 0.8, "fc": 0.5}``. Its keys are names of layers or weights, or
            shell-style patterns. The first that matches counts; a weight that none matches gets no mask.
        distribution: how the layers share the active weights: ``"erk"`` (the default), ``"er"`` or
            ``"uniform"`` (see :func:`layer_densities`). Leave it out if ``sparsity`` is a dict.
        exclude: layers to leave dense, by name or shell-style pattern (``"fc"``, ``"layer1.*"``).
        include: weights of other layers to mask as well, by name or pattern:
            ``("self_attn.in_proj_weight", "*.wte.weight")``. Their buffers are named after the attribute
            (``in_proj_weight_mask``). Their neurons are counted by dimension 0 (in ``Embedding`` a neuron is
            a token, in the stacked weights of attention and LSTM an output), in Hugging Face's ``Conv1D`` by
            dimension 1. Parameters of one dimension are never masked. ``exclude`` takes precedence.
        init: ``"random"``, or ``"magnitude"`` for the weights of largest absolute value (of equal ones, those
            of lower index). Use ``"magnitude"`` for a trained model: random masks throw away most of what it
            has learnt. There is a warning only if it was sparse: else it cannot be seen that it was trained.
        min_fan_in: the least number of active weights of each neuron. The number of active weights of a layer
            does not change.
        seed: of the random masks.

    Returns:
        The masks of the whole model.

    Raises:
        ValueError: a sparsity is outside [0, 1), another argument is not as described, a pattern matches
            nothing, the model has nothing to mask, or a layer is masked already, has another attribute of the
            mask's name, has too few active weights for ``min_fan_in``, is on the meta device, or shares its
            memory with another. The model is as it was before.
        TypeError: ``exclude`` or ``include`` is a single string; ``sparsity`` is no number or mapping.

    Warns:
        UserWarning: weights are left dense or left out; neurons have no active weight; most weights under
            random masks are 0 already; a masked weight shares its memory with one that is not.
    """
    check_model(model)
    reshard(model)  # else the weights of FSDP2 that are gathered would be masked
    check_request(sparsity, distribution)
    _check_choice(init, min_fan_in)
    names = names_of_parameters(model)
    weights = maskable_weights(model, exclude, include)
    densities = share_densities(
        {w.name: tuple(w.parameter.shape) for w in weights},
        {w.name: names[w.parameter] for w in weights},
        sparsity,
        distribution,
    )
    weights = [weight for weight in weights if weight.name in densities]
    pairs = [place.both() for place in masked_parameters(model)]
    masked = {parameter for parameter, mask in pairs if mask.shape == parameter.shape}
    _check_places(weights, masked)
    _check_memory(model, weights, masked)
    counts = [round(densities[w.name] * w.parameter.numel()) for w in weights]
    for weight, active in zip(weights, counts, strict=True):
        check_min_fan_in(weight, active, min_fan_in)
    masks, dead, zeros = [], {}, {}
    for layer, (weight, active) in enumerate(zip(weights, counts, strict=True)):
        mask = initial_mask(weight, active, init, min_fan_in, generator(seed, layer, 0))
        if mask.numel() > 0:
            fan_ins = fan_in(mask, weight.neurons)
            dead[weight.name] = int((fan_ins == 0).sum()), fan_ins.numel()
        masks.append(sharded_like(mask, weight.parameter))
        if init == "random":
            zeros[weight.name] = _zeros_among(weight.parameter, masks[-1])
    dense = notice_of_dense_weights(model, {*masked, *(w.parameter for w in weights)}, exclude, sparsity)
    for notice in (dense, notice_of_dead_neurons(dead), notice_of_zeros(zeros)):
        if notice is not None:
            warn(notice)
    return _register(model, weights, masks)


def _zeros_among(parameter: Parameter, mask: Tensor) -> tuple[int, int]:
    """Return how many active weights are 0, and how many there are; of sharded ones, in this rank's rows.

    In a weight of zeros, which is initialised so, none counts.
    """
    weight, active = local_part(parameter.detach()), local_part(mask)
    zeros = (active & (weight == 0)).count_nonzero() if weight.any() else 0
    return int(zeros), int(active.count_nonzero())


def _check_choice(init: Init, min_fan_in: int) -> None:
    if init not in get_args(Init):
        raise ValueError(f"init is {init!r}, it must be one of {get_args(Init)}")
    if not isinstance(min_fan_in, Integral) or isinstance(min_fan_in, bool) or min_fan_in < 0:
        raise ValueError(f"min_fan_in is {min_fan_in!r}, it must be an integer of at least 0")


def _check_places(weights: Sequence[MaskableWeight], masked: set[Parameter]) -> None:
    """Raise ``ValueError``, naming the layer, unless a mask can be put beside each weight."""
    for name, module, attribute, parameter, _ in weights:
        place = getattr(module, f"{attribute}_mask", None)
        is_foreign = isinstance(place, Tensor) and place.dtype != torch.bool
        if parameter in masked and not is_foreign:
            raise ValueError(
                f"{name!r} has a mask already ({attribute}_mask): "
                "use Masks(model) for the masks of a masked model. To mask other layers beside it, "
                "name it in exclude, or give sparsity by layer"
            )
        if hasattr(module, f"{attribute}_mask"):
            kind = f"{place.dtype} tensor" if isinstance(place, Tensor) else type(place).__name__
            raise ValueError(
                f"{name!r} cannot be masked: its layer has an attribute {attribute}_mask that is something "
                f"else ({kind}). Rename it, or exclude the layer"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device, and has no values to mask: call sparsify after "
                "model.to_empty(device=...) and the initialisation of the weights"
            )
        check_sharding([parameter], {parameter: name})
        if parameter.layout is not torch.strided:
            raise ValueError(f"{name!r} has layout {parameter.layout}, it must be torch.strided")
        if any(n > 1 and step == 0 for n, step in zip(parameter.shape, parameter.stride(), strict=True)):
            raise ValueError(f"elements of {name!r} share memory (torch.expand): clone it before masking")


def _check_memory(model: nn.Module, weights: Sequence[MaskableWeight], masked: set[Parameter]) -> None:
    """Raise ``ValueError`` where two masks would be about the same memory, and warn where one would be about
    memory of a parameter that has none."""
    ours = {weight.parameter for weight in weights}
    names, parameters = [], []
    for name, parameter in model.named_parameters():
        # Of other types (lazy, distributed) the address says nothing.
        if type(parameter) is Parameter and parameter.layout is torch.strided and not parameter.is_meta:
            names.append(name)
            parameters.append(parameter)
    for i, j in overlapping_pairs(parameters):
        pair = {parameters[i], parameters[j]}
        if not pair & ours:
            continue
        what = f"{names[i]!r} and {names[j]!r} share memory, but are different parameters"
        advice = "Share the parameter itself (one.weight = other.weight)"
        if pair <= ours | masked:
            raise ValueError(
                f"{what}: a mask of each would be about the same memory. {advice}, or exclude one of them "
                "that no optimizer updates, or both"
            )
        warn(
            f"{what}, and only one of them is masked: the mask zeroes the other one, too, and an optimizer "
            f"that updates the other writes outside the mask. {advice}, or exclude both"
        )


def _register(model: nn.Module, weights: Sequence[MaskableWeight], masks: Sequence[Tensor]) -> Masks:
    """Put the masks into the model, and zero what lies outside them; if that fails, take them out again."""
    registered: list[tuple[nn.Module, str]] = []
    try:
        for weight, mask in zip(weights, masks, strict=True):
            weight.module.register_buffer(f"{weight.attribute}_mask", mask)
            registered.append((weight.module, f"{weight.attribute}_mask"))
            register_load_advice(weight.module)
        found = Masks(model)
        with torch.no_grad():
            parts = [local_part(weight.parameter) for weight in weights]
            for part in parts:  # writes nothing, and raises for what cannot be written
                part.masked_fill_(torch.zeros_like(part, dtype=torch.bool), 0.0)
            for part, mask in zip(parts, masks, strict=True):
                part.masked_fill_(~local_part(mask), 0.0)
    except BaseException:
        for module, buffer in registered:
            delattr(module, buffer)
            remove_load_advice(module)
        raise
    return found
