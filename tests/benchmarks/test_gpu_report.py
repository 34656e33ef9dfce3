"""The report that a GPU is asked for, run to its end without one: small networks on the CPU, whose clock
stands for CUDA's. What it measures here means nothing and is not looked at."""

from __future__ import annotations

import csv
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_report
import gpu_runs
import pytest
import torch
from gpu_runs import LEFT_OUT, NO_MEMORY, OK, SGD_FOREACH, SGD_FUSED, Deadline, Result, Run

from sparseopt_kernels.kernels import BACKENDS
from sparseopt_kernels.lab import timing
from sparseopt_kernels.lab.bench.checks import WRONG
from sparseopt_kernels.lab.bench.contestants import Contestant, Maker, sgd, sparseopt
from sparseopt_kernels.lab.bench.network import Network
from sparseopt_kernels.lab.timing import CudaTimer, Rounds

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NAME = "Invented GPU 80GB (PCIe)"
RUNS = [Run(name, [(8, 3, 3, 3), (8,), (16, 40)], s) for name in ("small", "other") for s in (0.5, 0.9)]
GREEN = [sys.executable, "-c", "print('3 passed, 1 skipped in 0.01s')"]
RED = [sys.executable, "-c", "print('1 failed, 3 passed in 0.01s'); exit(1)"]


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    """Steps that are made while one is captured are made when it is replayed. It keeps nothing alive."""

    captures: Graph | None = None

    def __init__(self) -> None:
        self.contestants: list[weakref.ref[Contestant]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        Graph.captures = self
        yield
        Graph.captures = None

    def replay(self) -> None:
        for captured in self.contestants:
            contestant = captured()
            assert contestant is not None, "the graph reads the momentum of an optimizer that is gone"
            contestant.step()


def capturable(network: Network, backend: str) -> Contestant:
    contestant = sparseopt(network, backend)

    def step() -> None:
        if Graph.captures is None:
            contestant.step()
        else:
            Graph.captures.contestants.append(weakref.ref(contestant))

    return Contestant(backend, network, step)


@pytest.fixture(autouse=True)
def _cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the report asks of torch.cuda; nothing is compiled, either."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Graph.capture,
        "Stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: stream,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(gpu_runs, "sparseopt", capturable)
    monkeypatch.setattr(timing, "_EVICTING", 4096)
    monkeypatch.setattr(gpu_runs, "_ROUNDS", Rounds(3, warmup=1, fewest=2))
    monkeypatch.setitem(sys.modules, "kernel_phases", None)  # it compiles kernels, for ten seconds


@pytest.fixture
def found_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A device that PyTorch names and describes; ``main`` writes into ``tmp_path``."""
    for name, value in {"is_available": True, "current_device": 0, "get_device_name": NAME}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for backend, reason in (("triton", None), ("cuda", "the CUDA kernels were not built")):
        stand_in = lambda device, reason=reason: reason  # noqa: E731
        monkeypatch.setattr(BACKENDS[backend], "unavailable", stand_in)
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "SUITE", GREEN)


def report(folder: Path, makers: dict[str, Maker], deadline: Deadline | None = None) -> int:
    deadline = deadline or Deadline(1000)
    return gpu_report.report(NAME, CPU, RUNS, makers, CudaTimer(CPU), deadline, folder, copy_bytes=4096)


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "gpu_invented_gpu_80gb_pcie.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "kernel_phases")
    assert report(tmp_path, gpu_runs.makers_for(["reference", "cpu"])) == 0
    rows = rows_in(tmp_path)
    assert list(rows[0]) == list(gpu_report.COLUMNS)
    names = [
        *("SparseOpt reference", "SparseOpt cpu", "SparseOpt reference, graph", "SparseOpt cpu, graph"),
        *(
            "SGD fused, no mask",
            "SGD foreach, no mask",
            "SGD foreach, masked chain",
            "SGD fused, masked chain",
            "torch.compile of the chain",
        ),
    ]
    wanted = [(run.network, str(run.sparsity), name) for run in RUNS for name in names]
    assert [(row["network"], row["sparsity"], row["contestant"]) for row in rows] == wanted
    assert all(value for row in rows for value in row.values())
    assert {row["status"] for row in rows} == {OK}
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        dense = 20 * (8 * 27 + 8 + 16 * 40)
        least = float(row["bytes"])
        assert least == dense if "no mask" in row["contestant"] else least < dense + 8 * 27 + 16 * 40
        share = least / float(row["median_ms"]) / 1e6 / float(row["copy_gb_per_s"])
        assert float(row["fraction_of_copy_bandwidth"]) == pytest.approx(share, rel=1e-3)
    picture = (tmp_path / "gpu_invented_gpu_80gb_pcie.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert "small, 864 weights, sparsity 0.9" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2


def test_the_table_compares_with_sgd_fused() -> None:
    shared = {"p20_ms": 1.0, "p80_ms": 3.0, "host_ms": 0.25, "bytes": 1e9, "copy_gb_per_s": 2000.0}
    ours = Result("net", 10**8, 0.9, "SparseOpt triton", OK, 1.0, **shared)
    theirs = Result("net", 10**8, 0.9, SGD_FUSED, OK, 2.5, **shared)
    failed = Result("net", 10**8, 0.9, "SparseOpt cuda", "failed: RuntimeError: invented")
    lines = gpu_report.table([ours, theirs, failed]).splitlines()
    own = next(line for line in lines if line.startswith("SparseOpt triton"))
    assert own.split()[2:] == ["1.0000", "1.0000", "3.0000", "0.2500", "10.00", "0.50", "2.50"]
    assert "SparseOpt cuda: failed: RuntimeError: invented" in lines


def test_foreach_stands_in_for_a_fused_sgd_that_is_wrong() -> None:
    times = {"p20_ms": 1.0, "p80_ms": 3.0, "host_ms": 0.25, "bytes": 1e9, "copy_gb_per_s": 2000.0}
    ours = Result("net", 10**8, 0.9, "SparseOpt triton", OK, 1.0, **times)
    fused = Result("net", 10**8, 0.9, SGD_FUSED, WRONG)
    foreach = Result("net", 10**8, 0.9, SGD_FOREACH, OK, 4.0, **times)
    lines = gpu_report.table([ours, fused, foreach]).splitlines()
    assert next(line for line in lines if line.startswith("SparseOpt triton")).split()[-1] == "4.00"
    assert f"{SGD_FUSED}: wrong results" in lines
    assert gpu_report._wrong_in([ours, fused, foreach]) == f"\nnot timed, wrong results: {SGD_FUSED}"
    assert gpu_report._wrong_in([ours, foreach]) == ""


def model_of(monkeypatch: pytest.MonkeyPatch, cuda: Callable[[], float | None]) -> None:
    """Estimates that one can reckon: pairs take twice as long as sectors, SGD as many us as it has rows."""
    model = SimpleNamespace(
        MEMORIES={"sectors": 1.0, "pairs": 2.0},
        step_us=lambda shapes, sparsity, memory, step: sparsity * step * memory,
        sgd_us=lambda shapes, memory: shapes[0][0] * memory,
    )
    phases = SimpleNamespace(
        triton_kernels=lambda: SimpleNamespace(sector_step=1000.0), cuda_sector_step=cuda
    )
    monkeypatch.setitem(sys.modules, "gpu_model", model)
    monkeypatch.setitem(sys.modules, "kernel_phases", phases)


def test_both_ends_of_the_model_stand_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each of this package's contestants that was timed, and of SGD, on its own network and sparsity."""
    model_of(monkeypatch, cuda=lambda: 500.0)
    runs = [Run("net", [(8, 8)], sparsity) for sparsity in (0.5, 0.9)]
    results = [
        Result("net", 64, 0.5, "SparseOpt triton", OK, 1.0),
        Result("net", 64, 0.9, "SparseOpt triton", OK, 1.8),
        Result("net", 64, 0.5, "SparseOpt cuda", "failed: RuntimeError: invented"),
        Result("net", 64, 0.9, "SparseOpt cuda, graph", OK, 0.9),
        Result("net", 64, 0.9, SGD_FUSED, OK, 0.024),
        Result("net", 64, 0.9, SGD_FOREACH, OK, 2.5),
    ]
    _, _, _, _, *lines = gpu_report.beside_model(results, runs).splitlines()
    assert [line.split()[-5:] for line in lines] == [
        ["500.0", "1000.0", "1000.0", "2.00", "1.00"],
        ["900.0", "1800.0", "1800.0", "2.00", "1.00"],
        ["450.0", "900.0", "900.0", "2.00", "1.00"],
        ["8.0", "16.0", "24.0", "3.00", "1.50"],
    ]


def test_no_model_without_a_disassembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernel_phases", None)
    told = gpu_report.beside_model([Result("net", 64, 0.5, "SparseOpt triton", OK, 1.0)], [])
    assert told.count("It has no estimates for ") == 3


def test_no_model_of_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("invented")

    model_of(monkeypatch, broken)
    results = [Result("net", 64, 0.5, f"SparseOpt {name}", OK, 1.0) for name in ("triton", "cuda")]
    *_, row, why = gpu_report.beside_model(results, [Run("net", [(8, 8)], 0.5)]).splitlines()
    assert row.split()[-5:] == ["500.0", "1000.0", "1000.0", "2.00", "1.00"]
    assert why == "It has no estimates for SparseOpt cuda: ValueError('invented')"


def test_main_tells_the_report_what_runs(
    found_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_report, "CudaTimer", lambda device: "timer")
    monkeypatch.setattr(gpu_report, "report", lambda *arguments: calls.append(arguments) or 0)  # type: ignore[func-returns-value]
    assert gpu_report.main() == 0
    [(name, device, runs, makers, timer, deadline, folder)] = calls
    assert (name, device, timer) == (NAME, torch.device("cuda", 0), "timer")
    assert folder == tmp_path / "benchmarks" / "results"
    assert [name for name in makers if name.startswith("SparseOpt")] == [
        *("SparseOpt triton", "SparseOpt triton, graph")
    ]
    assert deadline.left() < gpu_report.SECONDS < 480
    assert {run.network for run in runs} == {"4 layers of 8192x8192", "ResNet-50", "ResNet-20"}
    out = capsys.readouterr().out
    assert "backend 'triton': available" in out
    assert "backend 'cuda': the CUDA kernels were not built" in out


def test_without_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"PyTorch {torch.__version__} finds no CUDA device here: nothing was measured."]


