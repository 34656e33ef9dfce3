"""The equations of the paper, each against what a network or the optimizer does.

Tolerances of statistical tests are five standard errors, which follow from the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from backends import Backend
from side_by_side import same_bits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parameter import Parameter

import sparseopt_kernels as sk
from sparseopt_kernels.lab.reproduce.gradient_ratio import (
    BATCH_SIZE,
    BATCHES,
    HIDDEN,
    Images,
    measure_gradients,
)

SAMPLES = 100_000
SIGMA_W, SIGMA_H = 0.3, 1.7
ERRORS = 5.0
TINY = 1e-30  # epsilon of normalisations, which the equations leave out


def pre_activations(masks: Tensor, seed: int) -> Tensor:
    """x_i of Eq. 3, ``(samples, neurons)``: each sample has its own Gaussian weights and activations."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(SAMPLES // 1000):
        weights = SIGMA_W * torch.randn(1000, *masks.shape, generator=generator)
        activations = SIGMA_H * torch.randn(1000, masks.shape[1], generator=generator)
        parts.append(torch.einsum("bij,bj->bi", weights * masks, activations))
    return torch.cat(parts).double()


def variance_error(fan_in: float) -> float:
    """The relative standard error of a variance: sqrt((kurtosis - 1) / samples). A product of two Gaussians
    has kurtosis 9, a sum of fan_in of them 3 + 6 / fan_in."""
    return math.sqrt((2.0 + 6.0 / fan_in) / SAMPLES)


def heterogeneous() -> tuple[Tensor, Tensor]:
    """A mask of ``sparsify``, ``(8, 30)``, and the fan-in of its neurons."""
    layer = nn.utils.skip_init(nn.Linear, 30, 8)
    masks = sk.sparsify(layer, sparsity=0.6, distribution="uniform", seed=1)
    fan_in = masks.fan_in(layer.weight)
    assert fan_in.unique().numel() >= 4
    return masks[layer.weight], fan_in


@pytest.mark.parametrize("fan_in", [5, 40])
def test_equations_5_and_6_scale_of_a_homogeneous_layer(fan_in: int) -> None:
    masks = torch.zeros(4, 40, dtype=torch.bool)
    masks[:, :fan_in] = True
    variance = pre_activations(masks, seed=fan_in).var(dim=0)
    tolerance = ERRORS * variance_error(fan_in)
    expected = fan_in * SIGMA_W**2 * SIGMA_H**2
    torch.testing.assert_close(
        variance, torch.full_like(variance, expected), rtol=tolerance, atol=0.0, msg="Eq. 5"
    )
    deviation = torch.full_like(variance, math.sqrt(fan_in) * SIGMA_W * SIGMA_H)
    torch.testing.assert_close(variance.sqrt(), deviation, rtol=tolerance / 2, atol=0.0, msg="Eq. 6")


def test_equation_7_variance_of_a_heterogeneous_layer() -> None:
    mask, fan_in = heterogeneous()
    variance = pre_activations(mask, seed=7).var(dim=0)
    for measured, own in zip(variance.tolist(), fan_in.tolist(), strict=True):
        expected = own * SIGMA_W**2 * SIGMA_H**2
        assert measured == pytest.approx(expected, rel=ERRORS * variance_error(own)), "Eq. 7"


def test_equation_8_standard_deviation_shrinks_with_sparsity() -> None:
    mask, fan_in = heterogeneous()
    sparse = pre_activations(mask, seed=8).std(dim=0)
    dense = pre_activations(torch.ones_like(mask), seed=88).std(dim=0)
    sparsity = 1.0 - fan_in / mask.shape[1]
    for measured, s, own in zip((sparse / dense).tolist(), sparsity.tolist(), fan_in.tolist(), strict=True):
        # Half the error of a variance each, of independent samples.
        error = 0.5 * math.hypot(variance_error(own), variance_error(mask.shape[1]))
        assert measured == pytest.approx(math.sqrt(1.0 - s), rel=ERRORS * error), "Eq. 8"


def batch_norm_terms(x: Tensor, upstream: Tensor) -> Tensor:
    """C_i of Eq. 9, ``(batch, neurons)``; ``upstream`` is dL/dx̂."""
    normalised = (x - x.mean(0)) / x.std(0, correction=0)
    return upstream - upstream.mean(0) - normalised * (upstream * normalised).mean(0)


