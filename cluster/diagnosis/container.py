"""What the control groups of this process, those of a container or of a service, let it have of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_limit(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> float | None:
    """CPUs' worth of time; None without a limit."""
    limits = []
    for folder in _groups("cpu", root, membership):
        found = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(found) == 2 and found[0] > 0:
            limits.append(found[0] / found[1])
    return min(limits, default=None)


def memory_limit(total: int, root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes; None without a limit below `total`."""
    limits = [
        limit
        for folder in _groups("memory", root, membership)
        for name in ("memory.max", "memory.limit_in_bytes")
        for limit in _numbers(folder / name)
    ]
    least = min(limits, default=total)
    return least if least < total else None


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The group of this process and all above it, of either version: each may have a limit, and the least counts.

    In a container the path may be that of the machine, of which only the container's own root is to be seen.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return  # a kernel without control groups
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            base = root if number == "0" else root / controller
            own = base / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(base))


def _numbers(path: Path) -> list[int]:
    """Those of a file; none if it is missing or says `max`."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return [] if "max" in words else [int(word) for word in words]
