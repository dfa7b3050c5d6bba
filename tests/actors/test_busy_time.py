"""Time that a device has computed, with and without events."""

from __future__ import annotations

import time

import pytest
import torch

from moray.actors.busy_time import BusyTime


def test_on_a_cpu_the_clock_counts_also_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    busy = BusyTime(torch.device("cpu"))
    assert busy.seconds == 0.0
    with busy.measured():
        pass
    with pytest.raises(RuntimeError), busy.measured():
        raise RuntimeError
    assert busy.seconds == 2.5


class Event:
    """Stands in for a CUDA event: passes when the test says so."""

    made: list[Event]

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded = False
        self.at: float | None = None
        Event.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        return self.at is not None

    def elapsed_time(self, other: Event) -> float:
        assert self.at is not None
        assert other.at is not None
        return other.at - self.at


def test_on_a_gpu_events_count_once_they_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.made = []
    busy = BusyTime(torch.device("cuda"))
    for _ in range(2):
        with busy.measured():
            pass
    first, second = Event.made[:2], Event.made[2:]
    assert busy.seconds == 0.0
    first[0].at, first[1].at = 100.0, 350.0  # milliseconds
    assert busy.seconds == 0.25
    second[0].at, second[1].at = 400.0, 500.0
    assert busy.seconds == pytest.approx(0.35, abs=1e-12)
    assert busy.seconds == pytest.approx(0.35, abs=1e-12)
