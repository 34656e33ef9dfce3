"""The random masks that a network starts with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..layers import maskable_weights
from ..masks import Masks
from .densities import Distribution, layer_densities
from .random_choice import choose_random, draw_seed
from .seeding import generator


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
    drawn on the CPU: the same on every device and every rank, with the native library or without.

    A layer whose weight is computed (parametrized, or pruned by ``torch.nn.utils.prune``) is left out, with
    a warning.

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
        TypeError: ``exclude`` is a single string.
    """
    weights = list(maskable_weights(model, exclude))
    for name, module, attribute, _, _ in weights:
        if hasattr(module, f"{attribute}_mask"):
            raise ValueError(
                f"{name!r} has a mask already ({attribute}_mask): "
                "use Masks(model) for the masks of a masked model"
            )
    densities = layer_densities({w.name: tuple(w.parameter.shape) for w in weights}, sparsity, distribution)
    for layer, (name, module, attribute, parameter, _) in enumerate(weights):
        active = round(densities[name] * parameter.numel())
        mask = choose_random(parameter.numel(), active, draw_seed(generator(seed, layer, 0)))
        mask = mask.view(parameter.shape).to(parameter.device)
        module.register_buffer(f"{attribute}_mask", mask)
        with torch.no_grad():
            parameter.masked_fill_(~mask, 0.0)
    return Masks(model)
