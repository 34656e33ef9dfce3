"""The operations of PyTorch that a step makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# What torch.optim.Optimizer does around every step, for the profiler; and views, which do nothing.
OF_PYTORCH = ("_record_function_enter_new", "_record_function_exit", "detach", "view", "alias")


# Those that wait for the device, of the kind that shows here: among CPU tensors, a copy to the host does not.
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "index")


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch; those that read a value to go on are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        if name not in OF_PYTORCH:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))
