"""What a process knows of its checkpoint without the weights: configuration and headers."""

from __future__ import annotations

import threading
from pathlib import Path

from ..model.checkpoint import Checkpoint
from ..model.config import ModelConfig


class ModelFiles:
    """Opens a checkpoint once. Thread-safe.

    The headers of DeepSeek-R1 are 91,000 tensors in 163 files: a second in which a host that serves would be slower, and a
    host that stands by can have them read before it is needed. A checkpoint does not change while it is served.
    """

    def __init__(self) -> None:
        self._opened: tuple[Path, ModelConfig, Checkpoint] | None = None
        self._unreported = 0
        self._lock = threading.Lock()  # guards the two above

    def open(self, path: Path) -> tuple[ModelConfig, Checkpoint]:
        """The checkpoint in `path`; the headers of another one are read.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        with self._lock:
            if self._opened is None or self._opened[0] != path:
                config, checkpoint = ModelConfig.load(path), Checkpoint.open(path)
                self._opened = path, config, checkpoint
                self._unreported += checkpoint.header_bytes
            return self._opened[1:]

    def header_bytes(self) -> int:
        """Bytes of headers read since this was asked last."""
        with self._lock:
            unreported, self._unreported = self._unreported, 0
            return unreported
