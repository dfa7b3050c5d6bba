"""Room on file systems."""

from __future__ import annotations

import shutil

from .facts import SpaceFacts


def space_of(path: str) -> SpaceFacts | None:
    """Of the file system that `path` is on; None if there is no such path."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return SpaceFacts(path, usage.total, usage.free)
