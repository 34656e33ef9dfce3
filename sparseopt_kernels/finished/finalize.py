"""The end of masked training: a plain dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn
from torch.nn.utils import prune

from ..masks.mapping import Masks
from ..masks.outside import Outside, count_outside
from ..masks.registered_masks import MaskedParameter, masked_parameters, masks_without_parameter
from ..sharding import local_part
from ..step.zero_outside import zero_outside_masks
from ..user_warning import warn
from .load_dense import remove_load_advice

Model = TypeVar("Model", bound=nn.Module)


def finalize(model: Model) -> Model:
    """Remove the masks of a model in place, which leaves a dense model with zeros.

    Its ``state_dict`` is that of the dense model. Weights outside the masks are zeroed first. Masks of
    :func:`sparsify`, boolean masks of your own and masks of ``torch.nn.utils.prune`` are removed; other
    buffers stay. Parameters stay the same objects.

    Call it after training: a ``SparseOpt`` that has the former ``Masks`` raises an error in its next step, a
    ``SET``, ``RigL`` or ``GMP`` in its next update. One with a dict of masks goes on, because it cannot know.
    To keep the masked model, finalize a copy: ``sk.finalize(copy.deepcopy(model))``.

    Args:
        model: a model with masks, also in a wrapper (``DistributedDataParallel``, ``AveragedModel``).

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no mask, a mask is not valid, or it is of a weight that its layer computes;
            nothing has been changed.

    Warns:
        UserWarning: most weights outside the masks are not 0 before that, as of a model that was trained by
            an optimizer that does not know the masks.
    """
    computed = list(masks_without_parameter(model))
    if computed:
        raise ValueError(
            f"{computed[0]!r} has a mask, but its layer computes it: remove weight_norm, or the other "
            "parametrization, first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    masks, places = Masks(model), masked_parameters(model)
    _warn_of_trained_weights(places)
    zero_outside_masks(masks)
    for place in places:
        if place.is_pruned:
            prune.remove(place.module, place.buffer.removesuffix("_mask"))  # type: ignore[no-untyped-call]
        else:
            delattr(place.module, place.buffer)
        remove_load_advice(place.module)
    return model


def _warn_of_trained_weights(places: Sequence[MaskedParameter]) -> None:
    """Warn if over half of the weights outside masks are not 0."""
    weights = nonzero = 0
    for place in places:
        parameter, mask = place.both()
        if not (place.is_pruned or parameter.is_meta):  # torch.nn.utils.prune keeps weights outside its masks
            found = count_outside(local_part(parameter), local_part(mask))
            weights, nonzero = weights + found.weights, nonzero + found.nonzero
    if (outside := Outside(weights, nonzero)).are_trained:
        warn(
            f"{outside} weights outside the masks are not 0, and finalize sets them to 0. Was the optimizer "
            "given the masks (SparseOpt(masks=...))? Is this an average over changing masks (apply_masks)? "
            "Masks that were made after training do this, too"
        )
