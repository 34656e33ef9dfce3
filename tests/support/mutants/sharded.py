"""Mistakes in what ranks of sharded parameters do together."""

from __future__ import annotations

from mutants.mutant import Mutant

_TEST = "sharded/test_equal_to_one_process.py::test_one_case_of_each"

SHARDED = {
    "mean-fan-in-of-one-rank": Mutant(
        "step/rank_agreement.py", "ranks.sums(counts).tolist()", "counts.tolist()", _TEST
    ),
    "replicas-counted-twice": Mutant(
        "sharding.py",
        "return _reduced(numbers, self.groups(sharded=True), dist.ReduceOp.SUM)",
        "return _reduced(numbers, self.groups(), dist.ReduceOp.SUM)",
        _TEST,
    ),
    "a-mask-off-by-a-row": Mutant(
        "sharding.py", "local_part(found).copy_(part)", "local_part(found).copy_(part.roll(1, 0))", _TEST
    ),
    "an-empty-part-left-out": Mutant(
        "step/preparation.py",
        "shards_of(p) if p in masks else None",
        "shards_of(p) if p in masks and local_part(p).numel() else None",
        _TEST,
    ),
    "ties-by-the-index-on-a-rank": Mutant(
        "topology/sharded_selection.py",
        "shares.append(max(0, missing - own_before))",
        "shares.append(missing)",
        _TEST,
    ),
}
