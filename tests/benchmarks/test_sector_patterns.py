"""Do times and bytes tell single sectors from pairs: made-up ones, and what a step really touches."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import device_steps
import pytest
import sector_patterns
import torch
from sector_patterns import (
    LEFT_OUT,
    LIST_BYTES,
    MEMORIES,
    MOVED,
    PAIRS,
    PATTERNS,
    READ,
    SINGLE,
    bytes_by_pattern,
    fits,
    table,
    timed,
    verdict,
    verdict_by_times,
)

from sparseopt_kernels.kernels.gpu.lists import LISTED
from sparseopt_kernels.lab.bench.checks import References
from sparseopt_kernels.lab.timing import CpuTimer

NOISE = (1.0, 1.03, 0.98, 1.02)
LIVE = 1000


def milliseconds(memory: str, gb_per_s: float = 2000.0) -> dict[str, float]:
    """Made-up times of ``LIVE`` sectors, by which memory delivers what ``memory`` says."""
    return {
        pattern: noise * LIVE * own / (1e6 * gb_per_s)
        for noise, (pattern, own) in zip(NOISE, MOVED[memory].items(), strict=True)
    }


@pytest.mark.parametrize("memory", MEMORIES)
def test_times_tell_what_memory_delivers(memory: str) -> None:
    times = milliseconds(memory)
    best, *others = fits(times, MOVED)
    assert best.memory == memory
    assert best.error < 0.03
    assert all(other.error > 0.08 for other in others)
    told = verdict_by_times(times, LIVE, copy_gb_per_s=2500.0)
    assert told.startswith(f"Memory delivers {memory} (")
    assert told.endswith("That is 0.80 of the bandwidth of a copy.") or "0.79 of" in told


def test_times_that_are_not_those_of_memory() -> None:
    """All masks take the same time where instructions decide, as with single sectors."""
    told = verdict_by_times(milliseconds(SINGLE, gb_per_s=500.0), LIVE, copy_gb_per_s=2500.0)
    assert told.startswith("Undecided: a step has 0.20 of the bandwidth of a copy")


def test_no_assumption_fits() -> None:
    times = dict(zip(PATTERNS, (1.0, 1.0, 1.0, 3.0), strict=True))
    assert verdict(times, MOVED).startswith("No assumption fits: ")


def test_undecided_between_two() -> None:
    """In the middle between pairs, and pairs that are read only."""
    reads = MOVED["pairs read and single sectors written"]
    times = {p: (MOVED[PAIRS][p] * reads[p]) ** 0.5 for p in PATTERNS}
    assert verdict(times, MOVED).startswith("Undecided: ")


@pytest.mark.parametrize("memory", [SINGLE, PAIRS])
def test_counted_bytes_tell_it_too(memory: str) -> None:
    rows = [
        f'"{i}","sector_step","dram__bytes_read.sum","Mbyte","{noise * own * 10:,.2f}"'
        for i, (noise, own) in enumerate(zip(NOISE, READ[memory].values(), strict=True))
    ]
    header = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    read = bytes_by_pattern("\n".join(["==PROF== Connected", "said by the program", header, *rows]))
    assert verdict(read, READ).startswith(f"Memory delivers {memory} (")


def test_too_few_launches_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="0 launches were counted, not 4:\n==ERROR== invented"):
        bytes_by_pattern("==ERROR== invented")


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))
def test_bytes_of_a_mask(pattern: sector_patterns.Pattern) -> None:
    """Counted on the mask itself: sectors of 8 weights and pairs of 16 that hold an active one."""
    mask = pattern.mask((32, 128), "cpu")
    sectors, pairs = (mask.view(-1, weights).any(dim=1).sum().item() for weights in (8, 16))
    assert mask.view(-1, 8).any(dim=1).equal(mask.view(-1, 8).all(dim=1))
    assert sectors == 32 * 128 // 8 // 4
    assert sectors / (32 * 128 // 8) < LISTED  # a list of 5 bytes for each live sector
    for memory, moved in ((SINGLE, 32 * sectors), (PAIRS, 64 * pairs)):
        own = MEMORIES[memory]
        assert own.bytes_read(pattern) == 3 * moved / sectors + LIST_BYTES
        assert own.bytes_moved(pattern) == 5 * moved / sectors + LIST_BYTES


def test_steps_are_timed_on_all_patterns() -> None:
    times = timed("cpu", "cpu", CpuTimer(), shape=(64, 128))
    assert times.keys() == PATTERNS.keys()
    assert all(ms > 0 for ms in times.values())
    _, _, *rows = table(times, "median ms", MOVED).splitlines()
    assert [row.split()[-3:] for row in rows] == [
        ["1.00", "1.97", "1.58"],
        ["1.00", "1.00", "1.00"],
        ["1.00", "1.97", "1.58"],
        ["1.00", "1.00", "1.00"],
    ]


def test_who_may_not_profile_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = SimpleNamespace(stdout="==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    monkeypatch.setattr(sector_patterns, "CudaTimer", lambda device: None)
    available = SimpleNamespace(unavailable=lambda device: None)
    monkeypatch.setattr(sector_patterns, "BACKENDS", {"triton": available, "cuda": available})
    assert sector_patterns.main(["--ncu", "ncu"]) == LEFT_OUT
    assert capsys.readouterr().out.splitlines()[-1] == "no permission to profile (ERR_NVGPUCTRPERM)"


def test_the_steps_for_the_sanitizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right and wrong ones, on the CPU."""
    assert device_steps.main("cpu", ("cpu",)) == 0
    assert capsys.readouterr().out.count(": ok") == 4
    monkeypatch.setattr(References, "are_met_by", lambda self, contestant: False)
    assert device_steps.main("cpu", ("cpu",)) == 1
    assert capsys.readouterr().out.count(": wrong results") == 4
    assert device_steps.main("cpu", ()) == 1


def test_the_steps_have_both_kinds_of_layers() -> None:
    """Layers whose live sectors are listed, and layers whose sectors are all visited."""
    shares = [1 - sparsity**8 for sparsity in device_steps.SPARSITIES]
    assert min(shares) < LISTED < max(shares)
    assert torch.float32 in device_steps.DTYPES