def batch_norm_gradient(x: Tensor, upstream: Tensor) -> Tensor:
    """dL/dx by PyTorch."""
    x = x.clone().requires_grad_()
    y = F.batch_norm(x, None, None, training=True, eps=TINY)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return gradient


def test_equation_9_backward_pass_of_batch_norm() -> None:
    generator = torch.Generator().manual_seed(9)
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    x = scales * torch.randn(64, 3, generator=generator, dtype=torch.float64) + 2.0
    upstream = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    terms = batch_norm_terms(x, upstream)
    expected = terms / x.std(0, correction=0)
    torch.testing.assert_close(batch_norm_gradient(x, upstream), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(batch_norm_terms(7.0 * x, upstream), terms, rtol=1e-9, atol=1e-12)


def test_equation_10_gradient_of_a_pre_activation_that_shrinks() -> None:
    """x' = sqrt(1 - s) x, as Eq. 8 has it: the gradient grows by 1 / sqrt(1 - s)."""
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    upstream = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    sparsity = torch.tensor([0.0, 0.5, 0.9, 0.95, 0.99], dtype=torch.float64)
    measured = batch_norm_gradient((1.0 - sparsity).sqrt() * x, upstream)
    expected = batch_norm_gradient(x, upstream) / (1.0 - sparsity).sqrt()
    torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-12)


INPUTS = 1000
GROUPS = (0.5, 0.8, 0.95, 0.98)  # of a quarter of the neurons each


