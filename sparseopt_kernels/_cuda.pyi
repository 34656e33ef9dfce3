"""Types of the CUDA library, which is compiled from csrc/cuda. Addresses are on the device, streams are
cudaStream_t; the device that they belong to must be the current one. All work is queued on the stream."""

from collections.abc import Sequence

from .kernels.contract import Rule

MOST_TENSORS: int
"""Of one launch, as are rules: ``gradients`` has the address of each tensor's gradient, 8 bytes each."""
MOST_RULES: int
SECTOR_BYTES: int
CHUNK: int
"""Sectors that are visited at a time."""
LIST_ROWS: int
"""Rows of a block of ``count_rows`` and ``list_sectors``."""
STEP_ROW: tuple[str, ...]
"""What the kernels take the columns of their tables for, and the fields of a rule."""
SECTOR_ROW: tuple[str, ...]
LIST_ROW: tuple[str, ...]
RULE: tuple[str, ...]

class SectorLaunch:
    """Tensors that are updated sector by sector. Memory is as in ``gpu/tables.SectorLaunch``."""

    def __init__(
        self,
        dtype: str,
        table: int,
        chunk_to_tensor: int,
        chunks: int,
        wide: bool,
        most_chunks: int,
        multiprocessors: int,
    ) -> None: ...
    @property
    def blocks(self) -> int: ...

def step_rows(columns: int) -> int:
    """Rows of a block of ``masked_step``."""

def masked_step(
    dtype: str,
    table: int,
    block_to_tensor: int,
    blocks: int,
    gradients: bytes,
    rules: Sequence[Rule],
    grad_scale: int,
    found_inf: int,
    stream: int,
) -> None:
    """Update neurons whose fan-in is counted from their masks. ``table`` and ``block_to_tensor`` are as in
    ``gpu/tables.StepLaunch``; ``grad_scale`` and ``found_inf`` are addresses of float32 numbers, or 0."""

def sector_step(
    launch: SectorLaunch,
    gradients: bytes,
    rules: Sequence[Rule],
    grad_scale: int,
    found_inf: int,
    stream: int,
) -> None:
    """Update the live sectors of all tensors."""

def sector_squares(launch: SectorLaunch, gradients: bytes, sums: int, stream: int) -> None:
    """Write two numbers of the arithmetic type for each of ``launch.blocks``. The sum of them all, taken in
    float64, is that of ``(c_i g)^2``."""

def count_rows(
    dtype: str, table: int, block_to_tensor: int, fan_in: int, live: int, blocks: int, stream: int
) -> None:
    """As ``gpu/lists.ListKernels`` has it; memory is as in ``gpu/lists.Listing``."""

def list_sectors(
    dtype: str, table: int, block_to_tensor: int, fan_in: int, live: int, ends: int, blocks: int, stream: int
) -> None: ...
def build_info() -> dict[str, object]:
    """``cuda``: the compiler's version; ``architectures``: those there is machine code for, as 90 for
    sm_90; ``ptx``: those there is code for that a driver can translate for later ones."""

def driver_version() -> int:
    """The CUDA that the driver knows, 12080 for 12.8; 0 without one."""
