"""Measures the cases of an experiment in several processes, one after another in each.

The rows of a case are kept (``results.py``) as soon as it is finished, so that a stopped experiment can be
continued.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing import active_children, get_context, parent_process

import torch

from ...user_warning import show_as_notes
from ..threads import pytorch_threads
from ..training.concentration import concentration_ignored
from ..training.errors import TrainingError
from ..training.stopped_ranks import is_of_connection
from .experiment import Case, Experiment, Row, Settings
from .results import Results


def measure_all(
    results: Results, settings: Settings, workers: int, on_case: Callable[[Case], object] = lambda case: None
) -> None:
    """Measure the missing cases. Finished cases are kept if an error occurs.

    Args:
        results: the results of the experiment, to which rows are added.
        settings: for the cases.
        workers: the number of processes; with 1, this process measures.
        on_case: called after each case.

    Raises:
        TrainingError: a case failed, or its process was killed.
        KeyboardInterrupt: unfinished cases are dropped, and their processes ended.
    """
    while cases := results.missing():
        with closing(_measured(results.experiment, cases, settings, workers)) as measured:
            for case, rows in measured:
                results.add(case, rows)
                on_case(case)


def _measured(
    experiment: Experiment, cases: Sequence[Case], settings: Settings, workers: int
) -> Generator[tuple[Case, list[Row]], None, None]:
    if workers == 1:
        with pytorch_threads(1):
            for case in cases:
                yield case, _measure(experiment, case, settings)
        return
    # Not forked, because a process that has used threads cannot be forked safely.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    others = set(active_children())
    try:
        with _interrupts_ignored():  # the processes that are started here inherit this, for good
            futures = {pool.submit(_measure, experiment, case, settings): case for case in cases}
        yield from _collected(futures)
    except BaseException:
        # After an interrupt or on a full disk, no more rows can be kept: do not wait for them.
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collected(futures: dict[Future[list[Row]], Case]) -> Iterator[tuple[Case, list[Row]]]:
    """Yield finished cases. After a failure no case is started, but running ones are waited for."""
    waiting = dict(futures)
    failure: BaseException | None = None
    for future in as_completed(futures):
        failure = future.exception()
        if failure is not None:
            break
        yield waiting.pop(future), future.result()
    if failure is None:
        return
    running = [future for future in waiting if not future.cancel()]
    for future in as_completed(running):
        if future.exception() is None:
            yield waiting[future], future.result()
    if isinstance(failure, BrokenProcessPool):
        raise TrainingError(
            "a process was ended from outside, for want of memory perhaps: try fewer --workers", exit_code=1
        ) from failure
    raise failure


def _measure(experiment: Experiment, case: Case, settings: Settings) -> list[Row]:
    """Measure a case. An error names the case, and has the traceback unless it was a ``TrainingError``."""
    try:
        with concentration_ignored():
            return experiment.measure(case, settings)
    except Exception as error:
        if is_of_connection(error):  # of the ranks that share the case: told_when_stopped says how to go on
            raise
        shown = ", ".join(f"{column} {value}" for column, value in case.items())
        reason = str(error) if isinstance(error, TrainingError) else traceback.format_exc().rstrip()
        raise TrainingError(f"{experiment.name} failed at {shown}: {reason}", exit_code=1) from error


def _start_worker() -> None:
    show_as_notes()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker with its parent: if the parent is killed, the worker would wait for cases for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C, which goes to the whole process group, in workers started here: the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread has handlers
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
