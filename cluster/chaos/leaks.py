"""What a cluster holds while it is idle, and what it holds more of than before."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..run_state import ProcessId, descendants
from .target import Target, View

DESCRIPTORS_ALLOWED: Final = 16
"""More open files than before that count as none leaked, for one process. After three minutes of all kinds of faults hosts and
routers, old and restored, had the very numbers they had at first; Ray's own connections, to whoever has asked a process
something so far, come and go by a few. What is leaked is leaked at each event, and half an hour has more events than this."""

ARENAS_PER_LINK: Final = 3
"""Shared memory of one shm link: its control page, and an arena for each direction."""

REMAINS_PER_LINK: Final = 2
"""Pieces that one end alone still maps: of links that were lost, until the interpreter collects its garbage, which an idle
process has no occasion to. Far fewer than the links that are lost in half an hour."""

RESIDENT_ALLOWED: Final = 96 << 20
RESIDENT_SHARE_ALLOWED: Final = 0.15
"""Growth of a process that counts as none: a pool of the allocator for each of a handful of threads, caches that fill up."""

_TITLE: Final = re.compile(r"ray::([A-Za-z_]+(?::[A-Za-z0-9_-]+)*)")
_SHARED: Final = re.compile(r"/memfd:moray-")


@dataclass(frozen=True, slots=True)
class Use:
    """What one process holds.

    Attributes:
        role: processes are compared with those of their role.
        descriptors: open files, of which `sockets` are sockets.
        arenas: inodes of the links' shared memory that it has mapped.
        resident: bytes of memory of its own.
    """

    name: str
    role: str
    pid: int
    descriptors: int
    sockets: int
    arenas: frozenset[int]
    resident: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An idle cluster.

    Attributes:
        counts: its processes by role, as the status lists them.
        routers: the routers' own counters.
        actors: by title, the processes of Ray's that run code of ours or serve it; idle ones are Ray's to keep.
        uses: of the processes of this machine.
        names: entries of /dev/shm that no process outside of the cluster has mapped.
    """

    counts: Mapping[str, int]
    routers: Sequence[Mapping[str, Any]]
    actors: Mapping[str, int] = field(default_factory=dict)
    uses: tuple[Use, ...] = ()
    names: frozenset[str] = frozenset()


def snapshot(target: Target, view: View) -> Snapshot:
    """What the cluster holds now. Of its processes those on this machine are looked at."""
    ours: dict[int, tuple[str, str]] = {p.pid: (p.id, p.role) for p in view.processes if target.is_here(p)}
    actors: Counter[str] = Counter()
    tree: set[int] = set(ours)
    if target.server is not None:
        ours[target.server.pid] = "moray serve", "moray serve"
        for process in (target.server, *descendants(target.server.pid)):
            tree.add(process.pid)
            title = _title(process.pid)
            if title is not None:
                actors[title] += 1
                ours.setdefault(process.pid, (title, title))
    uses = [_use(pid, name, role) for pid, (name, role) in ours.items()]
    return Snapshot(
        counts=view.counts(),
        routers=view.routers,
        actors=actors,
        uses=tuple(use for use in uses if use is not None),
        names=_shared_names(tree),
    )


def page_leaks(routers: Iterable[Mapping[str, Any]]) -> list[str]:
    """KV pages and requests that idle routers still hold."""
    found = []
    for stats in routers:
        name, free, cached, total = (stats[key] for key in ("router_id", "pages_free", "pages_cached", "pages_total"))
        if stats["pages_in_use"] or free + cached != total:
            found.append(
                f"{name}: {free} KV pages free + {cached} cached of {total}, {stats['pages_in_use']} in use at idle"
            )
        if stats["running"] or stats["waiting"]:
            found.append(f"{name}: {stats['running']} requests running and {stats['waiting']} waiting at idle")
    return found


