"""The text of the warnings of ``sparsify``: what stays dense, which neurons are dead, which weights are 0."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.nn.parameter import Parameter

from ..masks.layers import MaskableWeight, all_weights, names_of_parameters
from ..masks.patterns import Patterns

_MOST_NAMES = 6


def notice_of_dense_weights(
    model: nn.Module,
    masked: Collection[Parameter],
    exclude: Sequence[str],
    sparsity: float | Mapping[str, float],
) -> str | None:
    """Return which weights stay dense without being asked for, and how large they are; None: there are none.

    Args:
        model: of which all weights are looked at.
        masked: the parameters that have a mask, or get one.
        exclude: as in :func:`sparsify`; what it names stays dense on purpose.
        sparsity: as in :func:`sparsify`. Of a mapping, what no pattern matches stays dense on purpose.
    """
    excluded = Patterns("exclude", exclude)
    asked = Patterns("sparsity", sparsity if isinstance(sparsity, Mapping) else ("*",))
    names = names_of_parameters(model)
    dense = [
        weight
        for weight in all_weights(model)
        if weight.parameter not in masked
        and not excluded.match(names[weight.parameter])
        and asked.match(names[weight.parameter])
    ]
    if not dense:
        return None
    groups: dict[str, list[MaskableWeight]] = {}
    for weight in dense:
        # Layers that are repeated count as one where there are many.
        numbered = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", weight.name)
        groups.setdefault(weight.name if len(dense) <= _MOST_NAMES else numbered, []).append(weight)
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {name: sum(w.parameter.numel() for w in group) for name, group in groups.items()}
    by_size = sorted(groups, key=lambda name: -sizes[name])
    told = []
    for name in by_size[:_MOST_NAMES]:
        kind = type(groups[name][0].module).__name__
        times = f"{len(groups[name])} x " if len(groups[name]) > 1 else ""
        told.append(f"{name!r} ({times}{kind}, {_size(sizes[name], total)})")
    rest = by_size[_MOST_NAMES:]
    if rest:
        told.append(f"and {len(rest)} more ({_size(sum(sizes[name] for name in rest), total)})")
    return (
        f"left dense, because their layers are not Linear, Conv or ConvTranspose: {', '.join(told)}. "
        f"include=({by_size[0]!r},) masks such a weight as well; exclude=({by_size[0]!r},) leaves it dense "
        "without this warning"
    )


def _size(numel: int, total: int) -> str:
    return f"{numel:,} weights, {numel / total:.1%} of the model"


def notice_of_dead_neurons(dead: Mapping[str, tuple[int, int]]) -> str | None:
    """Return in which layers how many neurons have no active weight, the worst first; None: none has.

    Args:
        dead: the number of dead neurons of each layer, and of all its neurons.
    """
    worst = sorted((name for name in dead if dead[name][0]), key=lambda name: -dead[name][0] / dead[name][1])
    if not worst:
        return None
    told = [f"{dead[name][0]} of {dead[name][1]} in {name!r}" for name in worst[:_MOST_NAMES]]
    if len(worst) > _MOST_NAMES:
        told.append(f"and others in {len(worst) - _MOST_NAMES} more layers")
    return (
        f"neurons with no active weight, whose output does not depend on the input: "
        f"{sum(count for count, _ in dead.values())} ({', '.join(told)}). "
        "min_fan_in=1 gives every neuron one; so may a lower sparsity, or another distribution"
    )


def notice_of_zeros(zeros: Mapping[str, tuple[int, int]]) -> str | None:
    """Return in which layer most of the weights under a random mask are 0 already; None: in none.

    Args:
        zeros: the number of active weights of each layer that are 0, and of all its active ones.
    """
    found = [name for name, (zero, active) in zeros.items() if 2 * zero > active]
    if not found:
        return None
    zero, active = zeros[found[0]]
    others = f" (and most in {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{zero:,} of the {active:,} active weights of {found[0]!r}{others} are 0 already: the model was "
        "sparse, or is initialised so, and random masks keep few of its weights. init='magnitude' keeps "
        "them. If a checkpoint has the masks as well, call sparsify before load_state_dict"
    )
