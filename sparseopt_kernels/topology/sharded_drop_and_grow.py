"""``DropAndGrow`` of sharded layers: the masks that one process would get, without gathering a layer.

Rows are neurons: what concerns one neuron is done on the rank that has it, and what concerns a whole layer by
``sharded_selection.py``. All layers of a mesh are chosen from at once, so that few messages are sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..masks.registered_masks import as_boolean
from ..neurons import Neurons, fan_in
from ..sharding import Shards, by_mesh
from .drop_and_grow import Change, LayerTensors, Ranking, score_of
from .layer_update import LayerUpdate, numbers_of
from .random_choice import draw_seed, random_places
from .score_checks import are_finite, is_nonzero
from .selection import drop_smallest, fill_neurons, grow_largest, largest_inputs, missing_inputs
from .sharded_parts import Asked
from .sharded_selection import RandomGrowth, grow_random, largest


class ShardedDropAndGrow:
    """``DropAndGrow`` of the parts that this rank has of sharded layers. All ranks call every method.

    Args:
        layers: the parts of this rank.
        neurons: the dimension of each layer that counts its neurons.
        min_fan_in: the number of inputs that each neuron keeps.
        shards: the ranks that have each layer.
    """

    def __init__(
        self,
        layers: Sequence[LayerTensors],
        neurons: Sequence[Neurons],
        min_fan_in: int,
        shards: Sequence[Shards],
    ) -> None:
        self._layers = layers
        self._neurons = neurons
        self._min_fan_in = min_fan_in
        self._shards = shards
        masks = [as_boolean(layer.mask) for layer in layers]
        self._weights_before, self.sizes = self._before({i: mask.numel() for i, mask in enumerate(masks)})
        active = self._sums({i: int(mask.count_nonzero()) for i, mask in enumerate(masks)})
        self.active = [active[i] for i in range(len(layers))]
        self.missing = [0] * len(layers)
        if min_fan_in:
            pairs = enumerate(zip(masks, neurons, strict=True))
            missing = self._sums({i: missing_inputs(mask, min_fan_in, own) for i, (mask, own) in pairs})
            self.missing = [missing[i] for i in range(len(layers))]
        self._rankings: dict[int, Ranking] = {}

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        self._rankings.update({ranking.layer: ranking for ranking in rankings})
        return not self._is_any([not are_finite(ranking.values) for ranking in rankings])

    def ranks_are_masked(self) -> bool:
        at_inactive = [is_nonzero(own.values, outside=self._mask(own.layer)) for own in self._growing()]
        return not self._is_any(at_inactive) and not self.ranks_are_zero()

    def ranks_are_zero(self) -> bool:
        return not self._is_any([is_nonzero(own.values) for own in self._growing()])

    def update(self, changes: Sequence[Change]) -> list[LayerUpdate]:
        # Numbers by neuron are those of this rank: whether they are 0 is known on no other.
        changing = [
            i for i, (counts, *_) in enumerate(changes) if counts.by_neuron or counts.drops or counts.grows
        ]
        kept = self._kept({i: changes[i] for i in changing})
        grown = self._grown(kept, {i: changes[i] for i in changing})
        return self._apply(grown)

    def is_any(self, own: bool) -> bool:
        """Tell if something is so on any rank."""
        return self._is_any([own])

    def _kept(self, changes: Mapping[int, Change]) -> dict[int, Tensor]:
        """Return the masks without what is dropped."""
        staying: dict[int, Tensor] = {}
        for i, (counts, score, _) in changes.items():
            if not (self._min_fan_in or counts.by_neuron):
                continue
            mask, neurons = self._mask(i), self._neurons[i]
            score = self._layers[i].parameter.abs() if score is None else score
            if isinstance(counts.drop, Tensor):
                staying[i] = drop_smallest(mask, score, counts.drop, neurons=neurons)
            else:
                inputs = fan_in(mask, neurons).clamp_max(self._min_fan_in)
                staying[i] = largest_inputs(score, mask, inputs, neurons)
        others = {
            i: self._mask(i) & ~staying[i] if i in staying else self._mask(i)
            for i, own in changes.items()
            if not isinstance(own.counts.drop, Tensor)
        }
        totals = self._sums({i: int(own.count_nonzero()) for i, own in others.items()})
        asked = {
            i: Asked(
                values=self._layers[i].parameter if (score := changes[i].drop_score) is None else score,
                candidates=own,
                k=max(0, totals[i] - int(changes[i].counts.drop)),
                signed=score is not None,
            )
            for i, own in others.items()
        }
        chosen = self._largest(asked)
        return {i: _union(staying.get(i), chosen.get(i)) for i in changes}

    def _grown(self, kept: dict[int, Tensor], changes: Mapping[int, Change]) -> dict[int, Tensor]:
        """Return the masks with what is dropped taken out, and with what grows."""
        grown = dict(kept)
        growing = {i: own for i, own in changes.items() if own.counts.by_neuron or own.counts.grows}
        for i, (counts, _, generator) in growing.items():
            if isinstance(counts.grow, Tensor):
                score = self._score(i, generator)
                grown[i] = grow_largest(kept[i], self._mask(i), score, counts.grow, self._neurons[i])
            elif self.missing[i]:
                # Within a neuron all factors are equal; where they are 0, values still tell weights apart.
                score = self._score(i, generator, with_factors=False)
                grown[i] = fill_neurons(kept[i], score, self._min_fan_in, self._neurons[i])
        whole = {i: own for i, own in growing.items() if not isinstance(own.counts.grow, Tensor)}
        free = {i: int((~grown[i]).count_nonzero()) for i in whole}
        before, totals = self._before(free)
        asked = {}
        for i, (counts, _, generator) in whole.items():
            size = self.sizes[i]
            grow = int(counts.grow)
            if self._min_fan_in:
                # Among the kept are what neurons lacked, and what they need of what was to drop.
                grow = max(0, self.active[i] - int(counts.drop) + grow - (size - totals[i]))
            if generator is None:
                ranking = self._rankings[i]
                asked[i] = Asked(
                    values=ranking.values if ranking.factors is None else score_of(ranking),
                    candidates=~grown[i],
                    k=grow,
                    first=self._mask(i),
                    signed=ranking.signed,
                )
            else:
                random = RandomGrowth(kept=grown[i], k=grow, generator=generator, size=size)
                grown[i] = grow_random(random, totals[i], before[i], self._weights_before[i], self._shards[i])
        for i, chosen in self._largest(asked).items():
            grown[i] = grown[i] | chosen
        return grown

    def _apply(self, grown: Mapping[int, Tensor]) -> list[LayerUpdate]:
        """Write the new masks. Return what happened to each, as all ranks see it."""
        updates = [LayerUpdate()] * len(self._layers)
        for ranks, places in by_mesh({i: self._shards[i] for i in grown}):
            numbers = torch.stack([self._compare(i, grown[i]) for i in places]).to(ranks.device())
            sums, most = ranks.sums(numbers[:, :-1]), ranks.most_of_all(numbers[:, -1:])
            for i, own in zip(places, torch.cat([sums, most], dim=1).tolist(), strict=True):
                updates[i] = LayerUpdate(*own)
        for i, mask in grown.items():
            parameter, written, explored = self._layers[i]
            former = self._mask(i)
            explored |= former
            if updates[i].changed:
                explored |= mask
                # What grew starts at 0 even if the caller never zeroed it; what regrew keeps its value.
                parameter.masked_fill_(former ^ mask, 0)
                written.copy_(mask)
        return updates

    def _compare(self, i: int, after: Tensor) -> Tensor:
        """Return this rank's share of the numbers of a ``LayerUpdate``; the last one is a maximum."""
        before, neurons, ranks = self._mask(i), self._neurons[i], self._shards[i]
        counts = torch.stack([fan_in(own, neurons) for own in (before, after, after & ~before)])
        if neurons.dim == 0 or not ranks.is_divided():
            return numbers_of(*counts)
        own = numbers_of(*ranks.sums(counts.to(ranks.device())))
        # Each rank has a part of every neuron, and all know all numbers: one of them counts.
        return own if ranks.is_first() else torch.zeros_like(own)

    def _mask(self, i: int) -> Tensor:
        return as_boolean(self._layers[i].mask)

    def _score(self, i: int, generator: torch.Generator | None, with_factors: bool = True) -> Tensor:
        if generator is not None:
            mask = self._layers[i].mask
            own = random_places(draw_seed(generator), self._weights_before[i], mask.numel(), 2**62)
            return own.view(mask.shape).to(mask.device)
        ranking = self._rankings[i]
        return score_of(ranking if with_factors else ranking._replace(factors=None))

    def _growing(self) -> list[Ranking]:
        return [own for own in self._rankings.values() if own.at_most > 0]

    def _largest(self, asked: Mapping[int, Asked]) -> dict[int, Tensor]:
        chosen: dict[int, Tensor] = {}
        for ranks, places in by_mesh({i: self._shards[i] for i in asked}):
            chosen.update(zip(places, largest([asked[i] for i in places], ranks), strict=True))
        return chosen

    def _sums(self, numbers: Mapping[int, int]) -> dict[int, int]:
        """Return the sums over the ranks of a number of each layer."""
        return self._before(numbers)[1]

    def _before(self, numbers: Mapping[int, int]) -> tuple[dict[int, int], dict[int, int]]:
        """Return the sums over the ranks before this one of a number of each layer, and over all of them."""
        before: dict[int, int] = {}
        totals: dict[int, int] = {}
        for ranks, places in by_mesh({i: self._shards[i] for i in numbers}):
            own = ranks.integers([numbers[i] for i in places])
            for found, sums in zip((before, totals), ranks.before(own), strict=True):
                found.update(zip(places, sums.tolist(), strict=True))
        return before, totals

    def _is_any(self, own: Sequence[bool]) -> bool:
        is_any = any(own)
        for ranks in dict.fromkeys(self._shards):
            is_any = bool(ranks.most_of_all(ranks.integers(int(is_any))))
        return is_any


def _union(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        both = b if a is None else a
        assert both is not None
        return both
    return a | b