def noise(seed: int) -> Images:
    """Pixels that are independent and identically distributed, as the paper assumes."""
    generator = torch.Generator().manual_seed(seed)
    count = BATCHES * BATCH_SIZE
    pixels = torch.randint(256, (count, INPUTS), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
    return Images("noise", pixels, labels, 127.5, math.sqrt((256**2 - 1) / 12))


def mask_of(sparsities: Sequence[float], seed: int) -> Tensor:
    """Each neuron has exactly the fan-in of its sparsity."""
    order = torch.rand(len(sparsities), INPUTS, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < torch.tensor([[round((1.0 - s) * INPUTS)] for s in sparsities])


def ratio_error(sparsity: float, neurons: int) -> float:
    """The relative standard error of the ratio of a group of neurons under a norm.

    1/sigma' of a neuron varies with its Gaussian weights by 1/sqrt(2 fan_in) (that of the dense one much
    less). What the classifier says differs between the two networks too: over seeds, groups of neurons that
    share none of it differed by 0.04/sqrt(neurons).
    """
    fan_in = (1.0 - sparsity) * INPUTS
    return math.hypot(1.0 / math.sqrt(2.0 * fan_in), 0.04) / math.sqrt(neurons)


def test_equation_11_gradients_of_neurons_under_batch_norm() -> None:
    mask = mask_of([s for s in GROUPS for _ in range(HIDDEN // 4)], seed=11)
    batch, none = (measure_gradients(norm, [mask], noise(11), seed=11) for norm in ("batch", "none"))
    for i, s in enumerate(GROUPS):
        group = slice(i * HIDDEN // 4, (i + 1) * HIDDEN // 4)
        tolerance = ERRORS * ratio_error(s, HIDDEN // 4)
        assert batch.ratio(0, group) == pytest.approx(1.0 / math.sqrt(1.0 - s), rel=tolerance), "Eq. 11"
        assert none.ratio(0, group) == pytest.approx(1.0, rel=ERRORS * ratio_error(GROUPS[0], HIDDEN // 4))


def random_layer(dtype: torch.dtype) -> tuple[Parameter, Tensor, Tensor]:
    """A weight with a gradient, ``(6, 20)``, a mask with a fan-in from 1 to 16, and one of fan-in 5."""
    generator = torch.Generator().manual_seed(12)
    weight, gradient = (torch.randn(6, 20, generator=generator, dtype=dtype) for _ in range(2))
    fan_in = torch.tensor([[1], [2], [4], [8], [12], [16]])
    order = torch.rand(6, 20, generator=generator).argsort(dim=1)
    parameter = Parameter(weight)
    parameter.grad = gradient
    return parameter, order < fan_in, order < 5


def test_equation_12_first_step_of_sparseopt(backend: Backend) -> None:
    weight, mask, _ = random_layer(torch.float64)
    before = weight.detach().clone()
    sk.SparseOpt([weight], lr=0.1, masks={weight: mask}, backend=backend.name).step()
    s = 1.0 - mask.double().mean(dim=1)
    d = torch.diag((1.0 - s).sqrt())
    assert weight.grad is not None
    expected = before - 0.1 / math.sqrt(1.0 - s.mean()) * (d @ weight.grad)
    torch.testing.assert_close(weight.detach(), mask * expected, rtol=1e-13, atol=0.0)


@pytest.mark.same_bits_as_sgd
def test_equation_12_is_plain_sgd_for_a_homogeneous_layer(backend: Backend) -> None:
    weight, _, mask = random_layer(torch.float64)
    plain = Parameter(weight.detach().clone())
    assert weight.grad is not None
    plain.grad = weight.grad.clone()
    sk.SparseOpt([weight], lr=0.1, masks={weight: mask}, backend=backend.name).step()
    torch.optim.SGD([plain], lr=0.1, foreach=False).step()
    assert same_bits(weight.detach(), torch.where(mask, plain.detach(), 0.0))


def test_equation_14_backward_pass_of_layer_norm() -> None:
    """With a factor 1/N_l in its last term, which the paper's print lacks."""
    generator = torch.Generator().manual_seed(14)
    x = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(50, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(F.layer_norm(x, (50,), eps=TINY), x, upstream)
    with torch.no_grad():
        n, centred, sigma = len(x), x - x.mean(), x.std(correction=0)
        scaled = (n * torch.eye(n, dtype=torch.float64) - 1.0) / (n * sigma)
        last = torch.outer(centred, centred) / sigma**3
        torch.testing.assert_close(gradient, (scaled - last / n) @ upstream, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(gradient, (scaled - last) @ upstream, rtol=0.1)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_equations_15_and_16_scale_under_uniform_sparsity(sparsity: float) -> None:
    neurons, inputs = 10, 40
    fan_in = round((1.0 - sparsity) * inputs)
    masks = torch.arange(inputs).repeat(neurons, 1) < fan_in
    sparse = pre_activations(masks, seed=15)
    dense = pre_activations(torch.ones_like(masks), seed=16)
    # Neurons of a sample share its activations, so many neurons are not worth more than one.
    error = math.hypot(variance_error(fan_in), variance_error(inputs))
    ratio = sparse.var(dim=0) / dense.var(dim=0)
    torch.testing.assert_close(
        ratio, torch.full_like(ratio, 1.0 - sparsity), rtol=ERRORS * error, atol=0.0, msg="Eq. 15"
    )
    sigma_ln = sparse.var(dim=1, correction=0).mean().item()
    of_a_neuron = (1.0 - sparsity) * inputs * SIGMA_W**2 * SIGMA_H**2
    # The paper leaves out the mean over the layer, which takes 1/N_l of it.
    assert sigma_ln == pytest.approx(of_a_neuron * (1.0 - 1.0 / neurons), rel=ERRORS * error), "Eq. 16"


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_appendix_d_gradients_under_layer_norm_and_uniform_sparsity(sparsity: float) -> None:
    gradients = measure_gradients("layer", [mask_of([sparsity] * HIDDEN, seed=16)], noise(16), seed=16)
    tolerance = ERRORS * ratio_error(sparsity, HIDDEN)
    assert gradients.ratio(0) == pytest.approx(1.0 / math.sqrt(1.0 - sparsity), rel=tolerance)


def test_layer_norm_scales_neurons_of_different_sparsity_alike() -> None:
    """Which the paper leaves open: 1 / sqrt(1 - s_avg) for all of them."""
    mask = mask_of([s for s in GROUPS for _ in range(HIDDEN // 4)], seed=17)
    gradients = measure_gradients("layer", [mask], noise(17), seed=17)
    common = 1.0 / math.sqrt(1.0 - sum(GROUPS) / len(GROUPS))
    for i, s in enumerate(GROUPS):
        group = slice(i * HIDDEN // 4, (i + 1) * HIDDEN // 4)
        # No 1/sigma' of its own: the weights of the densest neurons decide on that of the layer.
        tolerance = ERRORS * ratio_error(min(GROUPS), HIDDEN // 4)
        assert gradients.ratio(0, group) == pytest.approx(common, rel=tolerance), s
