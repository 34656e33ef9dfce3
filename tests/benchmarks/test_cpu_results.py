"""What becomes of the times of the CPU benchmarks: tables, files and pictures. Nothing is timed."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shutil
from pathlib import Path

import cpu_map_picture
import cpu_report
import cpu_results
import cpu_step_picture
import pytest
from comparison import COLD, HOT, Cache, Comparison
from cpu_results import Row, path_of, replace, rows_of
from pytest_server import PytestServer

from sparseopt_kernels.lab.machine import machine
from sparseopt_kernels.lab.timing import Summary

BENCHMARKS = Path(cpu_report.__file__).parent
HERE, THERE = "AMD EPYC (Zen 5), 2 cores", "AMD EPYC (Zen 3), 2 cores"


@pytest.fixture(autouse=True)
def best_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "avx512")


def a_comparison(
    sparsity: float,
    ours_ms: float,
    network: str = "net",
    weights: int = 10**6,
    rival: str = "chain",
    cache: Cache = HOT,
) -> Comparison:
    def times(ms: float) -> Summary:
        return Summary(ms - 0.1, ms, ms + 0.1, ms, 60)

    both = {"sparseopt": times(ours_ms), rival: times(4.0)}
    return Comparison(network, sparsity, weights, 5 * weights, 30.25, both, cache=cache)


def test_the_table_tells_how_many_times_faster() -> None:
    lines = cpu_report.table([a_comparison(0.5, 2.0), a_comparison(0.95, 1.0)], HERE, "avx2").splitlines()
    assert lines[0].startswith(f"One step, median milliseconds on {HERE}, avx2; ")
    at = lines.index("net, 1000000 weights")
    assert lines[at + 1].split() == ["sparsity", "SparseOpt", "chain", "bytes/weight", "GB/s", "copy", "GB/s"]
    assert lines[at + 3].split() == ["0.5", "2.000", "4.000", "[2.00]", "5.00", "2.5", "30.2"]
    assert lines[at + 4].split() == ["0.95", "1.000", "4.000", "[4.00]", "5.00", "5.0", "30.2"]


def test_hot_and_cold_caches_are_told_apart(tmp_path: Path) -> None:
    found = [a_comparison(0.5, 2.0), a_comparison(0.5, 5.0, cache=COLD)]
    lines = cpu_report.table(found, HERE, "avx2").splitlines()
    hot, cold = lines.index("net, 1000000 weights"), lines.index("net, cold caches, 1000000 weights")
    assert (lines[hot + 3].split()[1], lines[cold + 3].split()[1]) == ("2.000", "5.000")
    assert cpu_report.worst_of_map(found).splitlines() == [
        "net, against chain: at worst 2.00 times as fast, with 1000000 weights at 0.5; "
        "below 0.95 in 0 of 1 cases up to 0.9",
        "net, cold caches, against chain: at worst 0.80 times as fast, with 1000000 weights at 0.5; "
        "below 0.95 in 1 of 1 cases up to 0.9",
    ]
    rows = replace(tmp_path / "cpu_step.csv", rows_of(found, HERE), HERE)
    ours = [(row["cache"], row["p50_ms"]) for row in rows if row["contestant"] == "sparseopt"]
    assert ours == [("hot", "2.0000"), ("cold", "5.0000")]


def test_the_picture_of_steps_is_that_of_cold_caches_if_these_were_measured() -> None:
    network, rival = "4 layers of 4096x2048", "sgd fused, no mask"
    hot = rows_of([a_comparison(s, 2.0, network, rival=rival) for s in (0.0, 0.9)], HERE)
    cold = rows_of([a_comparison(s, 9.0, network, rival=rival, cache=COLD) for s in (0.0, 0.9)], HERE)
    assert cpu_step_picture.png(hot + cold) == cpu_step_picture.png(cold)
    assert cpu_step_picture.png(hot) != cpu_step_picture.png(cold)


def test_the_map_has_a_panel_for_cold_caches() -> None:
    hot = [a_comparison(0.0, 3.0, weights=weights, rival="sgd fused, no mask") for weights in (1, 1024)]
    cold = dataclasses.replace(hot[1], cache=COLD)
    both = cpu_map_picture.png(rows_of([*hot, cold], HERE))
    assert pixels(both)[1] > pixels(cpu_map_picture.png(rows_of(hot, HERE)))[1]


def test_a_rival_that_is_wrong_is_named_so_in_the_table_and_the_file() -> None:
    right = a_comparison(0.5, 2.0)
    wrong = dataclasses.replace(a_comparison(0.9, 2.0, rival="stand-in"), wrong=("chain",))
    lines = cpu_report.table([right, wrong], HERE, "avx2").splitlines()
    at = lines.index("net, 1000000 weights")
    assert re.split("  +", lines[at + 1])[:4] == ["sparsity", "SparseOpt", "chain", "stand-in"]
    assert re.split("  +", lines[at + 3].strip())[2:4] == ["4.000 [2.00]", "-"]
    assert re.split("  +", lines[at + 4].strip())[2:4] == ["wrong results", "4.000 [2.00]"]
    *_, row = rows_of([wrong], HERE)
    shown = [row[key] for key in ("contestant", "p20_ms", "p50_ms", "p80_ms", "rounds", "status")]
    assert shown == ["chain", "", "", "", "0", "wrong results"]
    assert "net: chain has wrong results in 1 of 2 cases" in cpu_report.worst_of_map([right, wrong])


def test_a_rival_that_is_wrong_is_named_so_in_pictures() -> None:
    network, fused, foreach = "ResNet-20, 20 steps in a row", "sgd fused, no mask", "sgd foreach, no mask"
    found = [dataclasses.replace(a_comparison(0.9, 2.0, network, rival=foreach), wrong=(fused,))]
    rows = rows_of(found, HERE)
    assert cpu_results.caption(rows).endswith(f"\nnot timed, wrong results: {fused}")
    assert cpu_step_picture.png(rows) is not None
    assert cpu_map_picture.png(rows) is not None
    without_times = [row for row in rows if row["status"] != "ok"]
    assert cpu_step_picture.png(without_times) is None
    assert cpu_map_picture.png(without_times) is None


def test_the_map_frames_the_worst_of_all_cells() -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    ms = {0.0: 2.0, 0.5: 3.0, 0.97: 5.0, 0.99: 1.0}
    found = [a_comparison(sparsity, each, rival="sgd fused, no mask") for sparsity, each in ms.items()]
    axes = Figure().subplots()
    cpu_map_picture._draw(axes, rows_of(found, HERE), ["sgd fused, no mask"])
    [frame] = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert frame.get_xy() == (1.5, -0.5)  # that of 0.97


def test_the_worst_of_the_map_is_looked_for_up_to_nine_tenths() -> None:
    found = [
        *(a_comparison(0.0, 2.0), a_comparison(0.9, 5.0), a_comparison(0.5, 4.3)),
        *(a_comparison(0.9, 4.1, weights=10), a_comparison(0.99, 40.0)),
    ]
    assert cpu_report.worst_of_map(found) == (
        "net, against chain: at worst 0.80 times as fast, with 1000000 weights at 0.9; "
        "below 0.95 in 2 of 4 cases up to 0.9"
    )
    assert cpu_report.worst_of_map([a_comparison(0.99, 40.0)]) == ""


@pytest.mark.parametrize(
    ("machine", "slug"),
    [
        (HERE, "amd-epyc-zen-5-2-cores"),
        (
            "Intel Xeon (Sapphire Rapids), 2 cores",
            "intel-xeon-sapphire-rapids-2-cores",
        ),
        ("AMD EPYC 9R14 96-Core (Zen 4), 8 cores", "amd-epyc-9r14-96-core-zen-4-8-cores"),
        (
            "Intel Xeon E5-2673 v4 (family 6 model 79), 2 cores",
            "intel-xeon-e5-2673-v4-family-6-model-79-2-cores",
        ),
    ],
)
def test_the_slug_of_a_machine(machine: str, slug: str) -> None:
    assert path_of(Path("x"), cpu_results.STEP, machine) == Path("x") / f"cpu_step-{slug}.csv"
    picture = cpu_results.picture_of(Path("x"), cpu_results.MAP, machine, "avx2")
    assert picture == Path("x") / f"cpu_map-{slug}-avx2.png"


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu_step.csv"
    rows = rows_of([a_comparison(0.5, 2.0)], HERE)
    assert replace(path, rows, HERE) == cpu_results.read(path) == rows
    assert [path] == list(path.parent.iterdir()), "a temporary file was left"
    assert all(line.endswith(b"\r") for line in path.read_bytes().rstrip(b"\n").split(b"\n"))
    own = rows[0]
    assert (own["machine"], own["isa"], own["contestant"], own["sparsity"]) == (
        *(HERE, "avx512", "sparseopt", "0.5"),
    )
    assert [own[key] for key in ("p20_ms", "p50_ms", "p80_ms", "rounds")] == [
        *("1.9000", "2.0000", "2.1000", "60"),
    ]
    assert (own["weights"], own["floor_bytes"], own["copy_gb_per_s"]) == ("1000000", "5000000", "30.25")


def measured(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    ours = [row for row in rows if row["contestant"] == "sparseopt"]
    return [(row["isa"], row["network"], row["sparsity"], row["p50_ms"]) for row in ours]


def test_rows_of_the_same_network_and_instruction_set_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu_step.csv"
    first = [a_comparison(0.5, 2.0, "net"), a_comparison(0.9, 3.0, "net"), a_comparison(0.5, 1.0, "other")]
    replace(path, rows_of(first, HERE), HERE)
    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "avx2")
    replace(path, rows_of([a_comparison(0.5, 7.0, "net")], HERE), HERE)
    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "avx512")
    replace(path, rows_of([a_comparison(0.0, 9.0, "net")], HERE), HERE)
    replace(path, rows_of([a_comparison(0.5, 5.0, "other", weights=10)], HERE), HERE)
    assert measured(cpu_results.read(path)) == [
        ("avx512", "net", "0.0", "9.0000"),
        ("avx512", "other", "0.5", "1.0000"),
        ("avx2", "net", "0.5", "7.0000"),
        ("avx512", "other", "0.5", "5.0000"),
    ]


def test_rows_of_another_machine_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cpu_step.csv"
    replace(path, rows_of([a_comparison(0.5, 2.0)], THERE), THERE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"cpu_step.csv has rows of another machine, 'AMD EPYC \(Zen 3\), 2"):
        replace(path, rows_of([a_comparison(0.5, 1.0)], HERE), HERE)
    assert path.read_bytes() == before


def test_a_file_of_other_columns_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cpu_step.csv"
    path.write_text("date,machine\r\n2026-11-22,x\r\n")
    with pytest.raises(ValueError, match="has the columns"):
        replace(path, rows_of([a_comparison(0.5, 1.0)], HERE), HERE)
    assert path.read_text() == "date,machine\n2026-11-22,x\n"


def test_the_files_of_the_repository_are_those_of_their_machines() -> None:
    found = [path for kind in ("step", "map") for path in (BENCHMARKS / "results").glob(f"cpu_{kind}*.csv")]
    assert found
    for path in found:
        [name] = {row["machine"] for row in cpu_results.read(path)}
        assert path == path_of(path.parent, path.name.partition("-")[0], name)


def pixels(png: bytes | None) -> tuple[int, int]:
    assert png is not None
    assert png.startswith(b"\x89PNG\r\n")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_the_picture_of_steps_is_drawn_of_rows() -> None:
    large, small = "4 layers of 4096x2048", "ResNet-20, 20 steps in a row"
    rivals = ("sgd fused, no mask", "eager chain", "torch.compile of the chain")
    found = [
        a_comparison(sparsity, 3.0, network, rival=rival)
        for network in (large, small)
        for sparsity in (0.0, 0.9)
        for rival in rivals
    ]
    both = cpu_step_picture.png(rows_of(found, HERE))
    one = cpu_step_picture.png(rows_of([c for c in found if c.network == large], HERE))
    assert pixels(both) == pixels(one)
    assert both != one
    assert cpu_step_picture.png(rows_of([a_comparison(0.5, 1.0, "another")], HERE)) is None


def test_the_map_is_drawn_of_rows() -> None:
    rivals = ("sgd fused, no mask", "eager chain, tuned")
    found = [
        a_comparison(sparsity, 3.0, network, weights, rival)
        for network in ("one layer", "layers of 32x32")
        for weights in (1, 1024, 10**8)
        for sparsity in (0.0, 0.95)
        for rival in rivals
    ]
    whole = cpu_map_picture.png(rows_of(found, HERE))
    less = cpu_map_picture.png(rows_of([c for c in found if c.weights != 1], HERE))
    assert pixels(less)[1] < pixels(whole)[1]
    without_rival = [c for c in found if rivals[1] not in c.times and c.sparsity > 0.9]
    assert cpu_map_picture.png(rows_of(without_rival, HERE)) is not None
    assert cpu_map_picture.png([]) is None


def test_the_ratios_of_the_map_tell_how_many_times_as_fast() -> None:
    rows = rows_of([a_comparison(0.5, 2.0), a_comparison(0.9, 8.0, weights=10)], HERE)
    assert cpu_map_picture.ratios_of(rows, "chain") == {(10**6, 0.5): 2.0, (10, 0.9): 0.5}
    assert cpu_map_picture.ratios_of(rows, "another") == {}


@pytest.mark.parametrize(
    ("weights", "shown"),
    [(1, "1"), (306, "310"), (992, "990"), (999, "1k"), (3136, "3.1k"), (10**6, "1M"), (31618129, "32M")],
)
def test_short_numbers(weights: int, shown: str) -> None:
    assert cpu_map_picture.short(weights) == shown


def test_the_caption_names_the_instruction_set_and_all_dates() -> None:
    rows = rows_of([a_comparison(0.5, 2.0)], HERE)
    rows[0]["date"], rows[1]["date"] = "2026-11-25", "2026-11-22"
    shown = cpu_results.caption(rows)
    assert shown.startswith(f"{HERE}, 2 threads, avx512; PyTorch ")
    assert shown.endswith("; 2026-11-22 to 2026-11-25")
    assert cpu_results.caption(rows[:1]).endswith("; 2026-11-25")


BENCH = """
from comparison import Comparison
from sparseopt_kernels.lab.timing import Summary

