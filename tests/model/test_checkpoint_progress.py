"""Progress of long reads, on a terminal and in a log."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from moray.model.progress import HeartbeatProgress, NoProgress, TerminalProgress, default_progress


class _Lines(logging.Handler):
    """Collects messages and tells when there are some."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.arrived = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.arrived.set()


@pytest.fixture
def lines() -> Iterator[_Lines]:
    handler = _Lines()
    logger = logging.getLogger("moray.model.progress")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_heartbeat_says_what_and_how_far(lines: _Lines) -> None:
    with HeartbeatProgress(interval_s=0.01).task("host 3: experts", 4_000_000_000) as advance:
        advance(1_000_000_000)
        lines.arrived.clear()
        assert lines.arrived.wait(10)
    assert "host 3: experts: 1.00 of 4.00 GB read" in lines.lines[-1]


def test_heartbeat_beats_while_nothing_moves(lines: _Lines) -> None:
    with HeartbeatProgress(interval_s=0.01).task("stuck", 1) as _:
        assert lines.arrived.wait(10)
        lines.arrived.clear()
        assert lines.arrived.wait(10)
    assert "0.00 of 0.00 GB" in lines.lines[0]


def test_heartbeat_ends_with_its_task(lines: _Lines) -> None:
    with pytest.raises(RuntimeError, match="reading failed"), HeartbeatProgress(interval_s=3600).task("x", 1):
        raise RuntimeError("reading failed")
    assert not [thread for thread in threading.enumerate() if thread.name == "moray-heartbeat"]
    assert not lines.lines


def test_bar_is_drawn_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress().task("dense weights", 2_000_000) as advance:
        advance(1_000_000)
        advance(1_000_000)
    captured = capsys.readouterr()
    assert "dense weights" in captured.err
    assert "2.0/2.0 MB" in captured.err
    assert captured.out == ""


def test_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with NoProgress().task("x", 1) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("terminal", "kind"), [(True, TerminalProgress), (False, HeartbeatProgress)])
def test_a_bar_needs_a_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool, kind: type) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert isinstance(default_progress(), kind)
