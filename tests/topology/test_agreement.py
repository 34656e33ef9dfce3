"""Masks are compared over the ranks of a distributed run whenever they are updated."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masked_model import make_model
from torch import distributed as dist

import sparseopt_kernels
from sparseopt_kernels import SET, sparsify
from sparseopt_kernels.topology.agreement import _differences, check_masks_agree

RANKS = 3
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The error of each case, rank by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).parents[1] / "support" / "masks_on_ranks.py"
    assert sparseopt_kernels.__file__ is not None
    source = str(Path(sparseopt_kernels.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(folder), str(RANKS)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        told = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, told
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", ["equal", "not_finite_on_any", "not_compared", "no_update_due"])
def test_no_error(errors: list[dict[str, str]], case: str) -> None:
    assert [own[case] for own in errors] == [""] * RANKS


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("changed_on_rank_0", "mask of '2.weight' differs, rank 0 from ranks 1, 2."),
        ("changed_in_between", "mask of '0.weight' differs, ranks 0, 2 from rank 1."),
        ("hidden_by_ddp", "mask of '0.weight' differs, rank 0 from ranks 1, 2."),
        (
            "not_finite_on_rank_1",
            "a postponed update is False on ranks 0, 2, True on rank 1; mask of '0",
        ),
        ("postponed_over_a_change", "mask of '2.weight' differs, ranks 0, 1 from rank 2."),
        ("other_clock", "do not agree: step is 43 on ranks 0, 2, 42 on rank 1."),
        ("other_settings", "do not agree: seed is 0 on rank 0, 1 on rank 1, 2 on rank 2."),
        (
            "other_masks_from_the_start",
            "mask of '0.weight' differs, rank 0 from rank 1 from rank 2; ",
        ),
        ("of_a_copy", "mask of '0.weight' differs, rank 0 from ranks 1, 2."),
    ],
)
def test_an_error_on_every_rank(errors: list[dict[str, str]], case: str, message: str) -> None:
    for own in errors:
        assert message in own[case]
        assert own[case].startswith("the ranks of this run do not agree: ")
        assert "process_group=None" in own[case]


def test_an_error_of_one_rank_reaches_all(errors: list[dict[str, str]]) -> None:
    first, second, third = (own["an_error_on_rank_1"] for own in errors)
    assert second.startswith("RigL ranks by gradients and no masked parameter has one")
    for other in (first, third):
        assert "the error is 'none' on ranks 0, 2, 'RigL ranks by gradients" in other


def test_the_ranks_of_a_group(errors: list[dict[str, str]]) -> None:
    for own in errors[:2]:
        assert "mask of '0.weight' differs, rank 0 from rank 1." in own["of_two_ranks"]
    assert errors[2]["of_two_ranks"] == ""


def test_without_a_process_group_nothing_happens() -> None:
    check_masks_agree({"step": 1}, {"a": torch.ones(3)}, "world")


def test_many_differences() -> None:
    reports = {rank: {f"mask of '{i}'": rank * i for i in range(9)} for rank in range(12)}
    found = _differences(reports, shown={})
    assert len(found) == 8  # layer 0 has the same on all
    reports = {rank: {"mask of 'a'": rank // 6} for rank in range(12)}
    expected = "mask of 'a' differs, 6 ranks (the first is 0) from 6 ranks (the first is 6)"
    assert _differences(reports, shown={}) == [expected]


def test_the_group_is_not_part_of_what_is_saved_or_copied() -> None:
    dst = SET(sparsify(make_model(), 0.5), stop_at=900)
    assert not any("group" in key for key in dst.state_dict())
    for again in (copy.deepcopy(dst), pickle.loads(pickle.dumps(dst))):
        assert again.process_group == "world"


def test_a_bad_group() -> None:
    with pytest.raises(ValueError, match="process_group is 'all', it must be a process group, 'world'"):
        SET(sparsify(make_model(), 0.5), stop_at=900, process_group="all")  # type: ignore[arg-type]
