"""The plan of one update: asks the hooks of a method, checks their answers, and then drops and grows.

Nothing is written before :meth:`UpdatePlan.carry_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..masks.mapping import neurons_in
from ..masks.outside import count_outside
from ..masks.registered_masks import as_boolean
from ..sharding import Shards, local_part, shards_of
from .agreement import check_numbers_agree, on_all_or_none
from .drop_and_grow import Change, DropAndGrow, LayerTensors, Ranking, TorchDropAndGrow, score_of
from .hook_checks import WriteGuard, check_counts, check_score
from .hooks import Counts, Layer, Magnitude, Score
from .layer_update import LayerUpdate
from .native_drop_and_grow import NativeDropAndGrow, supports, supports_score
from .score_checks import is_nonzero
from .seeding import generator
from .sharded_drop_and_grow import ShardedDropAndGrow

if TYPE_CHECKING:
    from .dynamic_sparse_training import DynamicSparseTraining

_LOOKED_AT = 2**20  # weights
_FEWEST_OUTSIDE = 20  # of fewer, a change of a mask by hand would be over half


class UpdatePlan:
    """An update of the masks of all layers, from the questions to the hooks to the writes.

    Args:
        method: the object with the hooks and the masks. Errors have the name of its class.
        names: the names of its layers.
        explored: the weights of each layer that have been active at some time; written when masks are.
        ranks: those that have sharded layers.
    """

    def __init__(
        self,
        method: DynamicSparseTraining,
        names: Sequence[str],
        explored: Sequence[Tensor],
        ranks: Sequence[Shards],
    ) -> None:
        self._ranks = ranks
        self._method = method
        self._name = type(method).__name__
        items = zip(method.masks.items(), explored, strict=True)
        self._tensors = [
            LayerTensors(parameter=parameter, mask=mask, explored=union) for (parameter, mask), union in items
        ]
        self._neurons = [neurons_in(method.masks, parameter) for parameter in method.masks]
        shards = [shards for parameter in method.masks if (shards := shards_of(parameter)) is not None]
        if shards:
            self._check_all_sharded(shards)
            self._tensors = [LayerTensors(*map(local_part, tensors)) for tensors in self._tensors]
            self._chooser: DropAndGrow = ShardedDropAndGrow(
                self._tensors, self._neurons, method.min_fan_in, shards
            )
        else:
            make = NativeDropAndGrow if supports(self._tensors) else TorchDropAndGrow
            self._chooser = make(self._tensors, self._neurons, method.min_fan_in)
        self.active = self._chooser.active
        """The number of active weights of each layer."""
        layers = enumerate(zip(names, method.masks, self._tensors, self._neurons, strict=True))
        self.layers = [
            Layer(
                index=i,
                name=name,
                parameter=parameter,
                stored_mask=tensors.mask,
                neurons=neurons,
                active=self.active[i],
                missing=self._chooser.missing[i],
            )
            for i, (name, parameter, tensors, neurons) in layers
        ]
        """All layers, as they are before the update."""
        self._guard = WriteGuard(self._name, self.layers)
        with on_all_or_none(ranks):
            if method.min_fan_in:
                self._check_rows(self.layers, "min_fan_in")
            self.changing = [layer for layer in self.layers if method.can_change(layer)]
            """The layers whose masks may change."""
            self._guard.check("can_change")
        self._changes = [Change(Counts(0, 0))] * len(self.layers)
        self._scores: dict[int, Score] = {}
        self._rankings: dict[int, Ranking] = {}
        self._only_pytorch_can = False

    def ask_grow_scores(self) -> bool:
        """Ask by which scores weights grow. Return False if the gradients postpone the update.

        Raises:
            TypeError, ValueError, RuntimeError: an answer of a hook is wrong, a hook has written, or a method
                that grows by gradients finds none.
        """
        with on_all_or_none(self._ranks):
            self._ask_grow_scores()
        if not (self._method.postpones or self._method.uses_gradients):
            return True
        return self._chooser.rank([*self._rankings.values()]) or not self._method.postpones

    def _ask_grow_scores(self) -> None:
        """Ask the hook, and check its answers."""
        # One that is frozen may still have the gradient of another phase of training.
        trained = [layer for layer in self.layers if layer.parameter.requires_grad]
        if self._method.uses_gradients and all(layer.gradient is None for layer in trained or self.layers):
            raise RuntimeError(
                f"{self._name} ranks by gradients and no masked parameter has one: call step() after "
                "loss.backward() and before opt.zero_grad(). If you do, the masks are of another model, such "
                "as the one that this is a copy of"
            )
        scores = {layer.index: self._method.grow_score(layer) for layer in self.changing}
        self._scores = {index: score for index, score in scores.items() if score is not None}
        self._guard.check("grow_score")
        for layer in self.layers:
            score = self._scores.get(layer.index)
            if layer.gradient is None or (score is None and not layer.parameter.requires_grad):
                continue
            ranking = Ranking(layer=layer.index, values=layer.gradient, at_most=0)
            if isinstance(score, Magnitude) and score.values is layer.gradient:
                check_score(self._name, "grow_score", score, layer)
                if score.factors is not None:
                    self._check_rows([layer], "a factor for each neuron")
                most = self._method._most_that_grow(layer)
                ranking = ranking._replace(at_most=most, factors=score.factors)
            self._rankings[layer.index] = ranking

    @cached_property
    def is_asked_for(self) -> bool:
        """True if a weight is to be dropped or grown. To be asked after the counts."""
        is_asked = any(counts.drops or counts.grows for counts, *_ in self._changes)
        if isinstance(self._chooser, ShardedDropAndGrow):  # a rank may have no neuron that changes
            return self._chooser.is_any(is_asked)
        return is_asked

    def told_if_dense(self, turn: int) -> str | None:
        """Return where weights outside a mask are not 0, and how many, if over half of them are not.

        It looks at the first rows of one layer, of another one in each turn, to be quick. A layer without
        gradients there does not count, because its mask may be applied in the forward pass; nor does one that
        has few weights there.
        """
        layer = self.layers[turn % len(self.layers)]
        gradient = layer.gradient
        if layer.name.endswith("_orig") or gradient is None:
            return None  # prune applies its masks in the forward pass
        if gradient.layout is not torch.strided or gradient.ndim == 0:
            return None
        rows = max(1, _LOOKED_AT * len(gradient) // max(1, gradient.numel()))
        weight, mask, gradient = layer.weight[:rows], as_boolean(layer.stored_mask[:rows]), gradient[:rows]
        if not is_nonzero(gradient.nan_to_num(0.0, 0.0, 0.0), outside=mask):  # infinity times a mask is NaN
            return None
        outside = count_outside(weight, mask)
        if outside.weights < _FEWEST_OUTSIDE or not outside.are_trained:
            return None
        return f"weights of {layer.name!r} outside its mask are not 0 ({outside} that were looked at)"

    def gradients_are_zero(self) -> bool:
        """Return whether gradients that weights grow by are all 0."""
        return self._chooser.ranks_are_zero()

    def gradients_are_masked(self) -> bool:
        """Return whether gradients that weights grow by are 0 at all inactive weights, not at active ones."""
        return self._chooser.ranks_are_masked()

    def ask_counts(self, step: int) -> None:
        """Ask how many weights are dropped and grown, and by which scores they are dropped.

        Raises:
            TypeError, ValueError, RuntimeError: an answer of a hook is wrong, or a hook has written.
        """
        with on_all_or_none(self._ranks):
            new = self._ask_counts(step)
        check_numbers_agree(self._numbers(), self._ranks, f"the answers of {self._name}.counts")
        if self._only_pytorch_can and isinstance(self._chooser, NativeDropAndGrow):
            self._chooser = TorchDropAndGrow(self._tensors, self._neurons, self._method.min_fan_in)
            new = [index for index, ranking in self._rankings.items() if ranking.at_most > 0]
        self._chooser.rank([self._rankings[index] for index in new])

    def _ask_counts(self, step: int) -> list[int]:
        """Ask the hooks. Return the layers whose scores are yet to be ranked."""
        returned = self._method.counts(self.changing, step)
        self._guard.check("counts")
        checked = check_counts(self._name, returned, self.changing, self._method.min_fan_in)
        self._check_shared_masks(checked)
        for layer, counts in zip(self.changing, checked, strict=True):
            at_random = counts.grows and layer.index not in self._scores
            self._changes[layer.index] = Change(
                counts,
                self._drop_score(layer) if counts.drops else None,
                generator(self._method.seed, layer.index, step) if at_random else None,
            )
            if counts.by_neuron:
                self._check_rows([layer], "counts by neuron")
            self._only_pytorch_can |= counts.by_neuron
        self._guard.check("drop_score")
        return [layer.index for layer in self.changing if self._set_ranking(layer)]

    def _numbers(self) -> list[int]:
        """Return the counts of each layer, which must be the same on all ranks; -1 for counts by neuron."""
        both = (own.counts for own in self._changes)
        return [-1 if isinstance(k, Tensor) else k for counts in both for k in counts]

    def _check_all_sharded(self, shards: Sequence[Shards]) -> None:
        """Raise ``ValueError`` unless all layers are sharded, and none shares its mask with another."""
        if len(shards) < len(self._tensors):
            raise ValueError(
                f"{len(shards)} of {len(self._tensors)} layers of {self._name} are sharded, and the others "
                "are not: make a method for each kind of layers (masks.subset(parameters))"
            )
        if len({id(tensors.mask) for tensors in self._tensors}) < len(self._tensors):
            raise ValueError(f"two layers of {self._name} share a mask and are sharded: give each its own")

    def _check_rows(self, layers: Sequence[Layer], what: str) -> None:
        """Raise ``ValueError`` unless each rank has whole neurons of these layers."""
        for layer in layers:
            shards = shards_of(layer.parameter)
            if shards is not None and shards.is_divided() and layer.neurons.dim != 0:
                raise ValueError(
                    f"{self._name} has {what}, and {layer.name!r} has its neurons in dimension 1 "
                    "(ConvTranspose, or Conv1D of transformers) and is sharded along dimension 0, so that "
                    "every rank has a part of each neuron: keep it out of fully_shard "
                    "(ignored_params=...), or out of the masks"
                )

    def _check_shared_masks(self, checked: Sequence[Counts]) -> None:
        masks = [id(layer.stored_mask) for layer in self.layers]
        for layer, counts in zip(self.changing, checked, strict=True):
            if counts.by_neuron and masks.count(id(layer.stored_mask)) > 1:
                raise ValueError(
                    f"{self._name}.counts returned numbers by neuron for {layer.name!r}, whose mask another "
                    "parameter has as well: for such a mask it must return two integers"
                )

    def _drop_score(self, layer: Layer) -> Tensor | None:
        """Ask by which score weights of the layer are dropped. None: by magnitude, as is usual."""
        score = self._method.drop_score(layer)
        least = check_score(self._name, "drop_score", score, layer)
        if isinstance(score, Magnitude):
            if score.values is layer.weight and score.factors is None:
                return None
            ranking = Ranking(layer=layer.index, values=score.values, at_most=0, factors=score.factors)
            score = score_of(ranking)
        self._only_pytorch_can |= least < 0 or not supports_score(score)
        return score

    def _set_ranking(self, layer: Layer) -> bool:
        """Set what weights of the layer grow by. Return whether it is yet to be ranked by that."""
        score, counts = self._scores.get(layer.index), self._changes[layer.index].counts
        if score is None or not counts.grows:
            return False
        at_most = 1 if isinstance(counts.grow, Tensor) else counts.grow
        known = self._rankings.get(layer.index)
        if isinstance(score, Magnitude):
            if known is not None and known.values is score.values and known.at_most >= at_most:
                return False
            ranking = Ranking(layer=layer.index, values=score.values, at_most=at_most, factors=score.factors)
        else:
            ranking = Ranking(layer=layer.index, values=score, at_most=at_most, signed=True)
        least = check_score(self._name, "grow_score", score, layer)
        self._only_pytorch_can |= least < 0 or not supports_score(ranking.values)
        self._rankings[layer.index] = ranking
        return True

    def carry_out(self) -> list[LayerUpdate]:
        """Drop and grow. Return what happened to each mask."""
        return self._chooser.update(self._changes)
