"""Ctrl-C while masks are being updated: whatever was written is counted, and the next step is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels import cpu as native
from sparseopt_kernels.topology.gmp import GMP
from sparseopt_kernels.topology.native_drop_and_grow import NativeDropAndGrow
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

REASON = native.CPU.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}")


class InterruptedLibrary:
    """The library's updates, with an interrupt as soon as it has written."""

    def __init__(self, updates: Any) -> None:
        self._updates = updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._updates, name)

    def update(self, *arguments: Any) -> None:
        self._updates.update(*arguments)
        raise KeyboardInterrupt


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    make = NativeDropAndGrow.__init__

    def patched(self: NativeDropAndGrow, *arguments: Any) -> None:
        make(self, *arguments)
        self._updates = InterruptedLibrary(self._updates)  # type: ignore[assignment]

    monkeypatch.setattr(NativeDropAndGrow, "__init__", patched)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
}


def layers(mask_form: str, weight_form: str) -> dict[nn.Parameter, Tensor]:
    """Two layers and an optimizer's view of them: half of the 40 weights of each are active."""
    torch.manual_seed(0)
    masks = {}
    for _ in range(2):
        mask = torch.arange(40).view(5, 8) % 2 == 0
        parameter = nn.Parameter(FORMS[weight_form](torch.randn(5, 8) * mask))
        masks[parameter] = FORMS[mask_form](mask)
    return masks


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize("weight_form", FORMS)
@pytest.mark.parametrize("mask_form", FORMS)
@pytest.mark.parametrize("cls", [SET, RigL, GMP])
def test_what_changed_is_counted_and_the_next_step_is_right(
    cls: type[Any], mask_form: str, weight_form: str
) -> None:
    masks = layers(mask_form, weight_form)
    optimizer = SparseOpt(masks, lr=0.1, momentum=0.9, masks=masks, correction="none")
    dst = GMP(masks, 0.9, 1, stop_at=2) if cls is GMP else cls(masks, 1.0, 1, stop_at=float("inf"))
    for step in range(3):
        for parameter in masks:
            parameter.grad = torch.randn(5, 8)
        if step < 2:
            optimizer.step()
    before = {p: (mask.clone(), mask._version, p.detach().clone(), p._version) for p, mask in masks.items()}
    with pytest.raises(KeyboardInterrupt):
        dst.step()
    for parameter, mask in masks.items():
        old_mask, mask_version, old_values, version = before[parameter]
        if mask_form == "contiguous":
            assert not torch.equal(mask, old_mask)  # the interrupt came after the library had written
        assert torch.equal(mask, old_mask) or mask._version > mask_version
        assert torch.equal(parameter, old_values) or parameter._version > version
    momenta = {p: optimizer.state[p]["momentum_buffer"].clone() for p in masks}
    expected = {}
    for parameter, mask in masks.items():
        momentum = (0.9 * momenta[parameter] * mask + parameter.grad) * mask
        expected[parameter] = (parameter.detach() * mask - 0.1 * momentum, momentum)
    optimizer.step()
    for parameter, (weights, momentum) in expected.items():
        torch.testing.assert_close(parameter.detach(), weights)
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], momentum)
