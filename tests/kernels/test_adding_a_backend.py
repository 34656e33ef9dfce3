"""The page on adding a backend: what stands there runs, is right, and mistakes in it are found."""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import Backend
from oracle import Hyper
from rules import EVERYTHING, FLOATS, NESTEROV
from side_by_side import PATTERNS, SideBySide, Spec
from strict_mypy import strict_mypy

from sparseopt_kernels import kernels
from sparseopt_kernels.correction import Factors
from sparseopt_kernels.kernels.contract import ParamState
from sparseopt_kernels.lab import doctor

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding_a_backend.md"
BACKEND, REGISTRATION = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)

TOY = Backend("toy")
DAMPENED = Hyper(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05)
RULES = {
    "no-momentum": Hyper(lr=0.1, weight_decay=0.05),
    "dampened": DAMPENED,
    "nesterov": NESTEROV,
    "unnormalized": Hyper(lr=0.1, momentum=0.9, correction="unnormalized", max_grad_norm=0.5),
    "no-correction": Hyper(lr=0.1, momentum=0.9, correction="none", maximize=True),
    "everything": EVERYTHING,
}
SPECS = [Spec((5, 19), pattern, torch.float32) for pattern in (*PATTERNS, None)]
ODD_SPECS = [
    Spec((), None, torch.float32),
    Spec((7,), "half", torch.float32),
    Spec((0, 5), "half", torch.float32),
    Spec((4, 3, 3, 3), "ramp", torch.float32),
    Spec((6, 4, 3), "half", torch.float32, transposed_groups=2),
    Spec((4, 9), "empty-rows", torch.complex64),
]


def register(source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run the page's backend, or a mutant of it, and what registers it, until the end of the test."""
    module = ModuleType("toy")
    monkeypatch.setattr(kernels, "BACKENDS", dict(kernels.BACKENDS))
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    exec(compile(REGISTRATION, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return register(BACKEND, monkeypatch)


@pytest.fixture
def planned(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[ParamState]]:
    """The parameters of each plan that the page's backend is asked for."""
    plans: list[list[ParamState]] = []
    plan = toy.ToyBackend.plan

    def recorded(self: object, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> object:
        plans.append(list(params))
        return plan(self, params, factors)

    monkeypatch.setattr(toy.ToyBackend, "plan", recorded)
    return plans


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule(toy: ModuleType, rule: Hyper) -> None:
    """All patterns of masks, which change on the way."""
    SideBySide(TOY, SPECS, [rule]).run()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_odd_shapes(toy: ModuleType, planned: list[list[ParamState]], rule: Hyper) -> None:
    SideBySide(TOY, ODD_SPECS, [rule]).run()
    assert {len(params) for params in planned} == {len(ODD_SPECS)}


@pytest.mark.parametrize("through_model", [False, True], ids=["dict", "Masks"])
def test_several_groups_of_one_norm(toy: ModuleType, through_model: bool) -> None:
    SideBySide(TOY, SPECS, [*RULES.values()], through_model=through_model).run(grad_scale=8.0)


def test_steps_that_amp_skips(toy: ModuleType) -> None:
    """The first among them, and one whose mask has changed."""
    run = SideBySide(TOY, SPECS, [DAMPENED, EVERYTHING])
    for step, found_inf in enumerate([1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0]):
        if step in (2, 5):
            run.write_mask("layer1", run.new_mask("layer1"))
        run.step(grad_scale=16.0, found_inf=found_inf)


def test_what_it_does_not_support_falls_back(toy: ModuleType, planned: list[list[ParamState]]) -> None:
    """Other dtypes in batches of their own, another memory format beside what it does support."""
    specs = [Spec((4, 3, 3, 3), "half", dtype) for dtype in (torch.float32, *FLOATS)]
    run = SideBySide(TOY, specs, [EVERYTHING])
    first, *others = run.params.values()
    first.data = first.data.contiguous(memory_format=torch.channels_last)
    run.run()
    supported = others[FLOATS.index(torch.float32)]
    assert planned
    assert all([param.parameter for param in params] == [supported] for params in planned)


def test_it_derives_anew_what_has_changed_and_nothing_else(
    toy: ModuleType, planned: list[list[ParamState]], monkeypatch: pytest.MonkeyPatch
) -> None:
    derived: list[ParamState] = []
    cached = kernels.BACKENDS["toy"]._active  # type: ignore[attr-defined]
    derive = cached._derive

    def counted(param: ParamState) -> object:
        derived.append(param)
        return derive(param)

    monkeypatch.setattr(cached, "_derive", counted)
    run = SideBySide(TOY, SPECS[:3], [NESTEROV])
    for _ in range(3):
        run.step()
    assert len(planned) == 1
    assert derived == planned[0]
    run.write_mask("layer1", run.new_mask("layer1"))
    for _ in range(3):
        run.step()
    assert len(planned) == 2
    assert derived == [*planned[0], planned[1][1]]
    assert planned[1][::2] == planned[0][::2]
    derived.clear()
    del planned[0]
    gc.collect()
    assert set(cached._cache) == set(planned[0])


def test_it_is_registered(
    toy: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="'toy' cannot run: it updates tensors on the cpu, not on meta"):
        kernels.backend_for("toy", torch.device("meta"))
    monkeypatch.setenv("SPARSEOPT_BACKEND", "toy")
    assert kernels.chosen_name("auto") == "toy"
    doctor.run(argparse.Namespace())
    printed = capsys.readouterr().out
    assert "cpu tensors go to: toy" in printed
    assert re.search(r"toy +cpu +available, results match", printed)


def test_the_norm_over_all_positions(toy: ModuleType) -> None:
    SideBySide(TOY, SPECS, [EVERYTHING, NESTEROV], norm_over="dense").run()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(-gamma if rule.maximize else gamma)", "gamma"),
        ("(1.0 - rule.dampening) * d", "d"),
        ("rule.weight_decay * p if", "rule.weight_decay * g if"),
        ("d + rule.momentum * b if rule.nesterov else b", "b"),
        ("c[active] * memory(gradient)[active]", "memory(gradient)[active]"),
        ("np.sign(h)", "np.sign(p)"),
        ("c[where] * memory(gradient)", "memory(gradient)"),
        ("inputs.rules[param.rule])", "inputs.rules[0])"),
        ("self._active(params)", "(self.__dict__.setdefault('former', self._active(params)))"),
        ("(param.momentum_buffer)[where] = b", "(param.momentum_buffer)[where] = d"),
        ("[where] = h", "[where[1:]] = h[1:]"),
    ],
    ids=[
        "maximize", "dampening", "weight-decay", "nesterov", "correction", "ham", "norm", "group",
        "stale-mask", "buffer", "one-weight",
    ],
)  # fmt: skip
def test_a_mistake_in_it_is_found(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    assert BACKEND.count(old) == 1
    register(BACKEND.replace(old, new), monkeypatch)
    with pytest.raises((AssertionError, KeyError), match=r"differ from the oracle|ParamState"):
        SideBySide(TOY, SPECS, [EVERYTHING, NESTEROV]).run()


@pytest.mark.slow
def test_mypy_accepts_it_without_any(tmp_path: Path) -> None:
    """And that the backend is one: what registers it is checked against the contract."""
    assert not re.search(r"\bAny\b|type: ignore", BACKEND)
    assert strict_mypy(f"{BACKEND}\n\n{REGISTRATION}", tmp_path).startswith("Success")
    wrong = BACKEND.replace("def supports(", "def is_supported(")
    assert "ToyBackend" in strict_mypy(f"{wrong}\n\n{REGISTRATION}", tmp_path)
