"""The benchmark of mask updates: that its table is complete. No times are looked at."""

from __future__ import annotations

import mask_update
import pytest
import torch

from sparseopt_kernels import native_library


@pytest.mark.skipif(native_library.MISSING is not None, reason="there is no native library to measure")
def test_each_network_and_dtype_has_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"small": ([(30, 20), (10, 4, 3, 3)], "erk"), "smaller": ([(4, 6)], "uniform")}
    monkeypatch.setattr(mask_update, "_NETWORKS", small)
    arguments = [
        "--rounds",
        "2",
        "--threads",
        str(torch.get_num_threads()),
        "--dtypes",
        "float32",
        "bfloat16",
    ]
    assert mask_update.main(arguments) == 0
    _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["dtype", "step"]
    names = [row.split()[:2] for row in rows]
    expected = [[name, dtype] for name in small for dtype in ("float32", "bfloat16")]
    assert names[:4] == expected
    assert [row.split()[0] for row in rows[-2:]] == list(small)
