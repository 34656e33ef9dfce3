"""The measurements of the experiment ``skew`` at each step of a run: angles between gradients, the spread of
the neurons, and the angle by which each neuron turns.

``skew.py`` chooses the runs and reports the results. All angles are in degrees. A layer's weight is taken as
a matrix with a row per neuron: dimension 0 of a ``Linear`` or ``Conv`` weight.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from ...correction import mask_factors
from ...neurons import Neurons, fan_in
from ..training.run import Run
from .experiment import Row

WINDOW = 25
"""The number of steps over which a neuron's measurements are averaged. No mask changes inside a window."""
PERIOD = 100
"""The number of steps of a row of the results: four windows."""
QUARTERS = 4


class Gradient(NamedTuple):
    """The gradient of a layer, and the mask under which it was computed; both ``(neurons, ...)``."""

    values: Tensor
    mask: Tensor

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient ``g`` and the corrected one, ``c_i * g`` (Eq. 12), at flat indices: vectors."""
        factors = mask_factors(self.mask, Neurons()).flatten().to(self.values.dtype)
        raw = self.values.flatten()[places]
        return raw, raw * factors[places // (self.mask.numel() // len(factors))]


class Angles(NamedTuple):
    """The angles between two gradients, on the weights that are active under both masks."""

    raw: float
    corrected: float
    """The angle with each gradient corrected under its own mask."""


class Rotation(NamedTuple):
    """The effect of a change of the mask on the gradient of one and the same batch, all other weights equal.

    It is measured on the weights that are active under both masks. The gradient of neuron i gets another norm
    (in the paper's account, the skew of batch norm) and another direction (because the function changes).
    """

    raw: float
    """The whole angle."""
    corrected: float
    """The whole angle, each gradient corrected under its own mask."""
    within_neurons: float
    """The angle if each neuron's gradient is rescaled to its former norm."""
    scale_alone: float
    """The angle if only the norm of each neuron's gradient had changed: the part that a factor could undo."""
    predicted: float
    """The angle if each neuron's gradient had been multiplied by sqrt(fan_in / new fan_in): Eq. 11."""
    correction_alone: float
    """The angle by which the correction turns an unchanged gradient, because c_i changes with the mask."""
    exponent: float
    """The slope of log(norm ratio) over log(fan-in ratio) across neurons: -0.5 in Eq. 11, 0 for no skew.
    NaN if no fan-in has changed."""


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between two tensors, taken as vectors, in [0, 180]; NaN if one of them is 0."""
    return float(row_angles(a.reshape(1, -1), b.reshape(1, -1)))


def row_angles(a: Tensor, b: Tensor) -> Tensor:
    """Return the angles between the rows of ``a`` and ``b``, ``(neurons,)``; NaN where a row is 0."""
    a, b = a.flatten(1), b.flatten(1)
    lengths = a.norm(dim=1), b.norm(dim=1)
    # By the chord between the unit vectors, because the arc cosine is inaccurate for small angles.
    squared = (a - b).norm(dim=1).square() - (lengths[0] - lengths[1]).square()
    half_chord = (squared.clamp(min=0) / (lengths[0] * lengths[1])).sqrt() / 2
    return torch.rad2deg(2 * half_chord.clamp(max=1).asin())


def angles(before: Gradient, after: Gradient) -> Angles:
    """Return the angles between the gradients of two steps."""
    shared = (before.mask & after.mask).flatten().nonzero().flatten()
    pairs = zip(before.at(shared), after.at(shared), strict=True)
    return Angles(*(angle(old, new) for old, new in pairs))


def rotation(before: Gradient, after: Gradient) -> Rotation:
    """Return the effect of the change from ``before.mask`` to ``after.mask`` on the gradient of a batch."""
    shared = before.mask & after.mask
    old, new = before.values * shared, after.values * shared
    norm_ratio = _norms(new) / _norms(old)
    alive = norm_ratio.isfinite() & (norm_ratio > 0)  # dead neurons have no gradient
    fan_in_ratio = fan_in(after.mask, Neurons()) / fan_in(before.mask, Neurons())
    usable = alive & fan_in_ratio.isfinite() & (fan_in_ratio > 0)
    norm_factor = _per_neuron(torch.where(alive, norm_ratio, 1.0), old)
    skew = _per_neuron(torch.where(usable, fan_in_ratio.rsqrt(), 1.0), old)
    raw, corrected = angles(before, after)
    return Rotation(
        raw=raw,
        corrected=corrected,
        within_neurons=angle(old, new / norm_factor),
        scale_alone=angle(old, old * norm_factor),
        predicted=angle(old, old * skew),
        correction_alone=angles(before, Gradient(before.values, after.mask)).corrected,
        exponent=slope(fan_in_ratio[usable].log(), norm_ratio[usable].log()),
    )


def slope(x: Tensor, y: Tensor) -> float:
    """Return the slope of the least-squares line through points ``(x, y)``; NaN if all ``x`` are equal, or if
    there are none."""
    x, y = x.double(), y.double()
    deviation = x - x.mean()
    variance = deviation.square().sum()
    return float((deviation * y).sum() / variance) if variance > 1e-12 else math.nan


def spread(values: Tensor) -> float:
    """Return the coefficient of variation, population standard deviation over mean; NaN if the mean is 0."""
    values = values.double()
    mean = values.mean()
    return float(values.std(correction=0) / mean) if mean != 0 else math.nan


def quarter_means(values: Tensor, by: Tensor) -> list[float]:
    """Return the means of ``values`` over the quarters by ``by``, smallest first."""
    ordered = values[by.argsort(stable=True)]
    return [float(part.mean()) if len(part) else math.nan for part in ordered.tensor_split(QUARTERS)]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation, with mean ranks for equal values; NaN if ``a`` or ``b`` is constant."""
    deviations = [ranks - ranks.mean() for ranks in map(_ranks, (a, b))]
    norms = deviations[0].norm() * deviations[1].norm()
    return float((deviations[0] * deviations[1]).sum() / norms) if norms > 0 else math.nan


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1).double() / 2
    return ranks[place]


