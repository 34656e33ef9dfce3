"""The command ``bench``: what it measures and says. No times are looked at."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.bench import cli, measure
from sparseopt_kernels.lab.bench.contestants import Contestant, sparseopt
from sparseopt_kernels.lab.bench.measure import Measured
from sparseopt_kernels.lab.bench.network import Network
from sparseopt_kernels.lab.bench.report import share_of_training, table, verdict
from sparseopt_kernels.lab.bench.training_pass import training_pass
from sparseopt_kernels.lab.machine import machine
from sparseopt_kernels.lab.timing import Rounds, Summary

SMALL = ("--layers", "16x40", "8x3x3x3", "--sparsity", "0.5", "0.9", "--device", "cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rounds, on a machine that is quiet."""
    monkeypatch.setattr(measure, "_ROUNDS", Rounds(timed=3, warmup=1, fewest=2))
    monkeypatch.setattr(cli, "processor_share", lambda: 1.0)


def took(ms: float) -> Summary:
    return Summary(0.95 * ms, ms, 1.05 * ms, ms, 10)


def measured(**ms: float) -> Measured:
    names = {
        "ours": "sparseopt",
        "hand": "eager chain",
        "tuned": "eager chain, tuned",
        "foreach": "sgd foreach, no mask",
        "fused": "sgd fused, no mask",
    }
    return Measured(0.9, {names[key]: took(each) for key, each in ms.items()})


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_small_bench(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--dtype", dtype, "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, second, _, title, header, rule, half, nine, *_ = out.splitlines()
    assert first == f"{machine()}, 1 thread, PyTorch {torch.__version__}"
    assert second.startswith(
        f"layers 16x40 8x3x3x3: 0.000856 million weights in {dtype}; cpu tensors go to: "
    )
    assert "Median milliseconds of a step" in title
    assert set(rule) == {"-"}
    columns = re.split("  +", header)
    assert columns[:2] == ["sparsity", "SparseOpt"]
    assert {"SGD foreach, no mask", "SGD fused, no mask", "by hand"} <= set(columns)
    assert [line.split()[0] for line in (half, nine)] == ["0.5", "0.9"]
    assert re.search(r"^At sparsity 0.5 a step of SparseOpt is .* and .*SGD \w+, no mask\.", out, re.M)
    assert re.search(r"^At sparsity 0.9 a step", out, re.M)


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="the fault is one of PyTorch 2.13.0")
def test_a_wrong_fused_sgd_is_named_and_another_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--layers", "64x64", "--sparsity", "0.9", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    header, _, row = out.splitlines()[4:7]
    cells = dict(zip(re.split("  +", header), re.split("  +", row.strip()), strict=True))
    assert cells["SGD fused, no mask"] == cells["by hand, tuned"] == "wrong results"
    assert float(cells["SGD foreach, no mask"].split()[0]) > 0
    assert float(cells["by hand, foreach"].split()[0]) > 0
    assert "SGD fused, no mask: wrong results, not timed." in out


def test_wrong_results_of_sparseopt_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def idle(network: Network, **options: Any) -> Contestant:
        return replace(sparseopt(network, **options), step=lambda: None)

    monkeypatch.setattr(measure, "sparseopt", idle)
    assert main(["bench", *SMALL]) == 1
    out = capsys.readouterr().out
    assert "At sparsity 0.5 SparseOpt has WRONG RESULTS: run `sparseopt doctor`" in out


def test_layers_are_left_out_when_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--seconds", "1e-9"]) == 0
    assert "At sparsity 0.9 nothing was measured, because time was up" in capsys.readouterr().out


def test_rounds_end_when_the_share_of_a_sparsity_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_ROUNDS", Rounds(timed=10**6, warmup=1, fewest=2))
    start = time.monotonic()
    shown: list[float] = []
    found = measure.measure(
        [(8, 8)], [0.5, 0.9], torch.float32, torch.device("cpu"), seconds=1.0, on_round=shown.append
    )
    assert time.monotonic() - start < 30
    assert shown == sorted(shown)
    assert all(2 <= t.rounds < 10**6 for m in found for t in m.times.values())


