"""Types of the native library, which is compiled from csrc/bindings.cpp."""

class PackedMask:
    def __init__(
        self, mask: int, groups: int, segments: int, neurons_per_group: int, length: int
    ) -> None: ...
    @property
    def nnz(self) -> int: ...
    def row_bits(self, row: int) -> bytes: ...

class Tensor:
    def __init__(
        self,
        dtype: str,
        parameter: int,
        momentum_buffer: int,
        numel: int,
        ham: bool,
        mask: PackedMask | None,
    ) -> None: ...

class Rule:
    def __init__(
        self,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        correction: str,
        ham_alpha: float,
        ham_beta: float,
        gamma: float,
    ) -> None: ...

class Table:
    def __init__(self, tensors: list[Tensor], groups: list[int]) -> None: ...

def step(
    table: Table,
    grads: list[int],
    rules: list[Rule],
    first_steps: list[bool],
    stale: list[bool],
    threads: int,
) -> None: ...
def squared_norm(
    table: Table,
    grads: list[int],
    rules: list[Rule],
    first_steps: list[bool],
    stale: list[bool],
    threads: int,
) -> float: ...
def available_isas() -> list[str]: ...
def build_info() -> dict[str, object]: ...
