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

_END = 0  # no signal has this number


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
        number = int(signal.SIGINT)
        while number not in (signal.SIGTERM, _END):
            number = os.read(reading, 1)[0]
        if number == signal.SIGTERM:
            try:
                stopped = "stopped by torchrun (another rank has ended, or torchrun is stopped itself)"
                print(f"rank {distributed.rank()}: {stopped}. {how_to_go_on()}", file=sys.stderr, flush=True)
            finally:
                os._exit(128 + signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, lambda *_: None)  # else Python writes nothing into the pipe
    former_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watched = [True]
    os.register_at_fork(after_in_child=lambda: _forget() if watched else None)
    thread = Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if not is_of_connection(error):
            raise
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"rank {distributed.rank()} has lost another rank ({reason}). {how_to_go_on()}", exit_code=1
        ) from error
    finally:
        watched.clear()
        signal.set_wakeup_fd(former_descriptor)
        signal.signal(signal.SIGTERM, former)
        # Processes that load data may still have the pipe open: its end would not be seen.
        os.write(writing, bytes([_END]))
        thread.join()
        os.close(writing)
        os.close(reading)


def is_of_connection(error: BaseException) -> bool:
    """Tell if an error is that of a process group, not of the computation."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _forget() -> None:
    """Let a forked process be stopped by itself: it has the pipe of the process that it was forked from."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
