"""Densities: share the active weights of a network among its layers (uniform, ER, ERK).

The masks are drawn in ``sparsify.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from numbers import Real
from typing import Literal, get_args

from torch import nn

from ..masks.layers import maskable_weights, names_of_parameters
from ..masks.patterns import Patterns

Distribution = Literal["uniform", "er", "erk"]


def layer_densities(
    model_or_shapes: nn.Module | Mapping[str, Sequence[int]],
    sparsity: float | Mapping[str, float],
    distribution: Distribution | None = None,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
) -> dict[str, float]:
    """Return the fraction of active weights of each layer, such that the network has the sparsity asked for.

    - ``"uniform"``: every layer has density ``1 - sparsity``.
    - ``"er"``, Erdős–Rényi (SET, Mocanu et al. 2018): ``eps * (n_out + n_in) / (n_out * n_in)``, of the
      two channel dimensions; the kernel size has no influence.
    - ``"erk"``, Erdős–Rényi kernel (RigL, Evci et al. 2020): ``eps * sum(shape) / prod(shape)``.

    ``eps`` is such that the total number of active weights is ``(1 - sparsity)`` times the number of
    weights. Layers that would get a density over 1 are made dense and ``eps`` is computed again for the
    others, until none is over 1. (A dense layer takes less than its share, so ``eps`` only grows: the
    order in which layers are made dense does not matter.) A layer that would get no weight at all gets one.
    With ``round(density * numel)`` weights per layer the total is within one weight per layer of the request.

    Args:
        model_or_shapes: a model, of which the maskable weights count (``Linear``, ``Conv1d-3d``,
            ``ConvTranspose1d-3d``), or the weights' shapes by name, as PyTorch stores them:
            ``(out, in, *kernel)``.
        sparsity: fraction of all these weights, less the excluded ones, that is inactive, in [0, 1). Or that
            of each layer, by names and patterns, as in :func:`sparsify`: ``{"layer1.*": 0.8, "fc": 0.5}``.
        distribution: ``"uniform"``, ``"er"`` or ``"erk"``, the default. None with sparsities by layer.
        exclude: layers to leave out, by name or shell-style pattern, as in :func:`sparsify` (``"fc"``,
            ``"layer1.*"``); of shapes, the names are those given.
        include: layers of other kinds to add, as in :func:`sparsify`. Shapes all count, named or not.

    Returns:
        The density of each layer, in [0, 1], by weight name, in the order given, without those excluded and
        without those that no pattern of ``sparsity`` matches. A weight without elements has the density
        ``1 - sparsity``.

    Raises:
        ValueError: a sparsity is outside [0, 1) or NaN, ``distribution`` is unknown or given beside
            sparsities by layer, a pattern matches nothing, a pattern of ``sparsity`` comes after others that
            match all that it matches, a shape has fewer than two dimensions or a negative one, or there
            is nothing to mask.
        TypeError: ``exclude`` or ``include`` is a single string, ``sparsity`` is no number or mapping.
    """
    check_request(sparsity, distribution)
    if isinstance(model_or_shapes, nn.Module):
        weights = maskable_weights(model_or_shapes, exclude, include)
        names_of = names_of_parameters(model_or_shapes)
        shapes = {weight.name: tuple(weight.parameter.shape) for weight in weights}
        names = {weight.name: names_of[weight.parameter] for weight in weights}
    else:
        excluded, included = Patterns("exclude", exclude), Patterns("include", include)
        for name in model_or_shapes:
            included.match((name,))
        shapes = {
            name: tuple(shape) for name, shape in model_or_shapes.items() if not excluded.match((name,))
        }
        names = {name: [name] for name in shapes}
        excluded.check_all_met()
        included.check_all_met()
    return share_densities(shapes, names, sparsity, distribution)


def check_request(sparsity: float | Mapping[str, float], distribution: Distribution | None) -> None:
    """Raise, naming the argument, unless :func:`layer_densities` can do what is asked for."""
    if distribution is not None and distribution not in get_args(Distribution):
        raise ValueError(f"distribution is {distribution!r}, it must be one of {get_args(Distribution)}")
    if not isinstance(sparsity, Mapping):
        _check_sparsity("sparsity", sparsity)
        return
    if distribution is not None:
        raise ValueError(
            f"distribution is {distribution!r}, but sparsity is a mapping that gives each layer its own: "
            "leave distribution out"
        )
    if not sparsity:
        raise ValueError("sparsity is an empty mapping: nothing to mask")
    Patterns("sparsity", sparsity)
    for pattern, value in sparsity.items():
        _check_sparsity(f"sparsity of {pattern!r}", value)


def share_densities(
    shapes: Mapping[str, Sequence[int]],
    names: Mapping[str, Sequence[str]],
    sparsity: float | Mapping[str, float],
    distribution: Distribution | None,
) -> dict[str, float]:
    """Return the densities of :func:`layer_densities`, for weights that were chosen.

    Args:
        shapes: of the weights that may be masked, by name.
        names: all names by which a pattern of ``sparsity`` finds each of them.
        sparsity, distribution: as :func:`check_request` has them.
    """
    if not shapes:
        raise ValueError(
            "nothing to mask: no Linear, Conv or ConvTranspose weight is left, and include adds none"
        )
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape) < 0:
            raise ValueError(f"shape of {name!r} is {shape}, it must be (out, in, *kernel)")
    if isinstance(sparsity, Mapping):
        densities = densities_by_pattern(
            names, sparsity, " that is not excluded; other layers than Linear and Conv need include, too"
        )
    else:
        densities = _distribute(shapes, sparsity, distribution or "erk")
    for name in densities:
        numel = prod(shapes[name])
        if numel > 0 and round(densities[name] * numel) < 1:
            densities[name] = 1.0 / numel
    return densities


def _check_sparsity(what: str, sparsity: float) -> None:
    if not isinstance(sparsity, Real):
        raise TypeError(f"{what} is a {type(sparsity).__name__}, it must be a number in [0, 1)")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{what} is {sparsity}, it must be in [0, 1)")


def densities_by_pattern(
    names: Mapping[str, Sequence[str]], sparsity: Mapping[str, float], advice: str = ""
) -> dict[str, float]:
    """Return the densities of the weights that a pattern matches; the first such pattern counts.

    Args:
        names: all names by which a pattern finds each weight.
        sparsity: by pattern.
        advice: the end of the error that a pattern matches nothing.
    """
    patterns = Patterns("sparsity", sparsity)
    first = {weight: patterns.first(names[weight]) for weight in names}
    patterns.check_all_decisive(advice)
    return {weight: 1.0 - sparsity[pattern] for weight, pattern in first.items() if pattern is not None}


def _distribute(
    shapes: Mapping[str, Sequence[int]], sparsity: float, distribution: Distribution
) -> dict[str, float]:
    densities = dict.fromkeys(shapes, 1.0 - sparsity)
    if distribution == "uniform" or sparsity == 0.0:
        return densities
    numels = {name: prod(shape) for name, shape in shapes.items() if prod(shape) > 0}
    share = _erk_share if distribution == "erk" else _er_share
    densities.update(_fill({name: share(shapes[name]) for name in numels}, numels, 1.0 - sparsity))
    return densities


def _er_share(shape: Sequence[int]) -> int:
    """Return ``numel * (n_out + n_in) / (n_out * n_in)``, the active weights for each unit of eps."""
    return (shape[0] + shape[1]) * prod(shape[2:])


def _erk_share(shape: Sequence[int]) -> int:
    """Return ``numel * sum(shape) / prod(shape)``, the active weights for each unit of eps."""
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
