"""The results of CPU benchmarks as text."""

from __future__ import annotations

from collections.abc import Sequence

from comparison import COLD, OURS, Cache, Comparison

from sparseopt_kernels.lab.bench.checks import WRONG
from sparseopt_kernels.text_table import aligned

_CLAIMED_SPARSITY, _CLAIMED_RATIO = 0.9, 0.95  # the aim: up to this sparsity at most 5% slower


def table(comparisons: Sequence[Comparison], machine: str, isa: str) -> str:
    """Return a table for each network and state of the caches: medians by sparsity, and the rivals' ratios to
    SparseOpt's."""
    lines = [
        f"One step, median milliseconds on {machine}, {isa}; in brackets: how many times SparseOpt is faster"
    ]
    for network, cache in dict.fromkeys((c.network, c.cache) for c in comparisons):
        own = [c for c in comparisons if (c.network, c.cache) == (network, cache)]
        rivals = list(dict.fromkeys(name for c in own for name in (*c.times, *c.wrong) if name != OURS))
        header = ("sparsity", "SparseOpt", *rivals, "bytes/weight", "GB/s", "copy GB/s")
        lines += ["", f"{_titled(network, cache)}, {own[0].weights} weights"]
        lines += aligned([header, *(_row(c, rivals) for c in own)])
    lines += ["", "bytes/weight: the least that a step of SparseOpt can touch. GB/s: these bytes per median."]
    return "\n".join(lines)


def _titled(network: str, cache: Cache) -> str:
    return f"{network}, cold caches" if cache == COLD else network


def _row(comparison: Comparison, rivals: Sequence[str]) -> tuple[str, ...]:
    median = comparison.times[OURS].p50_ms
    return (
        str(comparison.sparsity),
        f"{median:.3f}",
        *(_cell(comparison, name) for name in rivals),
        f"{comparison.floor_bytes / comparison.weights:.2f}",
        f"{comparison.floor_bytes / median / 1e6:.1f}",
        f"{comparison.copy_gb_per_s:.1f}",
    )


def _cell(comparison: Comparison, rival: str) -> str:
    if rival in comparison.times:
        ms = comparison.times[rival].p50_ms
        return f"{ms:.3f} [{ms / comparison.times[OURS].p50_ms:.2f}]"
    return WRONG if rival in comparison.wrong else "-"


def worst_of_map(comparisons: Sequence[Comparison]) -> str:
    """Return SparseOpt's worst ratio for each kind of network, state of the caches and rival, up to a
    sparsity of 0.9."""
    lines = []
    claimed = [c for c in comparisons if c.sparsity <= _CLAIMED_SPARSITY]
    for network, cache in dict.fromkeys((c.network, c.cache) for c in claimed):
        own = [c for c in claimed if (c.network, c.cache) == (network, cache)]
        title = _titled(network, cache)
        for rival in dict.fromkeys(name for c in own for name in c.times if name != OURS):
            ratios = {
                (c.weights, c.sparsity): c.times[rival].p50_ms / c.times[OURS].p50_ms
                for c in own
                if rival in c.times
            }
            weights, sparsity = min(ratios, key=ratios.__getitem__)
            slower = sum(ratio < _CLAIMED_RATIO for ratio in ratios.values())
            lines.append(
                f"{title}, against {rival}: at worst {ratios[weights, sparsity]:.2f} times as fast, with "
                f"{weights} weights at {sparsity}; below {_CLAIMED_RATIO} in {slower} of {len(ratios)} cases "
                f"up to {_CLAIMED_SPARSITY}"
            )
        for rival in dict.fromkeys(name for c in own for name in c.wrong):
            cases = sum(rival in c.wrong for c in own)
            lines.append(
                f"{title}: {rival} has {WRONG} in {cases} of {len(own)} cases, and was not timed there"
            )
    return "\n".join(lines)
