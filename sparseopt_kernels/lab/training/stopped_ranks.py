"""What a rank says when another one has died: torchrun stops it then, or it loses the connection."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

import torch.distributed as dist

from . import distributed
from .errors import TrainingError


@contextmanager
def told_when_stopped(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Say how to go on when torchrun stops this process (SIGTERM), and end it; do nothing without torchrun.

    The process may be waiting for the rank that has died. Python would call a handler only after that, so a
    thread waits for the signal.

    Args:
        how_to_go_on: returns what is printed on standard error.

    Raises:
        TrainingError: the connection to another rank was lost in the block.
    """
    if not distributed.launched():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while (number := os.read(reading, 1)) and number[0] != signal.SIGTERM:
            pass
        if number:
            reason = "stopped by torchrun, which does so when another rank has ended"
            print(f"rank {distributed.rank()}: {reason}. {how_to_go_on()}", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, lambda *_: None)  # else Python writes nothing into the pipe
    former_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"rank {distributed.rank()} has lost another rank ({reason})", exit_code=1
        ) from error
    finally:
        signal.set_wakeup_fd(former_descriptor)
        signal.signal(signal.SIGTERM, former)
        os.close(writing)
        thread.join()
        os.close(reading)
