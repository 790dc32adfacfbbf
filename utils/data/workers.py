"""Worker processes that end with their parent, whether it is interrupted, killed or done."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from utils.errors import RunError


def map_tasks(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """Yield `function(task)` for every task, in order, from `workers` processes; in this one if there is only one worker.

    Only a few tasks are under way at a time, so that reading ahead does not fill the memory.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        under_way = deque()
        for task in tasks:
            with _interrupt_held_back():
                under_way.append(pool.submit(function, task))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed, most likely for want of memory; try again with --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    """In a new worker: leave Ctrl-C to the parent, and end when the parent has ended, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def _interrupt_held_back():
    """Hold Ctrl-C back for the block. A process started in it inherits that, so none of them dies with a traceback."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: a worker ignores Ctrl-C only once it has started
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
