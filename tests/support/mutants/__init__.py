"""One mistake at a time that could be made in what is kept from step to step, and the test that finds it."""

from __future__ import annotations

from mutants.masks import MASKS
from mutants.preparation import PREPARATION
from mutants.sharded import SHARDED
from mutants.steps import STEPS

MUTANTS = {**PREPARATION, **STEPS, **MASKS, **SHARDED}
