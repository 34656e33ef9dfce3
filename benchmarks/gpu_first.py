"""Runs all that a first GPU is asked for, in ten minutes, and packs what it says: ``make gpu-first``.

The parts run one after the other, each in a process of its own. Each has to end by a certain time; what one
leaves of its time is the next one's. A part that fails or is not finished in time stops no other. What it
says is in a file of its own; ``summary.txt`` says how each has ended. Ctrl-C ends the part that runs, and
packs what is there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run the code that is checked out

from cuda_tools import tool
from gpu_report import SUITE
from sector_patterns import LEFT_OUT, VERDICT

from sparseopt_kernels import __version__
from sparseopt_kernels.lab.reproduce.code_commit import commit_of
from sparseopt_kernels.text_table import aligned

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent
OK, STOPPED, SKIPPED = "ok", "stopped by Ctrl-C", "left out: "
FORM = "GPU report"  # the name of the issue form
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE = 3.0  # seconds between asking a part to end and ending it
_QUERY = (
    *("name", "driver_version", "memory.total", "ecc.mode.current", "mig.mode.current", "power.limit"),
    *("clocks.max.sm", "clocks.max.mem", "memory.used", "utilization.gpu"),
)
_PACKAGES = re.compile(r"torch|triton|nvidia-|numpy|pytest|sparseopt", re.IGNORECASE)


Command = Callable[[float], Sequence[str]]
"""Of the seconds that it has."""


class Part(NamedTuple):
    name: str  # of its file, too
    about: str
    seconds: float
    command: Command | str  # or why it is left out
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    name: str
    status: str
    seconds: float = 0.0

    def is_bad(self) -> bool:
        return self.status != OK and not self.status.startswith(SKIPPED)


def parts(folder: Path) -> list[Part]:
    """Return the parts, which have 560 seconds in all. What says most comes first."""

    def program(file: str, *arguments: str) -> list[str]:
        return [sys.executable, str(HERE / file), *arguments]

    def report(seconds: float) -> list[str]:
        own = ("--tested", "--folder", str(folder), "--seconds", f"{seconds - 5:.0f}")
        return program("gpu_report.py", *own)

    def with_tool(name: str, command: Callable[[str], list[str]]) -> Command | str:
        path = tool(name)
        if path is None:
            return f"{name} is neither on the PATH nor in a CUDA toolkit"
        return lambda _: command(path)

    def sanitizer(check: str, about: str, seconds: float) -> Part:
        checked = ["--tool", check, "--error-exitcode", "1", *program("device_steps.py")]
        return Part(
            name=check,
            about=f"compute-sanitizer: {about}",
            seconds=seconds,
            command=with_tool("compute-sanitizer", lambda path: [path, *checked]),
            # Each tensor is an allocation of its own, so that what lies behind it is not the next tensor.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    return [
        Part(
            name="doctor",
            about="versions, devices, backends",
            seconds=40,
            command=lambda _: [sys.executable, "-m", "sparseopt_kernels", "doctor"],
        ),
        Part(
            name="patterns",
            about="does memory deliver sectors or pairs, by the time of steps",
            seconds=45,
            command=lambda _: program("sector_patterns.py"),
        ),
        Part(
            name="tests",
            about="the tests on the device",
            seconds=170,
            command=lambda _: [*SUITE, "--durations=10"],
        ),
        Part(
            name="report",
            about="the time of a step beside PyTorch's optimizers",
            seconds=145,
            command=report,
        ),
        sanitizer("memcheck", "addresses", 50),
        Part(
            name="ncu",
            about="does memory deliver sectors or pairs, by Nsight Compute",
            seconds=40,
            command=with_tool("ncu", lambda path: program("sector_patterns.py", "--ncu", path)),
        ),
        sanitizer("racecheck", "shared memory", 40),
        sanitizer("synccheck", "barriers", 30),
    ]


def run(part: Part, seconds: float, log: Path) -> Outcome:
    """Run a part, with what it says in ``log``. After ``seconds``, or by Ctrl-C, it is ended, and all that it
    has started."""
    if isinstance(part.command, str):
        log.write_text(f"{SKIPPED}{part.command}\n")
        return Outcome(part.name, SKIPPED + part.command)
    start = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                part.command(seconds),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
                start_new_session=True,  # so that all that it starts can be ended, and by this program alone
            )
        except OSError as error:
            return Outcome(part.name, f"cannot be started: {error}")
        try:
            code = process.wait(seconds)
            status = OK if code == 0 else f"failed: exit status {code}"
            if code == LEFT_OUT:
                status = SKIPPED + log.read_text(errors="replace").strip().rpartition("\n")[2]
        except subprocess.TimeoutExpired:
            status = f"not finished after {seconds:.0f} s"
        except KeyboardInterrupt:
            status = STOPPED
        finally:
            with no_more_interrupts():
                _end(process)
    return Outcome(part.name, status, time.monotonic() - start)


@contextmanager
def no_more_interrupts() -> Iterator[None]:
    """Let what ends a part, and packs what is there, come to its end."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def run_all(wanted: Sequence[Part], folder: Path) -> list[Outcome]:
    """Run the parts, say how far it is, and return how they have ended. Ctrl-C stops the last one of them.

    The seconds of a part are counted from the end of those of the parts before it: what they leave, it has.
    """
    outcomes: list[Outcome] = []
    start, due = time.monotonic(), 0.0
    for number, part in enumerate(wanted, 1):
        due += part.seconds
        left = due - (time.monotonic() - start)
        print(f"{number} of {len(wanted)}: {part.about} (at most {left:.0f} s)", end=" ... ", flush=True)
        outcomes.append(run(part, left, folder / f"{number}-{part.name}.txt"))
        print(f"{outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        if outcomes[-1].status == STOPPED:
            break
    return outcomes


def about(name: str) -> str:
    """Return the device, the driver, versions and the commit; no names of people or machines."""
    compiler = tool("nvcc")
    packages = {f"{own.metadata['Name']} {own.version}" for own in distributions()}
    lines = [
        f"date: {time.strftime('%Y-%m-%d %H:%M %z')}",
        f"sparseopt_kernels {__version__}, commit {commit_of(Path(__file__)) or 'unknown'}",
        f"device: {name}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}",
        f"devices: {torch.cuda.device_count()}",
        f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, its CUDA {torch.version.cuda}",
        f"nvcc: {_said([compiler, '--version']) if compiler else 'not found'}",
        f"nvidia-smi: {_said(['nvidia-smi', '--query-gpu=' + ','.join(_QUERY), '--format=csv'])}",
        "packages:",
        *sorted(filter(_PACKAGES.match, packages), key=str.lower),
    ]
    return "\n".join(lines) + "\n"


def _said(command: Sequence[str]) -> str:
    """Return what a command says, or why it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip()


def summary(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Return how the parts have ended, and what those say that ask how memory delivers."""
    rows = [(outcome.name, outcome.status, f"{outcome.seconds:.0f}") for outcome in outcomes]
    lines = aligned([("part", "how it ended", "seconds"), *rows])
    for log in sorted(folder.glob("*-patterns.txt")) + sorted(folder.glob("*-ncu.txt")):
        said = log.read_text(errors="replace").splitlines()
        lines += [f"{log.stem}: {line}" for line in said if line.startswith(VERDICT)]
    return "\n".join(lines) + "\n"


def main(runs: Path = ROOT / "runs") -> int:
    """Run all parts on the current CUDA device, pack the folder and return the exit status: 1 if a part has
    failed, 130 if the user has stopped it."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print(f"This needs an NVIDIA GPU, and PyTorch {torch.__version__} finds none.", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = runs / f"gpu-first-{slug}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        print(f"{folder} is to have what the parts say, and cannot be made: {error}", file=sys.stderr)
        return 1
    wanted = parts(folder)
    print(f"{name}: {len(wanted)} parts, ten minutes at most. Ctrl-C keeps what is there.", flush=True)
    (folder / "about.txt").write_text(about(name))
    outcomes = run_all(wanted, folder)
    with no_more_interrupts():
        (folder / "summary.txt").write_text(summary(outcomes, folder))
        archive = shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    bad = [f"{outcome.name} ({outcome.status})" for outcome in outcomes if outcome.is_bad()]
    print(f"""
Please send {archive}
with a new issue, by the form {FORM!r}, also if a part has failed.
It is what the parts have said, with paths of this machine: look through it if these are private.
{f"Failed: {', '.join(bad)}" if bad else "No part has failed."}""")
    if outcomes[-1].status == STOPPED:
        return 130
    return 1 if bad else 0


if __name__ == "__main__":
    for stop in _STOPS:  # a connection that ends, say, stops it as Ctrl-C does
        signal.signal(stop, signal.default_int_handler)
    sys.exit(main())
