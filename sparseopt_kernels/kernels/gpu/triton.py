"""The Triton backend, for CUDA, ROCm and XPU devices: launches the kernels of ``triton_step`` and
``triton_lists``, when ``plan`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import Inputs, Rule
from ..memory import address_of
from .device import capturing, multiprocessors, upload
from .lists import Listing, weights_per_sector
from .plan import GpuBackend
from .tables import SectorLaunch, StepLaunch

_OLDEST = (3, 5)  # with which all tests of compiled kernels pass
_MISSING: str | None = None
_INTERPRETED = False
try:
    import triton
    import triton.language as tl

    _VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if _VERSION < _OLDEST:
        raise ImportError(f"Triton {triton.__version__} is installed, it needs 3.5 or newer")
    from . import triton_lists, triton_step

    _INTERPRETED = not isinstance(triton_step.masked_step, triton.JITFunction)
    _TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
except ImportError as error:
    _MISSING = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        _MISSING = "Triton is not installed (pip install triton)"

# A program is one warp, so that none waits for another. Rounding is decided where a kernel says fma.
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
_WARP = 32 if torch.version.hip is None else 64
PROGRAMS = 32  # of a multiprocessor, at most
REGISTERS = 2048 * _WARP  # which its programs share


class Triton(GpuBackend):
    def __init__(self) -> None:
        super().__init__(TritonKernels(), (torch.float32, torch.bfloat16, torch.float16))

    def unavailable(self, device: torch.device) -> str | None:
        if _INTERPRETED:
            if device.type == "cpu":
                return None
            return f"TRITON_INTERPRET is set: it updates tensors on the cpu, not on {device.type}"
        if device.type in ("cuda", "xpu"):
            return _MISSING
        reason = f"it updates tensors on cuda and xpu devices, not on {device.type}"
        return reason if _MISSING is None else f"{reason}; {_MISSING}"


class TritonKernels:
    """``plan.GpuKernels``, with the sizes of their tiles."""

    most_tensors = 1 << 30
    by_alignment = True
    # Computed, not measured, for float32 with momentum: registers, spills and programs of a multiprocessor as
    # Triton 3.7 compiles for sm_90; times of a step of ResNet-50 at 0.9 and 0.99 by the model of an H100
    # (benchmarks/gpu_model.py), from the one to the other of its two assumptions on memory.
    #
    # A thread has one sector, in sector_step as in masked_step.
    chunk = _WARP  # 72 registers. 64: 96 registers, 1.00 and 0.98-1.01 of its time
    # With new masks: 76 registers, 25 programs. 32 units: 68 and 28, 0.88-0.94 and 0.84-0.87 of its time (of
    # 4096x4096: 1.06-1.18 and 1.15-1.24). 8: 128 and 16, 16 bytes spilled, 1.13-1.25 and 1.54-1.61.
    units, rows = 16, _WARP // 16
    # Weights of a row at a time: 16 bytes of the mask for each thread of 32. With new masks, 256: 66
    # registers, 28 programs, 1.01-1.02 and 1.05-1.07 of its time. 1024: 128 and 16, 24 bytes spilled,
    # 1.00-1.01 and 1.19-1.25.
    counted = 512
    # Of count_rows: 64 registers, 32 programs. 4 rows: 95 and 21. 64 sectors: 115 and 17.
    list_rows, list_sectors_at_a_time = 2, 32

    def step_rows(self, columns: int) -> int:
        return self.rows

    def place(self, addresses: bytes, device: torch.device) -> Tensor:
        return upload(torch.frombuffer(bytearray(addresses), dtype=torch.int64), device)

    def count_rows(self, listing: Listing) -> None:
        memory = (listing.table, listing.program_to_tensor, listing.fan_in, listing.live)
        _launch(triton_lists.count_rows, listing.programs, memory, self._list_tile(listing))

    def list_sectors(self, listing: Listing, ends: Tensor) -> None:
        memory = (listing.table, listing.program_to_tensor, listing.live, ends)
        _launch(triton_lists.list_sectors, listing.programs, memory, self._list_tile(listing))

    def masked_step(self, launch: StepLaunch, gradients: Tensor, inputs: Inputs) -> None:
        rules = _rules(inputs.rules[launch.rules])
        memory = (
            launch.table,
            gradients,
            launch.program_to_tensor,
            inputs.found_inf,
            inputs.grad_scale,
            rules.numbers,
        )
        constants = {
            "TYPE": _TYPES[launch.dtype],
            "ALIGNED": launch.aligned,
            "MOMENTUM": launch.momentum,
            "HAM": rules.ham,
            # Of 8 weights where each is an access of its own.
            "WEIGHTS": weights_per_sector(launch.dtype) if launch.aligned else 8,
            "ROWS": self.rows,
            "UNITS": self.units,
            "COUNTED": self.counted,
        }
        _launch(triton_step.masked_step, launch.programs, memory, constants, rules.arguments)

    def sector_step(self, launch: SectorLaunch, gradients: Tensor, inputs: Inputs) -> None:
        rules = _rules(inputs.rules[launch.rules])
        memory = (launch.table, gradients, launch.chunk_to_tensor, launch.chunks)
        scalars = (inputs.found_inf, inputs.grad_scale, rules.numbers)
        constants = {
            "TYPE": _TYPES[launch.dtype],
            "ALIGNED": launch.aligned,
            "GRADS_ALIGNED": launch.grads_aligned,
            "WIDE": launch.wide,
            "MOMENTUM": launch.momentum,
            "HAM": rules.ham,
            "WEIGHTS": weights_per_sector(launch.dtype),
            "SECTORS": self.chunk,
        }
        programs = _most_programs(launch)
        _launch(triton_step.sector_step, programs, (*memory, *scalars), constants, rules.arguments, True)

    def sector_squares(self, launch: SectorLaunch, gradients: Tensor) -> Tensor:
        sums = torch.empty(_most_programs(launch), 2, dtype=torch.float32, device=gradients.device)
        memory = (launch.table, gradients, launch.chunk_to_tensor, launch.chunks, sums)
        constants = {
            "TYPE": _TYPES[launch.dtype],
            "ALIGNED": launch.aligned,
            "GRADS_ALIGNED": launch.grads_aligned,
            "WIDE": launch.wide,
            "WEIGHTS": weights_per_sector(launch.dtype),
            "SECTORS": self.chunk,
        }
        _launch(triton_step.sector_squares, len(sums), memory, constants)
        return sums

    def _list_tile(self, listing: Listing) -> dict[str, int]:
        return {
            "ROWS": self.list_rows,
            "SECTORS": self.list_sectors_at_a_time,
            "WEIGHTS": weights_per_sector(listing.dtype),
        }


class RuleArgument(NamedTuple):
    """A rule as the kernels take it. Numbers are floats: Triton would compile anew for another integer.

    ``lr_place`` and ``gamma_place`` are indices into the tensor of numbers that only the device knows, or -1.
    """

    lr: float
    lr_place: float
    momentum: float
    one_minus_dampening: float
    weight_decay: float
    nesterov: float
    ham_alpha: float
    ham_beta: float
    sign: float
    gamma: float
    gamma_place: float


class _Rules(NamedTuple):
    arguments: tuple[RuleArgument, ...]
    numbers: Tensor | None  # those that only the device knows
    ham: bool  # whether it is asked for


def _rules(rules: Sequence[Rule]) -> _Rules:
    tensors: list[Tensor] = []
    arguments = tuple(_argument(rule, tensors) for rule in rules)
    ham = any(rule.ham_alpha != 0 or rule.ham_beta != 0 for rule in rules)
    if len(tensors) > 1:
        return _Rules(arguments, torch.stack(tensors), ham)
    return _Rules(arguments, tensors[0] if tensors else None, ham)


def _argument(rule: Rule, tensors: list[Tensor]) -> RuleArgument:
    def known(number: float | Tensor) -> tuple[float, float]:
        if not isinstance(number, Tensor):
            return number, -1.0
        tensors.append(number)
        return 0.0, float(len(tensors) - 1)

    lr, lr_place = known(rule.lr)
    gamma, gamma_place = known(rule.gamma)
    return RuleArgument(
        lr=lr,
        lr_place=lr_place,
        momentum=rule.momentum,
        one_minus_dampening=1.0
        - rule.dampening,  # not on the device: the float32 nearest to it would lose digits
        weight_decay=rule.weight_decay,
        nesterov=float(rule.nesterov),
        ham_alpha=rule.ham_alpha,
        ham_beta=rule.ham_beta,
        sign=-1.0 if rule.maximize else 1.0,
        gamma=gamma,
        gamma_place=gamma_place,
    )


def _most_programs(launch: SectorLaunch) -> int:
    """Return the number of programs: at most one for each chunk, and as many as the device may hold at a
    time."""
    return min(launch.most_chunks, PROGRAMS * multiprocessors(launch.table.device))


class Loaded(NamedTuple):
    kernel: Any  # triton.compiler.CompiledKernel
    resident: int  # how many programs the device holds at a time


LOADED: dict[tuple[Any, ...], Loaded] = {}


def _launch(
    kernel: Any,
    programs: int,
    memory: Sequence[Tensor | None],
    constants: dict[str, Any],
    rules: tuple[RuleArgument, ...] | None = None,
    share_out: bool = False,
) -> None:
    """Launch a kernel.

    The types of its arguments never change. So a kernel that was compiled for the same constants is launched
    again without Triton's search for it, which takes as long as the rest of a step.

    Args:
        memory: the first is its table.
        share_out: programs share out the work among each other, and no more are launched than fit.
    """
    assert memory[0] is not None
    arguments: list[Any] = [*map(address_of, memory)]
    if rules is not None:
        arguments.append(rules)
    if _INTERPRETED:
        kernel[(programs,)](*arguments, **constants)
        return
    device = memory[0].device
    key = (kernel, device, 0 if rules is None else len(rules), *constants.values())
    loaded = LOADED.get(key)
    if loaded is None:
        loaded = _load(kernel, device, arguments, constants)
        if loaded is None:
            return
        LOADED[key] = loaded
    if share_out:
        programs = min(programs, loaded.resident)
    loaded.kernel[programs, 1, 1](*arguments, *constants.values())


def _load(
    kernel: Any, device: torch.device, arguments: list[Any], constants: dict[str, Any]
) -> Loaded | None:
    """Compile a kernel, and load it onto the device. None in tests, where nothing is to run.

    Raises:
        RuntimeError: a graph is being captured, when CUDA loads nothing unless asked to be lenient.
    """
    if capturing():
        raise RuntimeError(
            "a step is captured in a CUDA graph that needs a kernel which no step before it needed, because "
            "of its hyperparameters or of where its gradients lie: make one step like it outside the graph "
            "first"
        )
    compiled = kernel.warmup(*arguments, grid=(1,), **constants, **_OPTIONS)
    if compiled is None:
        return None
    compiled[1, 1, 1]  # loads it, and launches nothing
    registers = max(8, -(-compiled.n_regs // 8) * 8)  # Intel's driver says 0
    fit = max(1, min(PROGRAMS, REGISTERS // (registers * _WARP)))
    return Loaded(compiled, fit * multiprocessors(device))


TRITON = Triton()
