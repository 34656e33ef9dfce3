"""How a network's budget of active weights is shared among its layers: uniform, ER, ERK.

Densities only; the masks are drawn in ``sparsify.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal, get_args

from torch import nn

from ..layers import Exclusion, maskable_weights

Distribution = Literal["uniform", "er", "erk"]


def layer_densities(
    model_or_shapes: nn.Module | Mapping[str, Sequence[int]],
    sparsity: float,
    distribution: Distribution = "erk",
    *,
    exclude: Sequence[str] = (),
) -> dict[str, float]:
    """The fraction of active weights of each layer, such that the network has the sparsity asked for.

    - ``"uniform"``: every layer has density ``1 - sparsity``.
    - ``"er"``, Erdős–Rényi (SET, Mocanu et al. 2018): ``eps * (n_out + n_in) / (n_out * n_in)``, of the
      two channel dimensions; the kernel size has no influence.
    - ``"erk"``, Erdős–Rényi kernel (RigL, Evci et al. 2020): ``eps * sum(shape) / prod(shape)``.

    ``eps`` is such that the total number of active weights is ``(1 - sparsity)`` times the number of
    weights. Layers that would get a density over 1 are made dense and ``eps`` is computed again for the
    others, until none is over 1. (A dense layer takes less than its share, so ``eps`` only grows: the
    order in which layers are made dense does not matter.) With ``round(density * numel)`` weights per
    layer the total is within one weight per layer of the request.

    Args:
        model_or_shapes: a model, of which the maskable weights count (``Linear``, ``Conv1d-3d``,
            ``ConvTranspose1d-3d``), or the weights' shapes by name, as PyTorch stores them:
            ``(out, in, *kernel)``.
        sparsity: fraction of all these weights, less the excluded ones, that is inactive, in [0, 1).
        distribution: ``"uniform"``, ``"er"`` or ``"erk"``.
        exclude: layers to leave out, by name or shell-style pattern, as in :func:`sparsify` (``"fc"``,
            ``"layer1.*"``); of shapes, the names are those given.

    Returns:
        The density of each layer, in [0, 1], by weight name, in the order given, without those excluded.
        A weight without elements has the density ``1 - sparsity``.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1) or NaN, ``distribution`` is unknown, a pattern of
            ``exclude`` matches nothing, a shape has fewer than two dimensions or a negative one, or there
            is nothing to mask.
        TypeError: ``exclude`` is a single string.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}, it must be in [0, 1)")
    if distribution not in get_args(Distribution):
        raise ValueError(f"distribution is {distribution!r}, it must be one of {get_args(Distribution)}")
    if isinstance(model_or_shapes, nn.Module):
        weights = list(maskable_weights(model_or_shapes, exclude))
        shapes = {weight.name: tuple(weight.parameter.shape) for weight in weights}
    else:
        exclusion = Exclusion(exclude)
        shapes = {name: tuple(shape) for name, shape in model_or_shapes.items() if not exclusion.has(name)}
        exclusion.check_all_met()
    if not shapes:
        raise ValueError("nothing to mask: no Linear, Conv or ConvTranspose weight is left")
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape) < 0:
            raise ValueError(f"shape of {name!r} is {shape}, it must be (out, in, *kernel)")

    densities = dict.fromkeys(shapes, 1.0 - sparsity)
    if distribution == "uniform" or sparsity == 0.0:
        return densities
    numels = {name: prod(shape) for name, shape in shapes.items() if prod(shape) > 0}
    share = _erk_share if distribution == "erk" else _er_share
    densities.update(_fill({name: share(shapes[name]) for name in numels}, numels, 1.0 - sparsity))
    return densities


def _er_share(shape: Sequence[int]) -> int:
    """``numel * (n_out + n_in) / (n_out * n_in)``: what a layer gets for each unit of eps."""
    return (shape[0] + shape[1]) * prod(shape[2:])


def _erk_share(shape: Sequence[int]) -> int:
    """``numel * sum(shape) / prod(shape)``: what a layer gets for each unit of eps."""
    return sum(shape)


def _fill(shares: dict[str, int], numels: dict[str, int], density: float) -> dict[str, float]:
    """Share ``density`` of all weights in proportion to ``shares``, with no layer over its ``numel``."""
    budget = density * sum(numels.values())
    sparse = dict(shares)
    while sparse:
        eps = budget / sum(sparse.values())
        full = [name for name, share in sparse.items() if eps * share > numels[name]]
        if not full:
            break
        for name in full:
            budget -= numels[name]
            del sparse[name]
    return {name: eps * sparse[name] / numels[name] if name in sparse else 1.0 for name in shares}
