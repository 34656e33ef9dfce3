"""What SET and RigL refuse or warn of."""

import math
import subprocess
import sys

import pytest
import torch
from by_hand import bits
from torch import nn

from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

BOTH = pytest.mark.parametrize("cls", [SET, RigL])


@BOTH
class TestBadInput:
    def make(self, cls, masks=None, **options):
        if masks is None:
            masks = {nn.Parameter(torch.ones(3)): torch.ones(3, dtype=torch.bool)}
        return cls(masks, **{"stop_at": 10, **options})

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
    def test_drop_fraction(self, cls, value):
        with pytest.raises(ValueError, match=rf"drop_fraction is {value}, it must be in \[0, 1\]"):
            self.make(cls, drop_fraction=value)

    @pytest.mark.parametrize("value", [0, -5, 2.5, math.nan])
    def test_update_every(self, cls, value):
        with pytest.raises(ValueError, match=f"update_every is {value}, it must be an integer of at least 1"):
            self.make(cls, update_every=value)

    @pytest.mark.parametrize("value", [0, -1, math.nan])
    def test_stop_at(self, cls, value):
        with pytest.raises(ValueError, match=f"stop_at is {value}, it must be positive"):
            self.make(cls, stop_at=value)

    def test_masks(self, cls):
        with pytest.raises(ValueError, match="masks is empty"):
            self.make(cls, {})
        parameter = nn.Parameter(torch.ones(2, 3))
        with pytest.raises(ValueError, match=r"'parameter 0' has shape \(3, 2\), the parameter has \(2, 3\)"):
            self.make(cls, {parameter: torch.ones(3, 2, dtype=torch.bool)})
        with pytest.raises(ValueError, match=r"dtype torch\.uint8, it must be torch\.bool"):
            self.make(cls, {parameter: torch.ones(2, 3, dtype=torch.uint8)})
        with pytest.raises(ValueError, match=r"'parameter 0' has dtype torch\.float32 and 6 values"):
            self.make(cls, {parameter: torch.full((2, 3), 0.5)})

    def test_names_as_keys(self, cls):
        with pytest.raises(TypeError, match=r"masks has the key '0\.weight', keys must be parameters"):
            self.make(cls, {"0.weight": torch.ones(3, dtype=torch.bool)})

    def test_a_mask_that_fits_no_more(self, cls):
        """Nothing has been written then, of the other layer either."""
        masks = {nn.Parameter(torch.arange(1.0, 7)): bits("111000") for _ in range(2)}
        for parameter in masks:
            parameter.grad = torch.ones(6)
        dst = self.make(cls, masks, update_every=2, stop_at=100)
        dst.step()
        first, second = masks
        masks[second] = bits("1100")
        with pytest.raises(ValueError, match=r"'parameter 1' has shape \(4,\), the parameter has \(6,\)"):
            dst.step()
        masks[second] = bits("111000")
        assert masks[first].tolist() == bits("111000").tolist()
        assert first.tolist() == [1, 2, 3, 4, 5, 6]
        assert dst.state_dict()["step"] == 1


def test_unknown_regrow():
    with pytest.raises(ValueError, match="regrow is 'best', it must be 'original' or 'corrected'"):
        RigL({nn.Parameter(torch.ones(3)): bits("111")}, stop_at=10, regrow="best")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_order_of_imports_does_not_matter():
    program = """
import importlib, sys
for module in ("topology.set", "topology.selection", "topology.densities", "masks"):
    importlib.import_module("sparseopt_kernels." + module)
    for name in [name for name in sys.modules if name.startswith("sparseopt_kernels")]:
        del sys.modules[name]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("method", [SET, RigL])
def test_masks_that_will_never_change_are_warned_of(method):
    layer = nn.Linear(4, 4)
    masks = {layer.weight: torch.eye(4, dtype=torch.bool)}
    with pytest.warns(UserWarning, match="the masks will never change"):
        method(masks, update_every=100, stop_at=60.75)


def test_rigl_has_no_seed():
    masks = {nn.Parameter(torch.ones(3)): bits("111")}
    with pytest.raises(TypeError, match="seed"):
        RigL(masks, stop_at=200, seed=0)  # type: ignore[call-arg]
    assert "seed" not in RigL(masks, stop_at=200).state_dict()
    assert "seed" in SET(masks, stop_at=200).state_dict()
    with pytest.raises(ValueError, match=r"state_dict has keys .*'seed'.*, it must have"):
        RigL(masks, stop_at=200).load_state_dict({**RigL(masks, stop_at=200).state_dict(), "seed": 0})