def test_without_a_package(
    found_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "find_spec", lambda name: None if name == "tqdm" else name)
    assert gpu_report.main() == 1
    assert "tqdm not installed: pip install" in capsys.readouterr().out


def test_a_red_suite_is_all_it_reports(
    found_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "SUITE", RED)
    assert gpu_report.main() == 1
    assert "1 failed, 3 passed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_tests_that_have_been_run_are_left_out(
    found_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_report, "SUITE", RED)
    monkeypatch.setattr(gpu_report, "CudaTimer", lambda device: "timer")
    monkeypatch.setattr(gpu_report, "report", lambda *arguments: calls.append(arguments) or 0)  # type: ignore[func-returns-value]
    assert gpu_report.main(["--tested", "--folder", str(tmp_path / "own"), "--seconds", "100"]) == 0
    [(*_, deadline, folder)] = calls
    assert folder == tmp_path / "own"
    assert 0 < deadline.left() < 100


@pytest.mark.parametrize(
    ("script", "green"),
    [
        ("print('3 passed in 0.01s')", True),
        ("print('3 skipped in 0.01s')", False),
        ("print('3 passed in 0.01s'); exit(1)", False),
        ("exit(5)", False),
        ("print('3 passed in 0.01s', flush=True); import time; time.sleep(30)", False),
    ],
    ids=["green", "all skipped", "red", "no tests", "too slow"],
)
def test_what_a_green_suite_is(script: str, green: bool, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = 2 if "sleep" in script else 60
    assert gpu_report.suite_is_green([sys.executable, "-c", script], seconds) is green
    assert ("passed in" in capsys.readouterr().out) == ("passed" in script)


class AfterSomeSteps(Deadline):
    """Is over when so many steps were made."""

    def __init__(self, steps: int) -> None:
        super().__init__(1000)
        self.steps = steps

    def left(self) -> float:
        self.steps -= 1
        return self.steps


@pytest.mark.parametrize("timed_runs", [0, 1])
def test_what_the_deadline_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], timed_runs: int
) -> None:
    makers: dict[str, Maker] = {SGD_FUSED: sgd}
    # A run asks once itself, twice before a contestant starts, and here after each of two rounds.
    assert report(tmp_path, makers, AfterSomeSteps(1 + timed_runs * 4)) == 0
    statuses = [row["status"] for row in rows_in(tmp_path)]
    assert statuses == [OK] * timed_runs + [LEFT_OUT] * (4 - timed_runs)
    assert rows_in(tmp_path)[-1]["median_ms"] == ""
    assert f"{4 - timed_runs} of 4 measurements were left out" in capsys.readouterr().out
    assert (tmp_path / "gpu_invented_gpu_80gb_pcie.png").stat().st_size > 5000


