"""Types of the CUDA library, which is compiled from csrc/cuda. Addresses are on the device, streams are
cudaStream_t; the device that they belong to must be the current one."""

LAUNCH_CAPACITY: int
"""Tensors per launch."""

class Tensor:
    """``bits`` is 0 for a dense tensor, of one row. Else they are ``rows * ceil(columns / 8)`` bytes, and
    ``mean_fan_in`` is the address of one number of the arithmetic type: nnz / rows."""

    def __init__(
        self,
        *,
        dtype: str,
        parameter: int,
        momentum_buffer: int,
        rows: int,
        columns: int,
        bits: int,
        mean_fan_in: int,
        ham: bool,
    ) -> None: ...

class Rule:
    """Where ``lr_address`` or ``gamma_address`` is not 0, the number of the arithmetic type that is there
    replaces ``lr`` or ``gamma``."""

    def __init__(
        self,
        *,
        lr: float,
        lr_address: int,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        correction: str,
        ham_alpha: float,
        ham_beta: float,
        gamma: float,
        gamma_address: int,
    ) -> None: ...

class Table:
    """Tensors of one dtype on one device, and the index of each one's rule."""

    def __init__(self, tensors: list[Tensor], groups: list[int]) -> None: ...

def step(
    table: Table,
    grads: bytes,
    rules: list[Rule],
    grad_scale: int,
    found_inf: int,
    stream: int,
) -> int:
    """Queue a step; return the number of launches. ``grads`` has the address of each tensor's gradient, 8
    bytes each; ``grad_scale`` and ``found_inf`` are those of float32 numbers, or 0."""

def squared_norm(table: Table, grads: bytes, rules: list[Rule], partial_sums: int, stream: int) -> None:
    """Write ``partial_sum_count(table)`` numbers of the arithmetic type, whose sum, taken in float64, is
    that of (c_i g)^2."""

def partial_sum_count(table: Table) -> int: ...
def pack(mask: int, rows: int, columns: int, bits: int, nnz: int, stream: int) -> None:
    """Write the bits of a boolean mask, and how many are set as one int64."""

def build_info() -> dict[str, object]:
    """``cuda``: the compiler's version; ``architectures``: those there is machine code for, as 90 for
    sm_90; ``ptx``: those there is code for that a driver can translate for later ones."""