def equilibrium_angle(lr: float, weight_decay: float, momentum: float) -> float:
    """Return the angle per step at which the norm of a scale-invariant neuron neither grows nor shrinks.

    The gradients of such a neuron are orthogonal to it and proportional to 1/norm. If they are uncorrelated,
    each step adds ``(lr * |g| / (1 - momentum))**2`` to its squared norm and removes the fraction ``2 * lr *
    weight_decay / (1 - momentum)``. When these are equal, a step turns it by ``sqrt(2 * lr * weight_decay /
    (1 + momentum))`` radians, whatever factor its gradient has (Wan et al. 2021, Kosson et al. 2023).
    """
    return math.degrees(math.sqrt(2 * lr * weight_decay / (1 + momentum)))


def gradients_under(
    run: Run, parameters: dict[str, Tensor], masks: dict[str, Tensor], layers: Sequence[str]
) -> dict[str, Tensor]:
    """Return the gradients of ``layers`` for the run's last batch with other parameters; the run does not
    change.

    Args:
        run: the run whose network and last batch are used.
        parameters: all parameters of the network, by name.
        masks: the masks to apply, by the name of the weight.
        layers: the names of weights.
    """
    inputs = {
        name: (p * masks[name] if name in masks else p).detach().requires_grad_()
        for name, p in parameters.items()
    }
    # Copies, because batch norm writes its running statistics into the buffers.
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    images, labels = run.batch
    loss = F.cross_entropy(functional_call(run.model, {**inputs, **buffers}, (images,)), labels)
    gradients = torch.autograd.grad(loss, [inputs[name] for name in layers])
    return dict(zip(layers, gradients, strict=True))


