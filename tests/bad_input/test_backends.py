"""Backends that are unknown or cannot run."""

from __future__ import annotations

import re

import pytest
import torch
from refusals import weights, words
from side_by_side import same_bits
from torch.nn.parameter import Parameter

from sparseopt_kernels import kernels
from sparseopt_kernels.optimizer import SparseOpt


@pytest.mark.parametrize("where", ["backend", "SPARSEOPT_BACKEND"])
def test_unknown_backend(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says where the name came from, and which names there are."""
    if where == "SPARSEOPT_BACKEND":
        monkeypatch.setenv(where, "gpu")
    with pytest.raises(ValueError, match=words(where, "'gpu'", "'auto'", "'reference'", "'cpu'")):
        SparseOpt(weights(1), backend="gpu" if where == "backend" else "auto")


@pytest.mark.parametrize("where", ["backend", "SPARSEOPT_BACKEND"])
def test_backend_that_cannot_run_says_why(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.BACKENDS["cpu"], "unavailable", lambda device: "the reason")
    if where == "SPARSEOPT_BACKEND":
        monkeypatch.setenv(where, "cpu")
    with pytest.raises(RuntimeError, match=words("'cpu'", "cannot run", "the reason")) as error:
        SparseOpt(weights(1), backend="cpu" if where == "backend" else "auto")
    assert ("SPARSEOPT_BACKEND" in str(error.value)) == (where == "SPARSEOPT_BACKEND")


def test_auto_falls_back_to_the_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("SPARSEOPT_BACKEND", raising=False)
    monkeypatch.setattr(kernels.BACKENDS["cpu"], "unavailable", lambda device: "a reason of this test alone")
    assert kernels.backend_for("auto", torch.device("cpu")) is kernels.BACKENDS["reference"]
    (p,) = weights(1)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = SparseOpt([p], lr=0.5)
    optimizer.step()
    optimizer.step()
    assert torch.equal(p, before - 1.0)
    (warning,) = recwarn.list
    assert warning.category is RuntimeWarning
    assert re.search(words("reference", "'cpu'", "a reason of this test alone"), str(warning.message))


def test_the_variable_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEOPT_BACKEND", "gpu")
    SparseOpt(weights(1), backend="reference")


def test_backend_for_another_device() -> None:
    a = Parameter(torch.ones(2, 2, device="meta"))
    with pytest.raises(RuntimeError, match=words("'cpu'", "cannot run", "meta")):
        SparseOpt([a], backend="cpu")
    (b,) = weights(1)
    if kernels.BACKENDS["cpu"].unavailable(torch.device("cpu")) is None:
        optimizer = SparseOpt([b], backend="cpu")
        with pytest.raises(RuntimeError, match=words("'cpu'", "cannot run", "meta")):
            optimizer.add_param_group({"params": [a]})
        assert len(optimizer.param_groups) == 1


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    if kernels.BACKENDS["cpu"].unavailable(torch.device("cpu")) is not None:
        pytest.skip("there is no native library")
    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "avx9000")
    (p,) = weights(1)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = SparseOpt([p], momentum=0.9, backend="cpu")
    with pytest.raises((RuntimeError, ValueError), match=words("SPARSEOPT_CPU_ISA", "avx9000")):
        optimizer.step()
    assert same_bits(p, before)
    assert not optimizer.state
