"""The end of masked training: a plain dense model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import prune

from .dense_checkpoint import remove_load_advice
from .masked_weights import masked_weights, zero_outside_masks

Model = TypeVar("Model", bound=nn.Module)


def finalize(model: Model) -> Model:
    """Remove the masks of a model, in place, and return it: its ``state_dict`` is that of the dense model.

    Weights outside the masks are zeroed first. Masks of :func:`sparsify`, boolean buffers of your own and
    masks of ``torch.nn.utils.prune`` are removed; other buffers stay. Parameters stay the same objects.

    It is the end of the training: a ``SparseOpt``, ``SET`` or ``RigL`` that has the former ``Masks`` raises
    an error in its next step. An optimizer with a dict of masks cannot know, and goes on. To keep the masked
    model, finalize a copy: ``sk.finalize(copy.deepcopy(model))``.

    Args:
        model: a model with masks, also in a wrapper (``DistributedDataParallel``, ``AveragedModel``).

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no mask, or a mask is not valid; nothing has been changed.
    """
    weights = masked_weights(model)
    zero_outside_masks(weights)
    for weight in weights:
        if weight.pruned:
            prune.remove(weight.module, weight.attribute)  # type: ignore[no-untyped-call]
        else:
            delattr(weight.module, f"{weight.attribute}_mask")
        remove_load_advice(weight.module)
    return model
