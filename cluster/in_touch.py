"""Lets processes hear from their controller while they load, so that their leases do not end before it looks after them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from ..configs.errors import MorayError

logger = logging.getLogger("moray.controller")


class Asked(Protocol):
    """A process that renews its lease when it is asked how much it has loaded."""

    actor_name: str

    def bytes_loaded(self) -> int:
        """Bytes."""
        ...


class InTouch:
    """While it is entered, asks every process how far it is, now and then.

    Args:
        processes: those there are by now.
        every_s: well below their lease.
    """

    def __init__(self, processes: Callable[[], Sequence[Asked]], every_s: float) -> None:
        self._processes = processes
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moray-in-touch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            if processes := self._processes():
                # All at once: some may not have come up, and the leases of the others must not wait for them.
                with ThreadPoolExecutor(len(processes), thread_name_prefix="moray-in-touch") as pool:
                    list(pool.map(_ask, processes))


def _ask(process: Asked) -> None:
    try:
        process.bytes_loaded()
    except MorayError as error:  # whoever waits for it is told
        logger.info("event=no_answer process=%s reason=%s", process.actor_name, error)