def test_nothing_is_concluded_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "processor_share", lambda: 0.4)
    assert main(["bench", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Other programs were running: a thread got 40% of a processor" in out
    assert "times as fast" not in out


def test_threads_are_those_asked_for_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = measure.measure

    def looked_at(*arguments: Any) -> list[Measured]:
        seen.append(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(cli, "measure", looked_at)
    assert main(["bench", *SMALL, "--threads", "2"]) == 0
    assert (seen, torch.get_num_threads()) == ([2], 1)


def test_no_tqdm_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["bench", *SMALL]) == 0


def test_a_verdict_follows_the_numbers() -> None:
    assert verdict(measured(ours=10, hand=80, tuned=20, foreach=30, fused=9.9)) == (
        "At sparsity 0.9 a step of SparseOpt is 2.0 times as fast as the fastest that plain PyTorch does "
        "with masks (by hand, tuned) and within noise as fast as SGD fused, no mask."
    )
    slower = verdict(measured(ours=40, hand=10, tuned=20, foreach=5, fused=8))
    assert (
        "slower (4.00 times as long) than the fastest that plain PyTorch does with masks (by hand)" in slower
    )
    assert slower.endswith("slower (8.00 times as long) than SGD foreach, no mask.")


def test_the_table_has_a_line_for_each_sparsity() -> None:
    lines = table([measured(ours=2, hand=5), Measured(0.99, {})])
    assert lines[1].split() == ["sparsity", "SparseOpt", "by", "hand"]
    assert lines[3].split() == ["0.9", "2", "5", "[2.50]"]
    assert lines[4].split() == ["0.99", "-", "-"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 16", "--layers: '16' is not a shape such as 4096x2048"),
        ("--layers 0x16", "--layers: '0x16' is not a shape"),
        ("--layers 4x", "--layers: '4x' is not a shape"),
        ("--sparsity 1", "--sparsity: '1' is not a number in [0, 1)"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--threads 0", "--threads: '0' is not an integer of at least 1"),
        ("--seconds 0", "--seconds: '0' is not a positive number"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments_have_short_errors(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["bench", *options.split()])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device nonsense", "--device nonsense cannot be used: "),
        ("--device cuda:99", "--device cuda:99 cannot be used: "),
        ("--device meta", "--device is meta, it must be cpu or a CUDA device"),
        ("--layers 9999999x9999999", "--layers has 99999980000001 weights: that takes about"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sparseopt bench: error: {message}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("backend", "message"),
    [("nonsense", "SPARSEOPT_BACKEND is 'nonsense'"), ("cuda", "backend 'cuda' cannot run: ")],
)
def test_a_backend_that_cannot_run_is_an_error(
    backend: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEOPT_BACKEND", backend)
    assert main(["bench", *SMALL]) == 2
    assert f"cpu tensors cannot be updated: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("invented"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    ],
    ids=["device", "python", "cpu"],
)
def test_too_little_memory_is_an_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> list[Measured]:
        raise error

    monkeypatch.setattr(cli, "measure", full)
    assert main(["bench", *SMALL]) == 2
    assert "cpu has too little memory for --layers" in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> list[Measured]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure", interrupted)
    assert main(["bench", *SMALL]) == 130
    assert capsys.readouterr().err == "sparseopt bench: stopped\n"


def test_the_share_of_a_training_step() -> None:
    found = [measured(ours=10.0), measured(hand=1.0), replace(measured(ours=2.5), sparsity=0.99)]
    assert share_of_training(found, 128, took(90.0)) == (
        "A forward and a backward pass of these layers, dense, with 128 examples take 90 ms; of that and a "
        "step together, SparseOpt's step is 10% at 0.9, 2.7% at 0.99."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_makes_the_gradients_of_weights_and_inputs(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    run = training_pass([(5, 3), (2, 7)], 11, dtype, cpu)
    assert run is not None
    assert [(g.shape, g.dtype) for g in run()] == [  # type: ignore[attr-defined]
        ((5, 3), dtype),
        ((2, 7), dtype),
        ((11, 3), dtype),
        ((11, 7), dtype),
    ]
    assert training_pass([(5, 3), (8, 3, 3, 3)], 11, dtype, cpu) is None


def test_it_says_how_much_of_a_training_step_a_step_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--layers", "16x40", "--sparsity", "0.9", "--device", "cpu", "--batch", "7"]) == 0
    assert "with 7 examples take" in capsys.readouterr().out
    assert main(["bench", *SMALL]) == 0
    assert "examples" not in capsys.readouterr().out
