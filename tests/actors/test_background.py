"""Work in a thread of little weight: its result, its errors, its end, and that nothing else gets slower."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest
import torch

from moray.actors.background import LOWEST, run_in_background
from moray.configs.errors import CheckpointError, ClusterError


def niceness(native_id: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, native_id)


def of_all_threads() -> dict[int, int]:
    found = {}
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # one that ends just now
            found[int(name)] = niceness(int(name))
    return found


@pytest.mark.parametrize("wanted", [LOWEST, 10])
def test_the_thread_has_little_weight_and_the_callers_keeps_its_own(wanted: int) -> None:
    before = of_all_threads()
    seen = run_in_background(lambda: niceness(threading.get_native_id()), timeout_s=20, niceness=wanted)
    assert seen == wanted
    assert all(before.get(thread, wanted) == weight for thread, weight in of_all_threads().items())
    assert niceness(threading.get_native_id()) == 0


def test_threads_that_it_starts_inherit_the_weight() -> None:
    seen: list[int] = []

    def start_another() -> None:
        thread = threading.Thread(target=lambda: seen.append(niceness(threading.get_native_id())))
        thread.start()
        thread.join(20)

    run_in_background(start_another, timeout_s=20)
    assert seen == [LOWEST]


def test_torch_keeps_no_thread_of_little_weight() -> None:
    """What torch computes with several threads there must not leave them to those who come after."""
    large = torch.ones(1 << 20)
    assert run_in_background(lambda: float((large + large).sum()), timeout_s=20) == 2 << 20
    deadline = time.monotonic() + 10  # the threads of a team end a moment after the one they worked for
    while LOWEST in of_all_threads().values() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert LOWEST not in of_all_threads().values()


@pytest.mark.parametrize(
    "error", [CheckpointError("damaged"), TimeoutError("of the function's own"), KeyboardInterrupt()]
)
def test_errors_are_the_callers(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        run_in_background(fail, timeout_s=20)
    assert raised.value is error


def test_what_takes_too_long_is_left_behind() -> None:
    go = threading.Event()
    before = set(threading.enumerate())
    with pytest.raises(ClusterError, match=r"not done in the background within 0 s"):
        run_in_background(lambda: go.wait(20), timeout_s=0.01)
    (left,) = set(threading.enumerate()) - before
    assert left.daemon
    go.set()
    left.join(20)
    assert not left.is_alive()
