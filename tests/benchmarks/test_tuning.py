"""``make tuning``: each constant is where it is said to be, and each work can be made."""

from __future__ import annotations

import re

import pytest
import tuning

from sparseopt_kernels import native_library


@pytest.mark.parametrize("constant", tuning.CONSTANTS, ids=lambda constant: constant.name)
def test_a_constant_is_in_its_file(constant: tuning.Constant) -> None:
    source = (tuning.ROOT / "csrc" / "cpu" / constant.file).read_text()
    ((_, value),) = re.findall(constant.definition, source)
    assert value not in constant.values
    assert set(constant.works) <= tuning.WORKS.keys()


@pytest.mark.skipif(bool(native_library.MISSING), reason="the native library was not built")
@pytest.mark.parametrize("work", ["ResNet-20 0.9", "small layers", "small RigL update"])
def test_work_can_be_made(work: str) -> None:
    tuning.WORKS[work]()()
