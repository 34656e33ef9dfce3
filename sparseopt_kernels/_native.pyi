"""Types of the native library, which is compiled from csrc/python/native_module.cpp."""

from collections.abc import Callable, Sequence
from typing import Any

MASK_TURNS: int
"""The number of steps within which any write to a mask is noticed."""
WEIGHT_TURNS: int
"""The same for a write to weights outside a mask."""

class PackedMask:
    def __init__(
        self, mask: int, groups: int, segments: int, neurons_per_group: int, length: int, threads: int
    ) -> None: ...
    @property
    def neurons(self) -> int: ...
    def count_fan_in(self, fan_in: int, threads: int) -> None:
        """Write the fan-in of each neuron at that address, as int64."""

    @property
    def bits(self) -> list[int]:
        """Of each 16 weights as they lie in memory, the lowest first."""

    @property
    def live_blocks(self) -> list[int]:
        """The indices of the bits that are not 0; empty where nearly all are."""

    @property
    def live_bits(self) -> list[int]:
        """The bits at these indices."""

class WriteWatch:
    """Notices writes to a mask, at that address, and to weights outside of it."""

    def __init__(
        self, mask: int, element_bytes: int, packed: PackedMask, numel: int, in_order: bool
    ) -> None: ...
    mask_written: bool
    weights_written: bool
    def forget(self) -> None: ...

class Tensor:
    """``factors`` is the address of c_i of each neuron, float64, which are copied; 0: they are 1."""

    def __init__(
        self,
        *,
        dtype: str,
        parameter: int,
        momentum_buffer: int,
        numel: int,
        ham: bool,
        mask: PackedMask | None,
        factors: int,
        watch: WriteWatch | None,
    ) -> None: ...

class Rule:
    def __init__(
        self,
        *,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        ham_alpha: float,
        ham_beta: float,
        gamma: float,
    ) -> None: ...

class Table:
    """Tensors, and the index of each one's rule."""

    def __init__(self, tensors: list[Tensor], rules: list[int]) -> None: ...
    def forget(self) -> None:
        """Forget what any_written has found."""

def step(table: Table, grads: bytes, rules: list[Rule], threads: int) -> None:
    """``grads`` has the address of each tensor's gradient, 8 bytes each."""

def any_written(table: Table, everything: bool) -> bool:
    """Tell if a mask, or a weight outside of one, was written: looks at a part, another one in each call, and
    knows what earlier calls have found."""

def squared_norm(table: Table, grads: bytes, rules: list[Rule], threads: int, dense: bool) -> float: ...

class MemoryReader:
    """Tells where tensors lie: ``exchange_api`` is ``torch.Tensor.__dlpack_c_exchange_api__``."""

    def __init__(self, exchange_api: object, tensor: type, parameter: type) -> None: ...
    def read(self, tensors: Sequence[object]) -> tuple[bytes, bytes] | None:
        """Layouts and addresses of tensors and Nones; None where one of them cannot be read."""

class Snapshot:
    """A snapshot, as in ``step/change_detection.py``: made natively, and only compared."""

class Optimizer:
    """What a step depends on: see ``change_detection.observe``. To be thrown away after the call that it is
    for, because the garbage collector does not see into it."""

    def __init__(
        self,
        groups: object,
        state: object,
        mask_owners: list[Any],
        masks: list[Any],
        parameters: list[Any],
        watched: list[Any],
    ) -> None: ...

class StepReader:
    """Reads what ``change_detection.observe`` returns."""

    def __init__(self, memory: MemoryReader) -> None: ...
    def read(self, optimizer: Optimizer) -> tuple[list[Any], bytes, bool, Snapshot, list[int]] | None:
        """Gradients, their addresses, whether one is lazily negated, the snapshot, and the versions of what
        is watched; None where something is not as expected."""

class RepeatableStep:
    """A step that was made, and can be repeated: see ``step/last_step.py``."""

    def __init__(
        self,
        reader: StepReader,
        table: Table,
        positions: list[int],
        snapshot: Snapshot,
        versions: list[int],
        dense_norm: bool,
    ) -> None:
        """``dense_norm``: of the gradients, where their norm is limited, all positions count."""

    def repeat(
        self,
        optimizer: Optimizer,
        updated: list[Any],
        increment_version: Callable[[list[Any]], None],
        threads: int,
    ) -> bool:
        """Make it again. False, and nothing has happened, if something has changed, or needs Python."""

    def versions(self) -> list[int]:
        """Return the versions of the watched tensors after the last step."""

