"""The results of ``bench`` in words. The numbers choose every sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...text_table import aligned
from ..timing import Summary, speed
from .checks import WRONG
from .measure import Measured

OURS = "sparseopt"
# By contestant, in the order of the columns.
NAMES = {
    OURS: "SparseOpt",
    "eager chain": "by hand",
    "eager chain, tuned": "by hand, tuned",
    "eager chain, tuned (sgd foreach)": "by hand, foreach",
    "sgd foreach, no mask": "SGD foreach, no mask",
    "sgd fused, no mask": "SGD fused, no mask",
}
_NO_MASK = ("sgd fused, no mask", "sgd foreach, no mask")
_NOTES = (
    "by hand: the same in plain PyTorch: scale and mask the gradients, torch.optim.SGD, mask the weights",
    "tuned: with masks of the dtype of the weights, all tensors in one call, and fused SGD (or foreach)",
    "no mask: dense torch.optim.SGD, which does less than is asked for",
)


def table(measured: Sequence[Measured]) -> list[str]:
    """Return a line for each sparsity: the median of each contestant, and in brackets its ratio to
    SparseOpt's."""
    shown = {name for m in measured for name in (*m.times, *m.wrong)}
    columns = [name for name in NAMES if name in shown]
    if not columns:
        return []
    header = ("sparsity", *(NAMES[name] for name in columns))
    rows = [(f"{m.sparsity:g}", *(_cell(m, name) for name in columns)) for m in measured]
    return [
        "Median milliseconds of a step; in brackets: how many times SparseOpt's",
        *aligned([header, *rows]),
        *_NOTES,
    ]


def verdict(measured: Measured) -> str:
    """Return a sentence on one sparsity."""
    start = f"At sparsity {measured.sparsity:g}"
    if OURS in measured.wrong:
        return f"{start} SparseOpt has {WRONG.upper()}: run `sparseopt doctor`, and please report its output."
    if not measured.times:
        return f"{start} nothing was measured, because time was up: name more --seconds or fewer --layers."
    own = measured.times[OURS]
    masked = _fastest({name: t for name, t in measured.times.items() if name not in (OURS, *_NO_MASK)})
    dense = _fastest({name: t for name, t in measured.times.items() if name in _NO_MASK})
    parts = [
        f"{speed(own, measured.times[name])} {what}"
        for name, what in (
            (masked, f"the fastest that plain PyTorch does with masks ({NAMES.get(masked or '')})"),
            (dense, NAMES.get(dense or "", "")),
        )
        if name is not None
    ]
    sentence = f"{start} a step of SparseOpt is " + " and ".join(parts) + "."
    wrong = [NAMES[name] for name in measured.wrong]
    return sentence + "".join(f" {name}: {WRONG}, not timed." for name in wrong)


def share_of_training(measured: Sequence[Measured], batch: int, training_pass: Summary) -> str:
    """Return a sentence on how much of a training step the optimizer is."""
    shares = [
        f"{100 * own / (own + training_pass.p50_ms):.2g}% at {m.sparsity:g}"
        for m in measured
        if OURS in m.times and (own := m.times[OURS].p50_ms)
    ]
    return (
        f"A forward and a backward pass of these layers, dense, with {batch} examples take "
        f"{training_pass.p50_ms:.3g} ms; of that and a step together, SparseOpt's step is "
        f"{', '.join(shares)}."
    )


def _cell(measured: Measured, name: str) -> str:
    if name in measured.wrong:
        return WRONG
    if name not in measured.times:
        return "-"
    ms = measured.times[name].p50_ms
    if name == OURS or OURS not in measured.times:
        return f"{ms:.3g}"
    return f"{ms:.3g} [{ms / measured.times[OURS].p50_ms:.2f}]"


def _fastest(times: Mapping[str, Summary]) -> str | None:
    return min(times, key=lambda name: times[name].p50_ms, default=None)