class Window(NamedTuple):
    """Measurements of a layer's neurons over ``WINDOW`` steps with the same mask; each ``(neurons,)``."""

    fan_in: Tensor
    factors: Tensor
    """The factors c_i."""
    norms: Tensor
    """The norms of their weights at the end of the window."""
    squares: Tensor
    """The mean over the steps of the squared norm of their gradients, on the active weights."""
    turns: Tensor
    """The mean angle by which they turned in a step."""

    def gradient_rms(self) -> Tensor:
        """Return the root mean square of the active entries of each neuron's gradient."""
        return (self.squares / self.fan_in).sqrt()

    def summary(self, former: Window | None) -> dict[str, float]:
        """Return the columns of ``COLUMNS`` on neurons. Neurons without fan-in or gradient are left out.

        Args:
            former: the window before this one, if there was one.
        """
        rms = self.gradient_rms()
        there = (self.fan_in > 0) & (self.norms > 0) & (rms > 0) & self.turns.isfinite()
        log_fan_in = self.fan_in.double().log()
        turns, by = self.turns[there], self.fan_in[there]
        summary = {
            "fan_in_spread": spread(self.fan_in),
            "c_spread": spread(self.factors),
            "c_largest": float(self.factors.max()),
            "gradient_exponent": slope(log_fan_in[there], rms[there].log()),
            "norm_exponent": slope(log_fan_in[there], self.norms[there].log()),
            "turn": float(turns.mean()),
            "turn_rank_correlation": rank_correlation(by, turns),
        }
        quarters = quarter_means(turns, by)
        summary |= {f"turn_quarter_{i}": value for i, value in enumerate(quarters, start=1)}
        if former is not None:
            changes = log_fan_in - former.fan_in.double().log(), (rms / former.gradient_rms()).log()
            both = changes[0].isfinite() & changes[1].isfinite()
            summary["later_exponent"] = slope(changes[0][both], changes[1][both])
        return summary


