"""`moray serve`: one command from a checkpoint to a URL, and an orderly end."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Self

from ..configs.deployment import Deployment
from .listening import check_port, open_doors
from .local_server import LocalServer
from .ray_server import RayServer
from .run_state import ProcessId, RunState, ServerRecord, descendants, end_processes, with_processes

logger = logging.getLogger("moray.serve")

_RECORD_EVERY_S = 1.0
"""How often the record of our processes is brought up to date: they come one by one, and restored hosts have new pids."""

_CHECK_EVERY_S = 1.0

_INTERRUPTED = 130
"""Exit status of a start that was interrupted, as shells report it."""


def serve(deployment: Deployment, *, address: str | None, local: bool) -> int:
    """Serve until SIGINT or SIGTERM; the process's exit status.

    Args:
        address: a running Ray cluster to join, `auto` for the one on this machine; None starts one.
        local: everything in this process, without Ray.

    Raises:
        MorayError: it could not be started, or what it runs on has ended; nothing is left running.
    """
    started = time.monotonic()
    state = RunState()
    for line in state.clean_up():
        _say(line)
    if deployment.front.port == 0:
        port = check_port(deployment.front.host, 0)
        deployment = deployment.model_copy(update={"front": deployment.front.model_copy(update={"port": port})})
    own = ProcessId.of(os.getpid())
    assert own is not None, "this process runs"
    server = LocalServer(deployment) if local else RayServer(deployment, address, token=state.token_path(own))
    signals = _Signals()
    with _Recorder(state, server, own, deployment.served_name) as recorder:
        try:
            server.start()
            signals.started()
            recorder.update()
            for door in open_doors(deployment, None if local else address):
                logger.warning("event=open_door reason=%s", door)
            _say(_ready_line(deployment, server.url, time.monotonic() - started))
            while not signals.wait(_CHECK_EVERY_S):
                server.check()
            _say("stopping")
            return 0
        except (KeyboardInterrupt, SystemExit):  # SystemExit: Ray's own handler of SIGTERM, in place while Ray starts
            _say("interrupted; stopping")
            return _INTERRUPTED
        finally:
            signals.ignore()
            recorder.stop()
            ours = {*recorder.record.processes, *descendants(os.getpid())}
            server.stop()
            # Most of these are there only if the start was cut short: what ended in order is not alive any more.
            end_processes(ours | set(descendants(os.getpid())))


class _Signals:
    """SIGINT and SIGTERM: they interrupt the start, end the wait, and change nothing once the server is stopping."""

    def __init__(self) -> None:
        self._starting = True
        # The kernel may give a signal to any of the many threads that Ray has; what waits in the main thread, where
        # Python's handlers run, then sleeps on. What Python writes to this pipe from whatever thread wakes it up.
        self._arrived, note = os.pipe()
        os.set_blocking(note, False)
        signal.set_wakeup_fd(note, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def started(self) -> None:
        """From now on signals end `wait`."""
        self._starting = False

    def wait(self, timeout_s: float) -> bool:
        """Wait for a signal; whether one has arrived."""
        return bool(select.select([self._arrived], [], [], timeout_s)[0])

    def ignore(self) -> None:
        """Go on whatever arrives, until the process ends: an impatient second Ctrl-C must not leave processes behind."""
        self._starting = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._starting:
            self._starting = False
            raise KeyboardInterrupt


class _Recorder:
    """Keeps the record of this server up to date in a thread, and removes it at the end."""

    def __init__(self, state: RunState, server: LocalServer | RayServer, own: ProcessId, model: str) -> None:
        self.record = ServerRecord(own, server.url, model)
        self._state = state
        self._server = server
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moray-recorder", daemon=True)

    def __enter__(self) -> Self:
        self.update()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._state.remove(self.record)

    def update(self) -> None:
        """Write down what is known now."""
        with self._lock:
            record = replace(self.record, url=self._server.url, session=self._server.session)
            record = replace(record, ray_address=self._server.ray_address)
            self.record = with_processes(record)
            self._state.write(self.record)

    def stop(self) -> None:
        """Stop updating; the record stays until the end. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_RECORD_EVERY_S):
            self.update()


def _ready_line(deployment: Deployment, url: str, took_s: float) -> str:
    hosts, cold, routers = deployment.experts.hosts, deployment.experts.cold.hosts, deployment.routers.replicas
    return (
        f"ready: {url}  model {deployment.served_name}, {hosts} expert host{'s' * (hosts > 1)}"
        f"{f' and {cold} cold' if cold else ''}, "
        f"{routers} router{'s' * (routers > 1)}, {took_s:.1f} s  (Ctrl-C stops it)"
    )


def _say(line: str) -> None:
    print(f"moray: {line}", flush=True)