def bench_made_up(record_step, record_map):
    times = {name: Summary(1.0, 2.0, 3.0, 2.0, 9) for name in ("sparseopt", "sgd fused, no mask")}
    record_step(Comparison("ResNet-20, 20 steps in a row", 0.5, 1000, 5000, 30.0, times))
    record_map(Comparison("one layer", 0.5, 1000, 5000, 30.0, times))

def bench_may_fail():
    assert CONDITION
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the benchmarks, without what is measured and what was."""
    copy = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS, copy, ignore=shutil.ignore_patterns("results", "bench_*", "__pycache__"))
    return copy


def bench(server: PytestServer, folder: Path, condition: str = "True") -> tuple[int, str]:
    """Run a benchmark that times nothing, and another one that fails unless the condition is true. Return the
    exit code and what was printed."""
    (folder / "bench_made_up.py").write_text(BENCH.replace("CONDITION", condition))
    ini = folder / "pytest.ini"
    ini.write_text("[pytest]\npythonpath = .\n")
    arguments = ["-q", "-c", str(ini), "-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", str(folder)]
    isa = os.environ["SPARSEOPT_CPU_ISA"]
    return server.run(folder.parent, arguments, imports_from=BENCHMARKS.parent, SPARSEOPT_CPU_ISA=isa)


def test_a_run_writes_the_files_of_its_machine_and_replaces_them(
    forked_pytest: PytestServer, folder: Path
) -> None:
    for _ in range(2):
        code, printed = bench(forked_pytest, folder)
        assert code == 0, printed
        assert re.search(r"^0 min \d+ s in all$", printed, re.MULTILINE)
    slug = cpu_results.slug(machine())
    names = [f"cpu_{kind}-{slug}{end}" for kind in ("step", "map") for end in (".csv", "-avx512.png")]
    assert sorted(path.name for path in (folder / "results").iterdir()) == sorted(names)
    for kind in ("step", "map"):
        with (folder / "results" / f"cpu_{kind}-{slug}.csv").open(newline="") as file:
            assert [row["contestant"] for row in csv.DictReader(file)] == ["sparseopt", "sgd fused, no mask"]


def test_nothing_is_written_if_a_benchmark_fails(forked_pytest: PytestServer, folder: Path) -> None:
    code, printed = bench(forked_pytest, folder, condition="False")
    assert code == 1
    assert "nothing was written" in printed
    assert not (folder / "results").exists()


@pytest.mark.parametrize("kind", [cpu_results.STEP, cpu_results.MAP])
def test_nothing_is_measured_if_a_file_is_another_machines(
    forked_pytest: PytestServer, folder: Path, kind: str
) -> None:
    path = path_of(folder / "results", kind, machine())
    replace(path, rows_of([a_comparison(0.5, 2.0)], "another"), "another")
    code, printed = bench(forked_pytest, folder)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "has rows of another machine, 'another'" in printed
    assert "passed" not in printed
    assert [path] == list(path.parent.iterdir())
