"""The student and the teacher of Appendix A.1: model, data, trajectories, and the invariant of the flow.

``trajectory_rows.py`` keeps points of trajectories as rows. The experiments are in ``one_neuron.py``,
``two_neurons.py`` and ``balance.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu

from ...correction import Correction
from ...optimizer import SparseOpt

INPUTS = 10
RELEVANT = 2
"""The number of inputs that the teacher uses, from the first on; its other weights are zero."""
SAMPLES = 200
DENSE_STD = INPUTS**-0.5
"""The usual scale of a dense layer's weights, 1/sqrt(inputs); masked weights keep it."""
BN_EPS = 1e-5


class Students(nn.Module):
    """A batch of networks ``f(z) = sum_k a_k relu(gamma_k x_k + beta_k)``, where ``x_k`` is ``w_k z``
    normalised over all samples.

    They share nothing: each has its own inputs, so the gradient of the sum of their losses is that of each.

    Args:
        weight: ``w``, of shape ``(students, neurons, inputs)``.
        a: the outer weights, of shape ``(students, neurons)``. ``gamma`` is 1 and ``beta`` 0 at the start.
    """

    def __init__(self, weight: Tensor, a: Tensor) -> None:
        super().__init__()
        # A neuron is a row, as in a Linear layer. a has two dimensions, so that HAM treats it as a weight.
        self.weight = nn.Parameter(weight.flatten(0, 1).clone())
        self.a = nn.Parameter(a.clone())
        self.gamma = nn.Parameter(weight.new_ones(a.numel()))
        self.beta = nn.Parameter(weight.new_zeros(a.numel()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(students, samples, inputs)`` to ``(students, samples)``."""
        students, samples, width = inputs.shape
        x = inputs @ self.weight.view(students, -1, width).transpose(1, 2)
        rows = x.transpose(0, 1).reshape(samples, -1)
        y = batch_norm(rows, None, None, self.gamma, self.beta, training=True, eps=BN_EPS)
        hidden = relu(y).view(samples, students, -1)
        return (hidden * self.a).sum(2).T


class Tasks(NamedTuple):
    """The tasks of the students, one for each."""

    inputs: Tensor
    """i.i.d. N(0, 1), ``(students, samples, inputs)``."""
    outputs: Tensor
    """The outputs of the teachers, ``Students`` of one neuron with ``a = 1``: ``(students, samples)``."""
    directions: Tensor
    """The teachers' weights, of length 1: ``(students, inputs)``."""
    weights: Tensor
    """The students' initial weights, drawn from N(0, 1): ``(students, neurons, inputs)``."""


class Method(NamedTuple):
    """A training method."""

    lr: float
    correction: Correction = "none"
    """The scaling of ``w``. In a layer of one neuron Eq. 12 divides ``sqrt(1 - s)`` by itself, so c_i is 1:
    the paper's scaling of one neuron must be ``"unnormalized"``, D of Section 4.1 alone."""
    ham_alpha: float = 0.0
    """The strength of HAM; 0 is gradient descent."""


class Point(NamedTuple):
    """The students at a step."""

    step: int
    loss: Tensor
    """``(students,)``."""
    a: Tensor
    """``(students, neurons)``, as are ``gamma`` and ``beta``."""
    gamma: Tensor
    beta: Tensor
    weight: Tensor
    """``(students, neurons, inputs)``."""


def new_tasks(seeds: Sequence[int], neurons: int) -> Tasks:
    """Return a task for each seed, in float64. A seed's task does not depend on the other seeds."""
    inputs, directions, weights = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        inputs.append(torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64))
        direction = torch.zeros(INPUTS, dtype=torch.float64)
        direction[:RELEVANT] = torch.randn(RELEVANT, generator=generator, dtype=torch.float64)
        directions.append(direction / direction.norm())
        weights.append(torch.randn(neurons, INPUTS, generator=generator, dtype=torch.float64))
    z, w = torch.stack(inputs), torch.stack(directions)
    with torch.no_grad():
        outputs = Students(w[:, None], w.new_ones(len(w), 1))(z)
    return Tasks(inputs=z, outputs=outputs, directions=w, weights=torch.stack(weights))


def trajectory(students: Students, mask: Tensor, tasks: Tasks, method: Method, steps: int) -> Iterator[Point]:
    """Train on all samples at each step; yield the students before the first step and after each.

    Args:
        mask: the mask of every student's weights, True = active: ``(neurons, inputs)``. It is the same for
            all, so that Eq. 12 gives a student in a batch the same c_i as alone.
        steps: the number of steps; one more point is yielded.
    """
    shape = (*students.a.shape, mask.shape[1])
    masks = {students.weight: mask.repeat(len(students.a), 1)}
    with torch.no_grad():
        students.weight.mul_(masks[students.weight])
    optimizer = SparseOpt(
        students.parameters(),
        lr=method.lr,
        masks=masks,
        correction=method.correction,
        ham_alpha=method.ham_alpha,
    )
    for step in range(steps + 1):
        optimizer.zero_grad()
        losses = losses_of(students, tasks)
        a, gamma, beta, weight = (
            p.detach().clone() for p in (students.a, students.gamma, students.beta, students.weight)
        )
        yield Point(
            step=step,
            loss=losses.detach(),
            a=a,
            gamma=gamma.view_as(a),
            beta=beta.view_as(a),
            weight=weight.view(shape),
        )
        if step < steps:
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def losses_of(students: Students, tasks: Tasks) -> Tensor:
    """Return ``1/(2m) sum_j (y_j - f(z_j))^2`` of each student, the loss of Appendix A.1."""
    errors: Tensor = students(tasks.inputs) - tasks.outputs
    return errors.square().mean(1) / 2


def balance(a: Tensor, gamma: Tensor, beta: Tensor, ham_alpha: float) -> Tensor:
    """Return the invariant of the flow, ``2 * potential(a) - gamma^2 - beta^2``.

    With ``ham_alpha`` 0 it is ``a^2 - gamma^2 - beta^2`` of Lemma A.1, otherwise twice that of Lemma A.3.
    """
    return 2 * potential(a, ham_alpha) - gamma**2 - beta**2


def potential(a: Tensor, ham_alpha: float) -> Tensor:
    """Return the integral of ``p / (1 + ham_alpha |p|)`` from 0 to ``a``, in the closed form of Lemma A.3."""
    if ham_alpha == 0:
        return a**2 / 2
    x = ham_alpha * a.abs()
    return (x - x.log1p()) / ham_alpha**2


def radius_on_curve(a: Tensor, level: float, ham_alpha: float) -> Tensor:
    """Return ``sqrt(gamma^2 + beta^2)`` on the curve of balance ``level``; NaN where it has no point."""
    return (2 * potential(a, ham_alpha) - level).sqrt()


def angles(point: Point, directions: Tensor) -> Tensor:
    """Return the angles between the weights of neurons and teachers in degrees, ``(students, neurons)``.

    A neuron with negative ``gamma`` is the same as one with ``-w`` and ``-gamma``, so ``-w`` is taken then.
    """
    cosines = torch.cosine_similarity(point.weight, directions[:, None], dim=2) * point.gamma.sign()
    return cosines.clamp(-1, 1).acos().rad2deg()
