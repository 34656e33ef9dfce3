"""The end of masked training: a plain dense model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import prune

from ..masks.mapping import Masks
from ..masks.registered_masks import masked_parameters, masks_without_parameter
from ..step.zero_outside import zero_outside_masks
from .load_dense import remove_load_advice

Model = TypeVar("Model", bound=nn.Module)


def finalize(model: Model) -> Model:
    """Remove the masks of a model in place, which leaves a dense model with zeros.

    Its ``state_dict`` is that of the dense model. Weights outside the masks are zeroed first. Masks of
    :func:`sparsify`, boolean masks of your own and masks of ``torch.nn.utils.prune`` are removed; other
    buffers stay. Parameters stay the same objects.

    Call it after training: a ``SparseOpt``, ``SET``, ``RigL`` or ``GMP`` that has the former ``Masks`` raises
    an error in its next step. One with a dict of masks goes on, because it cannot know. To keep the masked
    model, finalize a copy: ``sk.finalize(copy.deepcopy(model))``.

    Args:
        model: a model with masks, also in a wrapper (``DistributedDataParallel``, ``AveragedModel``).

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no mask, a mask is not valid, or it is of a weight that its layer computes;
            nothing has been changed.
    """
    computed = list(masks_without_parameter(model))
    if computed:
        raise ValueError(
            f"{computed[0]!r} has a mask, but its layer computes it: remove weight_norm, or the other "
            "parametrization, first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    zero_outside_masks(Masks(model))
    for place in masked_parameters(model):
        if place.is_pruned:
            prune.remove(place.module, place.buffer.removesuffix("_mask"))  # type: ignore[no-untyped-call]
        else:
            delattr(place.module, place.buffer)
        remove_load_advice(place.module)
    return model