class Decision:
    """A strategy that was measured for tensors of a kind, and what a block of 16 weights took."""

    step_bytes: int
    live_share: float
    element_bytes: int
    ham: bool
    strategy: str
    stream_ns: float
    list_ns: float

def decisions() -> list[Decision]:
    """The present ones of this process. A kind that is being measured has none."""

class Kind:
    """Updates that the same strategy is faster for: see ``csrc/cpu/strategy.h``."""

    def __init__(
        self, *, step_bytes: int, live_share: float, element_bytes: int, momentum: bool, ham: bool
    ) -> None: ...

class Strategies:
    """What is known of the kinds; a process has one, which ``step`` uses. Strategies are ``"list"`` and
    ``"stream"``."""

    def choices(self, kinds: list[Kind], is_step: bool) -> list[tuple[str, bool]]:
        """Return for each kind the strategy, and whether the step is timed."""

    def measured(self, kind: Kind, strategy: str, ns: float) -> None: ...
    def decisions(self) -> list[Decision]: ...

class MaskedLayer:
    """Contiguous tensors of ``numel`` elements; ``mask`` and ``explored`` are boolean.

    Each neuron keeps ``min_fan_in`` inputs; ``grid`` says where they lie (``Neurons.grid``).
    """

    def __init__(
        self,
        *,
        dtype: str,
        weights: int,
        mask: int,
        explored: int,
        numel: int,
        min_fan_in: int,
        grid: tuple[int, int, int, int],
    ) -> None: ...

class Scores:
    """Scores of the layer with that index, contiguous and of its shape. Their magnitudes are compared."""

    def __init__(self, *, layer: int, dtype: str, values: int, at_most: int, fills: bool) -> None: ...

class Change:
    """What happens to the mask of a layer. The magnitudes of ``drop_scores``, an address, are compared. With
    two seeds, weights grow at random, the inputs that neurons lack first; None: by rank."""

    def __init__(
        self, *, drop: int, grow: int, dtype: str, drop_scores: int, seeds: tuple[int, int] | None
    ) -> None: ...

class DropAndGrow:
    """An update of the masks of all layers (``csrc/cpu/drop_and_grow.h``)."""

    def __init__(self, layers: list[MaskedLayer], threads: int) -> None: ...
    @property
    def active(self) -> list[int]: ...
    @property
    def missing(self) -> list[int]:
        """The number of inputs of each layer that its neurons have less than ``min_fan_in``."""

    @property
    def sees_active(self) -> bool:
        """True if a score by which weights may grow is not 0, of an active weight."""
    @property
    def sees_inactive(self) -> bool:
        """The same of an inactive weight."""
    def rank(self, scores: list[Scores], threads: int) -> bool: ...
    def update(self, changes: list[Change], threads: int) -> list[list[int]]:
        """Drop and grow. The numbers are those of a ``layer_update.LayerUpdate``."""

class DigitSearch:
    """What a rank counts of its part of a layer (``csrc/cpu/digit_search.h``). Tensors are addresses."""

    def __init__(self, *, dtype: str, values: int, candidates: int, first: int, numel: int) -> None: ...
    @property
    def key_bits(self) -> int: ...
    def counts(self, prefix: int, left: int, threads: int) -> list[int]:
        """Count the candidates whose keys begin with the prefix by their next digit: 2048 numbers."""
    def mark(self, threshold: int, chosen: int, threads: int) -> tuple[int, int]:
        """Write 1 to ``chosen`` above the threshold, else 0. Return how many have it: in first, others."""
    def choose(self, chosen: int, in_first: int, elsewhere: int) -> None:
        """Write 1 to ``chosen`` for so many of those that have the threshold."""

def choose_random(chosen: int, size: int, k: int, seed: int) -> None:
    """Write ``size`` bytes, ``k`` of which are 1."""

def zero_outside(mask: int, data: int, numel: int, element_bytes: int, threads: int) -> None:
    """Zero the elements at ``data`` whose byte at ``mask`` is 0; ``element_bytes`` is 2, 4 or 8."""

def available_isas() -> list[str]: ...
def build_info() -> dict[str, object]: ...
