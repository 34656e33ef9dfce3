"""The norm over all positions that PyTorch computes for the GPU backends, here of tensors on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseopt_kernels.correction import Factors
from sparseopt_kernels.kernels.contract import Inputs, ParamState
from sparseopt_kernels.kernels.gpu.dense_norm import dense_squared_norm
from sparseopt_kernels.neurons import Neurons


def state(mask: Tensor, neurons: Neurons) -> ParamState:
    return ParamState(
        parameter=torch.zeros(mask.shape),
        momentum_buffer=None,
        mask=mask,
        given_mask=mask,
        gradient_dtype=torch.float32,
        dim_order=None,
        neurons=neurons,
        rule=0,
        ham=False,
    )


@pytest.mark.parametrize(
    ("shape", "neurons", "values"),
    [
        ((3, 5), Neurons(), lambda c: c.view(3, 1)),
        ((3, 2, 4), Neurons(), lambda c: c.view(3, 1, 1)),
        ((4, 3, 2), Neurons(dim=1), lambda c: c.view(1, 3, 1)),
        (
            (4, 3, 2),
            Neurons(dim=1, groups=2),
            lambda c: c.view(2, 3).repeat_interleave(2, dim=0).view(4, 3, 1),
        ),
    ],
    ids=["Linear", "Conv", "ConvTranspose", "grouped ConvTranspose"],
)
def test_all_positions_count_with_the_factor_of_their_neuron(
    shape: tuple[int, ...], neurons: Neurons, values: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.3
    gradients = [torch.randn(shape), torch.randn(7), torch.zeros(0)]
    c = torch.rand(neurons.count(shape)) + 0.5
    params = [state(mask, neurons), *(state(torch.ones_like(g) > 0, Neurons()) for g in gradients[1:])]
    inputs = Inputs(gradients=gradients, addresses=b"", rules=(), grad_scale=None, found_inf=None)
    found = dense_squared_norm(params, [Factors(c=c, divisor=torch.ones(())), None, None], inputs)
    expected = (gradients[0] * values(c)).double().square().sum() + gradients[1].double().square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
