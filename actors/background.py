"""Work that must leave the cores to others: it runs in a thread of little scheduling weight.

Nothing heavy is imported here: what is run may be the import of everything else.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from ..configs.errors import ClusterError

T = TypeVar("T")

LOWEST = 19
"""Niceness with a 68th of the weight of an ordinary thread's, 0: where both want a core; where nothing else wants it, the
thread has all of it. 10 is a 9th."""


def run_in_background(function: Callable[[], T], *, timeout_s: float, niceness: int = LOWEST) -> T:
    """Run `function` in a thread of little weight, and wait for it: its result, or the exception it raised.

    Linux weighs threads, not processes, and lets anybody lower a weight but not raise it again: hence a thread of its own
    that ends with the function. Threads that `function` starts inherit the weight, and keep it for as long as they live.

    Not for work in a process that serves: a thread of little weight that loses its core while it holds the interpreter's
    lock holds up every other thread until it is given a core again (see `expert_loading.py` for what was measured).

    Args:
        function: what to run; it should be done in `timeout_s` even where the cores are never idle.
        niceness: of its thread, 1 to 19.

    Raises:
        ClusterError: it was not done in time. It cannot be interrupted from outside: it goes on, and nobody waits for it.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        try:
            outcome.set_result(function())
        except BaseException as error:  # whatever it is, it belongs to the caller
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="moray-background", daemon=True)
    thread.start()
    try:
        result = outcome.result(timeout_s)
    except TimeoutError:
        if not outcome.done():
            raise ClusterError(f"{function!r} was not done in the background within {timeout_s:.0f} s") from None
        raise
    finally:
        if outcome.done():
            thread.join()
    return result