def disagreeing(network: Network) -> Contestant:
    contestant = sparseopt(network)
    with torch.no_grad():
        network.parameters[0].mul_(1.01)
    return contestant


def doing_nothing(network: Network) -> Contestant:
    """As SGD would that leaves all weights unwritten."""
    return Contestant("nothing", network, lambda: None, work="sgd")


def raising(error: Exception) -> Maker:
    def make(network: Network) -> Contestant:
        raise error

    return make


@pytest.mark.parametrize(
    ("name", "make", "status", "exit_status"),
    [
        ("SparseOpt triton", disagreeing, WRONG, 1),
        (
            "SparseOpt triton",
            raising(RuntimeError("invented\nin two lines")),
            "failed: RuntimeError: invented",
            1,
        ),
        ("SparseOpt triton", raising(torch.OutOfMemoryError("invented")), NO_MEMORY, 0),
        ("another's", disagreeing, WRONG, 0),
        ("SGD", doing_nothing, WRONG, 0),
    ],
    ids=["wrong", "raising", "out of memory", "another's is wrong", "SGD is wrong"],
)
def test_who_fails_is_not_timed(
    tmp_path: Path, name: str, make: Maker, status: str, exit_status: int
) -> None:
    assert report(tmp_path, {name: make, SGD_FUSED: sgd}) == exit_status
    assert [row["status"] for row in rows_in(tmp_path)] == [status, OK] * 4


