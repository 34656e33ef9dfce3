"""The texts of warnings about the training that a sparse training method is part of."""

from __future__ import annotations

from collections.abc import Sequence

from .layer_update import LayerUpdate

NOTICE_OF_NO_STEP = (
    "update_every is 1 and skip_step is True: until stop_at, every step updates the masks and no weight, so "
    "nothing is trained. Update less often, or pass skip_step=False"
)

NOTICE_OF_UPDATES_IN_A_ROW = (
    "the masks were updated in three steps in a row, and skip_step leaves out each of these steps: if that "
    "goes on, no weight moves, and nothing is trained. Update less often, or set skip_step to False"
)


def notice_of_masked_gradients(method: str) -> str:
    """Return the warning that a method grows by gradients which were multiplied by the masks."""
    return (
        "gradients are masked: they are 0 for all inactive weights of all layers, though not for "
        f"active ones. {method} needs dense gradients, or it grows whichever weights come first. Do not "
        "multiply gradients by the masks before dst.step(), nor weights in the forward pass (as "
        "torch.nn.utils.prune does): SparseOpt keeps inactive weights at 0 without that"
    )


def notice_of_weights_outside(told: str) -> str:
    """Return the warning that weights are trained outside a mask; ``told`` says how many, and where."""
    return (
        f"{told}: the optimizer does not know the masks, and trains a dense network. Use "
        "SparseOpt with masks=, or set weights outside the masks to 0 after each of its steps (unless your "
        "forward pass applies the masks)"
    )


def notice_of_zero_gradients(method: str) -> str:
    """Return the warning that an update by gradients changed nothing, because all of them are 0."""
    return (
        f"an update of {method} has changed no mask: the gradients of all masked parameters are 0. Call "
        "dst.step() after loss.backward() and before opt.step() and opt.zero_grad()"
    )


def notice_of_untrained(method: str, names: Sequence[str]) -> str:
    """Return the warning that nothing trains these layers."""
    more = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"between updates of {method}, nothing changes the weights of {names[0]!r}{more}, and each update "
        "drops some of them. If no optimizer has them, or no gradient reaches them, leave their masks out of "
        f"{method} (masks.subset). If dst.step() is called more often than the optimizer's step(), call it "
        f"once for each. If a copy of their model is trained, make {method} with the masks of the copy"
    )


def notice_of_no_update(update_every: int, stop_at: float) -> str:
    """Return the warning that no step of these updates a mask."""
    return (
        f"stop_at is {stop_at} and update_every is {update_every}, both in steps, not epochs: the masks "
        "will never change"
    )


def notice_of_postponed_update(method: str, steps: int) -> str:
    """Return the warning that an update was postponed in so many steps."""
    return (
        f"an update of {method} has been postponed for {steps} steps, because gradients are not finite: if "
        "the loss is not either, training has diverged"
    )


def notice_of_loaded_masks(method: str) -> str:
    """Return the warning that masks were loaded from a checkpoint, but the state of the method was not."""
    return (
        f"the masks have changed since {method} was made, and it is at its first step. If they come "
        f"from a checkpoint of a run that goes on, load the state of {method} as well "
        "(dst.load_state_dict), or its schedule starts again. If not, "
        f"make {method} after the masks have got their values"
    )


def notice_of_turns(name: str, method: str, other: str) -> str:
    """Return the warning that two methods, of these classes, grow weights in the mask of a layer in turns."""
    return (
        f"two methods grow weights in the mask of {name!r} in turns: a {method} and a {other}. Each may drop "
        "what the other grew before it was trained. Give each mask one method, and do not call step() of one "
        "that was replaced"
    )


def is_concentrated(update: LayerUpdate, neurons: int) -> bool:
    """Tell if one neuron got over a third of what grew, at least 20 weights, and ten times an even share."""
    most = update.most_grown
    return 3 * most > update.grown and most >= 20 and most * neurons >= 10 * update.grown


def notice_of_concentrated_growth(name: str, update: LayerUpdate, others: int, *, is_limited: bool) -> str:
    """Return the warning that one neuron of a layer got much of what grew, and likewise in other layers.

    Args:
        name: of the layer.
        update: of the layer.
        others: the number of other layers.
        is_limited: whether the optimizer limits the norm of the gradients already.
    """
    more = f" (and in {others} other layer{'s' if others > 1 else ''})" if others else ""
    first = "Let" if is_limited else "Clip gradients, unless you do: SparseOpt(max_grad_norm=1). Or let"
    return (
        f"one neuron of {name!r} got {update.most_grown} of the {update.grown} weights that "
        f"grew{more}. Behind a normalisation layer, a neuron with few inputs or none may have a "
        f"gradient many times the others'. {first} every neuron keep inputs (min_fan_in=1), update less "
        "often (update_every), or drop less (drop_fraction)"
    )
