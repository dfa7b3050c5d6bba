"""What this machine's `moray serve` processes have running, written down so that nothing outlives them unnoticed.

One small file a server, readable by its owner only: the server's pid, its URL, and the processes of the Ray session it
started; beside it another with that session's token (see `private_ray`). A server that ends in order removes both. One that was
killed leaves them, and the next start reads the first, ends what is left and says so. Processes are known by pid and start
time, so that a pid that was used again is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process for good: its pid, and when it started in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process with this pid now; None if there is none, or only its remains."""
        stat = _stat(pid)
        return None if stat is None or stat[0] == "Z" else cls(pid, stat[2])

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return ProcessId.of(self.pid) == self


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One `moray serve`.

    Attributes:
        server: its process.
        url: where it listens.
        model: what it serves.
        session: directory of the Ray session it started; empty if it joined one or runs without.
        processes: of that session.
        ray_address: where Ray can be reached; empty if it runs without.
    """

    server: ProcessId
    url: str
    model: str
    session: str = ""
    processes: tuple[ProcessId, ...] = field(default=())
    ray_address: str = ""


class RunState:
    """The records of one user on this machine."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()

    def write(self, record: ServerRecord) -> None:
        """Write or replace a server's record."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(record)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
        temporary.chmod(0o600)
        temporary.replace(path)

    def remove(self, record: ServerRecord) -> None:
        """Forget a server."""
        self._path(record).unlink(missing_ok=True)
        self.token_path(record.server).unlink(missing_ok=True)

    def token_path(self, server: ProcessId) -> Path:
        """Where the token of a server's Ray is, if it has one."""
        return self.folder / f"{server.pid}-{server.started}.ray-token"

    def records(self) -> list[ServerRecord]:
        """All records, newest server first. Files that are none are removed: they can only be half-written."""
        records = []
        for path in self.folder.glob("*.json") if self.folder.is_dir() else ():
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
                records.append(
                    ServerRecord(
                        server=ProcessId(**raw["server"]),
                        url=raw["url"],
                        model=raw["model"],
                        session=raw["session"],
                        ray_address=raw["ray_address"],
                        processes=tuple(ProcessId(**p) for p in raw["processes"]),
                    )
                )
            except (ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)
        return sorted(records, key=lambda record: -record.server.started)

    def clean_up(self) -> list[str]:
        """End what killed servers have left behind; one line for each of them."""
        lines = []
        for record in self.records():
            if record.server.alive:
                continue
            ended = end_processes(record.processes)
            removed = bool(record.session) and Path(record.session).is_dir()
            if removed:
                shutil.rmtree(record.session, ignore_errors=True)
            self.remove(record)
            lines.append(
                f"cleaned up after the server with pid {record.server.pid}, which was killed: ended {ended} "
                f"process{'' if ended == 1 else 'es'}{' and removed its Ray session' if removed else ''}"
            )
        return lines

    def _path(self, record: ServerRecord) -> Path:
        return self.folder / f"{record.server.pid}-{record.server.started}.json"


def end_processes(processes: Iterable[ProcessId], *, grace_s: float = 5.0) -> int:
    """Ask processes to end, and kill those that have not after `grace_s`; how many there were."""
    alive = [process for process in processes if process.alive]
    count = len(alive)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for process in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, sent)
        deadline = time.monotonic() + grace_s
        while alive and time.monotonic() < deadline:
            alive = [process for process in alive if process.alive]
            time.sleep(0.02 if alive else 0)
    return count


def descendants(pid: int) -> list[ProcessId]:
    """Every process below `pid` now, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            children.setdefault(stat[1], []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(0), ()):
            queue.append(child)
            if (process := ProcessId.of(child)) is not None:
                found.append(process)
    return found


def with_processes(record: ServerRecord) -> ServerRecord:
    """The record with the processes that run below its server now added."""
    known = {process for process in record.processes if process.alive}
    return replace(record, processes=tuple(known | set(descendants(record.server.pid))))


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent's pid and start time from /proc; None if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the name in parentheses and may hold anything; the rest has no parentheses.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def _default_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "moray" if runtime else Path.home() / ".cache" / "moray" / "run"
