"""One mistake at a time that could be made in what is kept from step to step, or in what the GPU backends ask
of a device, and the test that finds it."""

from __future__ import annotations

from mutants.gpu import GPU
from mutants.masks import MASKS
from mutants.preparation import PREPARATION
from mutants.sharded import SHARDED
from mutants.steps import STEPS
from sparseopt_kernels.kernels.gpu import triton

MUTANTS = {**PREPARATION, **STEPS, **MASKS, **SHARDED}
if triton._MISSING is None:  # which the tests of GPU backends need
    MUTANTS |= GPU
