"""Tests and then times SparseOpt on a GPU, in under eight minutes: ``python benchmarks/gpu_report.py``.

``gpu_first`` runs it, too: it has made the tests then, and gives the folder and the seconds.

It runs the tests marked ``gpu``, measures the bandwidth of a copy, times the contestants of ``gpu_runs`` in
turns, prints a table and writes a CSV file and a picture. If a test fails, it reports only that.

``median_ms`` is the time on the device, with a cold cache; ``host_ms`` is the host's time for the call, which
matters where it is the larger. ``bytes`` is the least that a step can move: 20 bytes per weight in sectors of
32 bytes that hold an active weight, and the mask as bits; for SGD without a mask, 20 bytes per weight.
``fraction_of_copy_bandwidth`` is these bytes per median, divided by the bandwidth of the copy.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to time the code that is tested

from gpu_runs import (
    LEFT_OUT,
    NO_MEMORY,
    OK,
    OURS,
    SGD_FOREACH,
    SGD_FUSED,
    Deadline,
    Result,
    Run,
    copy_bandwidth,
    makers_for,
    measure,
)
from networks import LAYERS_8192X8192, RESNET20, RESNET50

from sparseopt_kernels import __version__
from sparseopt_kernels.kernels import BACKENDS
from sparseopt_kernels.lab.atomic import write_atomically
from sparseopt_kernels.lab.bench.checks import WRONG
from sparseopt_kernels.lab.bench.contestants import Maker
from sparseopt_kernels.lab.bench.network import Shape
from sparseopt_kernels.lab.timing import CudaTimer, Timer
from sparseopt_kernels.text_table import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 450.0  # for the whole report
SUITE = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu/test_on_device.py", "-q"]
SUITE_SECONDS = 240.0  # most of it is the compilation of kernels
# The smallest network is last, because a slow machine leaves the last ones out.
RUNS = [
    *(Run("4 layers of 8192x8192", LAYERS_8192X8192, sparsity) for sparsity in (0.0, 0.9, 0.95, 0.99)),
    *(Run("ResNet-50", RESNET50, sparsity) for sparsity in (0.9, 0.95, 0.99)),
    *(Run("ResNet-20", RESNET20, sparsity) for sparsity in (0.9, 0.95, 0.99)),
]
COLUMNS = (
    *("device", "version", "torch", "triton", "network", "weights", "sparsity", "contestant", "median_ms"),
    *("p20_ms", "p80_ms", "host_ms", "bytes", "copy_gb_per_s", "fraction_of_copy_bandwidth", "status"),
)
# By a word of the contestant's name. The colour-blind can tell the colours apart (Okabe and Ito).
_COLOURS = {
    "triton": "#0072b2",
    "cuda": "#009e73",
    "fused, no mask": "#777777",
    "foreach, no mask": "#bbbbbb",
    "fused": "#e69f00",
    "foreach": "#d55e00",
    "compile": "#cc79a7",
}


def main(arguments: Sequence[str] = ()) -> int:
    """Report on the current CUDA device and return the exit status."""
    parser = argparse.ArgumentParser(description="Tests and then times SparseOpt on a GPU.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole report")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results", help="for its files")
    parser.add_argument("--tested", action="store_true", help="leave out the tests: they have been run")
    options = parser.parse_args(arguments)
    deadline = Deadline(options.seconds)
    if not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no CUDA device here: nothing was measured.")
        return 1
    missing = [name for name in ("matplotlib", "tqdm", "pytest", "pybind11") if find_spec(name) is None]
    if missing:
        print(f"{', '.join(missing)} not installed: pip install -e '.[test]' (nothing was measured)")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    print(f"{name}, driver {_driver()}, CUDA {torch.version.cuda}")
    print(f"sparseopt_kernels {__version__}, PyTorch {torch.__version__}, Triton {_triton()}")
    backends = []
    for backend in ("triton", "cuda"):
        reason = BACKENDS[backend].unavailable(device)
        print(f"backend {backend!r}: {reason or 'available'}")
        if reason is None:
            backends.append(backend)
    if not backends:
        print("No backend of SparseOpt runs on this device: nothing was measured.")
        return 1
    if not options.tested and not suite_is_green(SUITE, SUITE_SECONDS):
        print("The tests on the device did not pass: nothing was measured.")
        return 1
    print(f"{deadline.elapsed():.0f} s so far", flush=True)
    timer = CudaTimer(device)
    return report(name, device, RUNS, makers_for(backends), timer, deadline, options.folder)


def suite_is_green(command: Sequence[str], seconds: float) -> bool:
    """Run the suite, print the end of its output, and tell if it passed; skipping all tests is no pass."""
    print("tests on the device:", flush=True)
    try:
        run = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        said = error.output or b""
        _print_end(said.decode(errors="replace") if isinstance(said, bytes) else said, 60)
        print(f"  not finished after {seconds:.0f} s")
        return False
    _print_end(run.stdout, 15 if run.returncode == 0 else 60)
    return run.returncode == 0 and re.search(r"^[= ]*[1-9]\d* passed\b", run.stdout, re.M) is not None


def _print_end(text: str, count: int) -> None:
    print("\n".join(f"  {line}" for line in text.strip().splitlines()[-count:]))


def report(
    name: str,
    device: torch.device,
    runs: Sequence[Run],
    makers: dict[str, Maker],
    timer: Timer,
    deadline: Deadline,
    folder: Path,
    copy_bytes: int = 1 << 30,
) -> int:
    """Measure on ``device``, print the table and write the files.

    Returns:
        The exit status: 1 if one of SparseOpt's contestants failed or is wrong.
    """
    copy = copy_bandwidth(timer, device, copy_bytes)
    print(f"a copy within its memory: {copy:.1f} GB/s, read and written", flush=True)
    results = measure(runs, makers, timer, device, copy, deadline)
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"gpu_{slug}.csv", csv_of(results, name).encode())
    print(table(results))
    print(beside_model(results, runs))
    write_atomically(folder / f"gpu_{slug}.png", picture(results, name))
    left_out = sum(result.status == LEFT_OUT for result in results)
    if left_out:
        print(f"{left_out} of {len(results)} measurements were left out: there was no time for them")
    print(f"written to {folder}/gpu_{slug}.csv and .png, after {deadline.elapsed():.0f} s")
    bad = [r for r in results if r.contestant.startswith(OURS) and r.status not in (OK, LEFT_OUT, NO_MEMORY)]
    return 1 if bad else 0


def csv_of(results: Iterable[Result], name: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    about = {"device": name, "version": __version__, "torch": torch.__version__, "triton": _triton()}
    for result in results:
        fraction = result.fraction_of_copy_bandwidth()
        row = {**about, **vars(result), "fraction_of_copy_bandwidth": fraction}
        writer.writerow({key: _rounded(value) for key, value in row.items()})
    return text.getvalue()


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.5g}"


def table(results: Sequence[Result]) -> str:
    """Return a table for each network and sparsity: the times, and the speed-ups over SGD without a mask."""
    header = (
        *("contestant", "median ms", "p20", "p80", "host ms"),
        *("bytes/weight", "of copy", "x SGD"),
    )
    lines = []
    for run in dict.fromkeys((r.network, r.sparsity) for r in results):
        own = [r for r in results if (r.network, r.sparsity) == run]
        medians = {r.contestant: r.median_ms for r in own if r.status == OK}
        baseline = medians.get(SGD_FUSED, medians.get(SGD_FOREACH, math.nan))
        lines += ["", f"{run[0]}, {own[0].weights} weights, sparsity {run[1]}"]
        rows = [_row(r, baseline) for r in own if r.status == OK]
        if rows:
            lines += aligned([header, *rows])
        lines += [f"{r.contestant}: {r.status}" for r in own if r.status != OK]
    return "\n".join(
        [
            *lines,
            "",
            f"x SGD: how many times faster than {SGD_FUSED} (where wrong: {SGD_FOREACH}), which does less.",
        ]
    )


def beside_model(results: Sequence[Result], runs: Sequence[Run]) -> str:
    """Return a table of the estimates of ``gpu_model`` for an H100 beside the measured times: that for memory
    which delivers single sectors, and that for memory which delivers pairs."""
    models = {name: _model(name) for name in (SGD_FUSED, f"{OURS}triton", f"{OURS}cuda")}
    header = ("network", "sparsity", "contestant", "sectors us", "pairs us", "measured us", "/ sectors")
    rows: list[tuple[str, ...]] = [(*header, "/ pairs")]
    shapes = {(run.network, run.sparsity): run.shapes for run in runs}
    for r in results:
        model = models.get(r.contestant.removesuffix(", graph"))
        if callable(model) and r.status == OK:
            estimates, us = model(shapes[r.network, r.sparsity], r.sparsity), 1e3 * r.median_ms
            times = (*(f"{estimate:.1f}" for estimate in estimates), f"{us:.1f}")
            ratios = (f"{us / estimate:.2f}" for estimate in estimates)
            rows.append((r.network, str(r.sparsity), r.contestant, *times, *ratios))
    title = "The model of benchmarks/gpu_model.py, which is of an H100, beside it:"
    left_out = [f"It has no estimates for {b}: {why}" for b, why in models.items() if isinstance(why, str)]
    return "\n".join(["", title, *aligned(rows), *left_out])


def _model(contestant: str) -> Callable[[Sequence[Shape], float], list[float]] | str:
    """Return a function from shapes and sparsity to the estimated microseconds of a step, one for each
    assumption on memory, or the reason why there is none: the measurements are reported without then."""
    try:
        import gpu_model
        import kernel_phases

        memories = [*gpu_model.MEMORIES.values()]
        if contestant == SGD_FUSED:
            return lambda shapes, _: [gpu_model.sgd_us(shapes, memory) for memory in memories]
        triton = contestant == f"{OURS}triton"
        step = kernel_phases.triton_kernels().sector_step if triton else kernel_phases.cuda_sector_step()
    except Exception as error:
        return repr(error)
    if step is None:
        return "there is no nvcc"
    return lambda shapes, sparsity: [gpu_model.step_us(shapes, sparsity, own, step) for own in memories]


def _row(result: Result, baseline: float) -> tuple[str, ...]:
    times = (result.median_ms, result.p20_ms, result.p80_ms, result.host_ms)
    ratios = (
        result.bytes / result.weights,
        result.fraction_of_copy_bandwidth(),
        baseline / result.median_ms,
    )
    return (result.contestant, *(f"{t:.4f}" for t in times), *(f"{ratio:.2f}" for ratio in ratios))


def picture(results: Sequence[Result], name: str) -> bytes:
    """Return the medians by sparsity as a PNG file, a panel for each network, with bands from p20 to p80."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(result.network for result in results))
    style: dict[Any, Any] = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4 * max(2, len(networks)), 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            "Time of an optimizer step by sparsity: lower is faster\n"
            f"{name}; float32, momentum, weight decay, ERK masks{_wrong_in(results)}",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
        handles: dict[str, Any] = {}
        for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
            own = [result for result in results if result.network == network]
            axes.set_title(f"{network} ({own[0].weights / 1e6:.3g} million weights)", loc="left", fontsize=10)
            _draw(axes, own)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.supylabel("time of a step on the device in ms (log)", fontsize=9)
        figure.legend(
            handles.values(),
            handles,
            loc="outside lower center",
            ncols=len(networks) + 1,
            frameon=False,
            handlelength=3,
        )
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _draw(axes: Axes, results: Sequence[Result]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    sparsities = sorted({result.sparsity for result in results})
    for contestant in dict.fromkeys(r.contestant for r in results if r.status == OK):
        own = (r for r in results if r.contestant == contestant and r.status == OK)
        timed = sorted(own, key=lambda r: r.sparsity)
        places = [sparsities.index(r.sparsity) for r in timed]
        graph = contestant.endswith("graph")
        colour = next((colour for word, colour in _COLOURS.items() if word in contestant), "#000000")
        low, high = [r.p20_ms for r in timed], [r.p80_ms for r in timed]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            places,
            [r.median_ms for r in timed],
            label=contestant,
            color=colour,
            linestyle="--" if graph else "-",
            marker="s" if graph else "o",
            markerfacecolor="white" if graph else colour,
            markersize=4.5,
        )
    axes.set_xticks(range(len(sparsities)), [f"{100 * sparsity:g}%" for sparsity in sparsities])
    axes.set_xlim(-0.2, max(1, len(sparsities) - 1) + 0.2)
    axes.set_xlabel("sparsity (not to scale)")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    if axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _wrong_in(results: Sequence[Result]) -> str:
    """Return a line that names the contestants with wrong results, or nothing."""
    names = dict.fromkeys(r.contestant for r in results if r.status == WRONG)
    return f"\nnot timed, {WRONG}: {'; '.join(names)}" if names else ""


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
