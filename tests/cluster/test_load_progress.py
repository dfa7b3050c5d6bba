"""How far a starting cluster is with reading its weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moray.cluster.load_progress import LoadingShown
from moray.model.progress import Advance


class Shown:
    """A `Progress` that keeps what it was told."""

    def __init__(self) -> None:
        self.total = 0
        self.advances: list[int] = []
        self.reached = threading.Event()

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:
        self.total = total_bytes

        def advance(count: int) -> None:
            self.advances.append(count)
            if sum(self.advances) == total_bytes:
                self.reached.set()

        yield advance


def test_shows_every_step_to_the_end() -> None:
    answers = iter([None, (10, 100), None, (60, 100), (100, 100)])
    shown = Shown()
    with LoadingShown(lambda: next(answers), shown):
        assert shown.reached.wait(20.0)
    assert (shown.total, shown.advances) == (100, [10, 50, 40])


def test_ends_with_the_start_whatever_the_cluster_says() -> None:
    shown = Shown()
    with LoadingShown(lambda: None, shown):
        pass
    with LoadingShown(lambda: (1, 100), shown):
        pass
    assert shown.advances in ([], [1])


def test_a_model_that_is_read_already_shows_nothing() -> None:
    shown = Shown()
    with LoadingShown(lambda: (100, 100), shown):
        pass
    assert shown.total == 0