class Probe:
    """A probe that measures a run after each step, in ``run.train_epoch(probe)``. It does not change the run.

    Args:
        run: a new run; its ``update_every`` must be a multiple of ``WINDOW``.
        layers: the names of masked weights to measure, meant to be those that feed batch norm.

    Raises:
        ValueError: ``update_every`` is no multiple of ``WINDOW``, or the masks of the run are static.
    """

    def __init__(self, run: Run, layers: Sequence[str]) -> None:
        if run.topology is None:
            raise ValueError("run has static masks, they must change: method 'set' or 'rigl'")
        if run.config.update_every % WINDOW:
            raise ValueError(f"update_every is {run.config.update_every}, it must be a multiple of {WINDOW}")
        self._run = run
        self._topology = run.topology
        self._layers = {name: run.masks.named()[name] for name in layers}
        self._step = 0
        self._masks = self._current_masks()
        self._parameters = self._current_parameters()
        self._last: dict[str, Gradient] = {}
        self._mask_has_changed = False
        self._lr = 0.0
        self._windows: dict[str, Window] = {}
        self._turned: dict[str, list[Tensor]] = defaultdict(list)
        self._squares: dict[str, list[Tensor]] = defaultdict(list)
        self._seen: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    @torch.no_grad()
    def __call__(self) -> None:
        """Measure the step that has just been made."""
        self._step += 1
        gradients: dict[str, Gradient] = {}
        for name, parameter in self._layers.items():
            assert parameter.grad is not None
            gradients[name] = Gradient(parameter.grad, self._masks[name])
        for name, last in self._last.items():
            kind = "update" if self._mask_has_changed else "ordinary"
            raw, corrected = angles(last, gradients[name])
            self._record(name, f"{kind}_raw", raw)
            self._record(name, f"{kind}_corrected", corrected)
        for name, (values, mask) in gradients.items():
            self._squares[name].append(_norms(values * mask).square())
        if self._topology.updated:
            self._look_at_update(gradients)
        else:
            for name, parameter in self._layers.items():
                self._turned[name].append(row_angles(self._parameters[name], parameter))
        if self._step % WINDOW == 0:
            self._close_window()
        self._last = gradients
        self._mask_has_changed = self._topology.updated
        if self._topology.updated:
            self._masks = self._current_masks()
        self._parameters = self._current_parameters()
        # The schedule has moved on to the rate of the next step.
        self._lr = float(self._run.optimizer.param_groups[0]["lr"])

    def _look_at_update(self, gradients: dict[str, Gradient]) -> None:
        masks = self._current_masks()
        with torch.enable_grad():
            values = gradients_under(self._run, self._parameters, masks, list(self._layers))
        for name, before in gradients.items():
            for column, value in rotation(before, Gradient(values[name], masks[name]))._asdict().items():
                self._record(name, f"same_batch_{column}", value)

    def _close_window(self) -> None:
        for name, parameter in self._layers.items():
            mask = self._masks[name]
            turns = torch.stack(self._turned.pop(name)).nanmean(dim=0)
            squares = torch.stack(self._squares.pop(name)).mean(dim=0)
            factors = mask_factors(mask, Neurons()).flatten()
            window = Window(
                fan_in=fan_in(mask, Neurons()),
                factors=factors,
                norms=_norms(parameter),
                squares=squares,
                turns=turns,
            )
            for column, value in window.summary(self._windows.get(name)).items():
                self._record(name, column, value)
            self._windows[name] = window
            group = self._run.optimizer.param_groups[0]
            predicted = equilibrium_angle(self._lr, group["weight_decay"], group["momentum"])
            self._record(name, "turn_predicted", predicted)

    def _record(self, layer: str, column: str, value: float) -> None:
        period = -(-self._step // PERIOD) * PERIOD
        self._seen[period, layer][column].append(value)

    def rows(self) -> list[Row]:
        """Return one row per layer and finished period: the means over the period, by ``COLUMNS``.

        A mean is NaN if nothing was measured: no mask changes in the last quarter of a run.
        """
        return [
            {"layer": layer, "step": period, **{c: _mean(seen[c]) for c in COLUMNS}}
            for (period, layer), seen in self._seen.items()
            if period <= self._step
        ]

    def _current_masks(self) -> dict[str, Tensor]:
        return {name: self._run.masks[p].clone() for name, p in self._run.masks.named().items()}

    def _current_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._run.model.named_parameters()}


COLUMNS = (
    *("ordinary_raw", "ordinary_corrected", "update_raw", "update_corrected"),
    *(f"same_batch_{column}" for column in Rotation._fields),
    "later_exponent",
    *("fan_in_spread", "c_spread", "c_largest", "gradient_exponent", "norm_exponent"),
    *("turn", "turn_predicted", "turn_rank_correlation"),
    *(f"turn_quarter_{quarter}" for quarter in range(1, QUARTERS + 1)),
)
"""The measured columns of a row, as means over a layer and a period.

``ordinary_*`` and ``update_*``: ``Angles`` between the gradients of consecutive steps with the same mask, and
with a mask update between them. ``same_batch_*``: ``Rotation``. ``later_exponent``: as its ``exponent``, but
of the root mean square of the active gradient, from the window before a mask update to the window after, when
grown weights are no longer 0. ``*_spread``: coefficients of variation over neurons. ``gradient_exponent`` and
``norm_exponent``: the slopes over log(fan-in), across neurons, of the log root mean square of the active
gradient (-0.5 in Eq. 11), and of log norm(w_i) (0.5 if all weights have the same distribution). ``turn*``:
the angle by which a neuron turns in a step, as a mean over all neurons and over quarters of them by fan-in,
smallest first.
"""


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _norms(values: Tensor) -> Tensor:
    """Return the norm of each neuron's row, ``(neurons,)``."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms


def _per_neuron(values: Tensor, like: Tensor) -> Tensor:
    """Reshape a number per neuron so that it broadcasts against a weight."""
    return values.view(-1, *[1] * (like.ndim - 1))