def test_who_is_late_is_not_waited_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runs, "_TO_BE_READY", 0.2)
    asked = []

    def sleeping(network: Network) -> Contestant:
        asked.append(network)
        try:
            time.sleep(30)
        except Exception as error:  # as a compiler might
            raise AssertionError from error
        raise AssertionError

    assert report(tmp_path, {"torch.compile": sleeping, SGD_FUSED: sgd}) == 0
    assert len(asked) == 2  # once for each network
    assert [row["status"] for row in rows_in(tmp_path)] == ["gave up: not ready after 0 s", OK] * 4


def test_only_the_chain_writes_gradients() -> None:
    """They are shared: what one contestant does to them, all others would start from."""
    network = Network.of_shapes([(8, 40), (8,)], 0.9, "erk")
    kept = [gradient.clone() for gradient in network.gradients]
    for make in gpu_runs.makers_for(["reference", "cpu"], graphs=False).values():
        contestant = make(network.copy())
        contestant.prepare()
        contestant.step()
        assert all(map(torch.equal, network.gradients, kept))


def test_a_slow_host_is_given_a_longer_lead() -> None:
    timer = CudaTimer(CPU)
    reads: list[str] = []
    timer._read_ms = 0.5
    timer._buffer = SimpleNamespace(sum=lambda: reads.append("read"))  # type: ignore[assignment]
    for busy_ms, expected in ((0.0, 1), (2.0, 5), (1e6, 200)):
        reads.clear()
        timing = timer(lambda: time.sleep(0.01), busy_ms)
        assert len(reads) == expected
        assert min(timing) >= 10