def leaks(before: Snapshot, after: Snapshot, strays: Sequence[str] = ()) -> list[str]:
    """What `after` holds and should not, a line for each.

    Args:
        strays: processes of the cluster that are none of its any more, and live.
    """
    found = page_leaks(after.routers)
    found += [f"process {stray} is left over" for stray in strays]
    for what, old, new in (("processes", before.counts, after.counts), ("Ray processes", before.actors, after.actors)):
        for role in sorted(set(old) | set(new)):
            if old.get(role, 0) != new.get(role, 0):
                found.append(f"{new.get(role, 0)} {what} of {role}, {old.get(role, 0)} before")
    found += _use_leaks(before.uses, after.uses)
    links = after.counts.get("expert_host", 0) * after.counts.get("router", 0)
    holders = Counter(arena for use in after.uses for arena in use.arenas)
    shared = sum(count > 1 for count in holders.values())
    for count, most, what in (
        (shared, ARENAS_PER_LINK * links, "shared by two processes"),
        (len(holders) - shared, REMAINS_PER_LINK * links, "of lost links"),
    ):
        if count > most:
            found.append(f"{count} pieces of shared memory {what}, {most} at most for {links} links")
    if more := sorted(after.names - before.names):
        found.append(f"{len(more)} new entries in /dev/shm: {', '.join(more[:5])}")
    return found


def _use_leaks(before: Sequence[Use], after: Sequence[Use]) -> list[str]:
    """A process is compared with itself where it lived through all of it, else with the largest of its role before."""
    found = []
    for use in after:
        same = [old for old in before if (old.pid, old.name) == (use.pid, use.name)]
        known = same or [old for old in before if old.role == use.role]
        if not known:
            continue  # the count of its role says so
        descriptors = max(old.descriptors for old in known)
        if use.descriptors > descriptors + DESCRIPTORS_ALLOWED:
            sockets = max(old.sockets for old in known)
            found.append(
                f"{use.name} (pid {use.pid}): {use.descriptors} open files, {use.sockets} of them sockets; {descriptors} and "
                f"{sockets} before"
            )
        resident = max(old.resident for old in known)
        if use.resident > resident * (1 + RESIDENT_SHARE_ALLOWED) + RESIDENT_ALLOWED:
            found.append(f"{use.name} (pid {use.pid}): {use.resident >> 20} MiB of memory, {resident >> 20} before")
    return found


def left_over(seen: Iterable[ProcessId], current: Iterable[int]) -> list[str]:
    """Of the processes the cluster has had, those that live or have not been reaped, and are none of its any more."""
    now = set(current)
    found = []
    for process in seen:
        if process.pid in now:
            continue
        state = _state(process)
        if state:
            found.append(f"{process.pid} ({_title(process.pid) or 'no title'}, state {state})")
    return found


def _state(process: ProcessId) -> str:
    """The process's state in one letter, `Z` for remains that nobody has reaped; empty if it is gone."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return fields[0] if int(fields[19]) == process.started else ""


def _title(pid: int) -> str | None:
    """What a Ray process runs, e.g. `ServeReplica:moray:front`; None for idle ones and other processes."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    match = _TITLE.match(line)
    return None if match is None or match[1].startswith("IDLE") else match[1]


def _use(pid: int, name: str, role: str) -> Use | None:
    folder = Path(f"/proc/{pid}")
    try:
        targets = _targets(folder / "fd")
        arenas = {int(line.split()[4]) for line in (folder / "maps").read_text().splitlines() if _SHARED.search(line)}
        resident, shared = (int(field) for field in (folder / "statm").read_text().split()[1:3])
    except OSError:
        return None  # it has ended meanwhile
    return Use(
        name=name,
        role=role,
        pid=pid,
        descriptors=len(targets),
        sockets=sum(target.startswith("socket:") for target in targets),
        arenas=frozenset(arenas),
        resident=(resident - shared) * os.sysconf("SC_PAGE_SIZE"),
    )


def _targets(folder: Path) -> list[str]:
    """What the open files in /proc/PID/fd are; those that are closed meanwhile are none."""
    found = []
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return found


def _shared_names(tree: set[int]) -> frozenset[str]:
    folder = Path("/dev/shm")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        return frozenset()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in tree:
            continue
        try:
            maps = (entry / "maps").read_text()
        except OSError:
            continue  # gone, or another user's: what it has mapped in /dev/shm is its own
        names -= {line.rsplit("/dev/shm/", 1)[1].split()[0] for line in maps.splitlines() if "/dev/shm/" in line}
    return frozenset(names)
