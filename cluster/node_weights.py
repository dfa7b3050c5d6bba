"""The model on the node that a process runs on: found there, or fetched there when it is first needed.

Nothing heavy is imported at the top: see `workers.py`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from ..configs.model_url import ModelUrl

Fetching = tuple[str, int, int]
"""Who fetches a model on a node, and bytes done and in all: `FetchState` as plain data."""


class NodeWeights:
    """A deployment's model on this node.

    Args:
        model: a directory, `tiny-r1`, or the pinned URL of a model.
        weights_dir: where fetched models lie; None for the default.
    """

    def __init__(self, model: str, weights_dir: str | None) -> None:
        self._model = model
        self._weights_dir = weights_dir
        self._lock = threading.Lock()
        self._waiting = 0

    def path(self) -> Path:
        """The directory, complete; fetches what is missing, or waits for whoever on this node does.

        Raises:
            ConfigError, FetchError: it is not on this node, or cannot be had.
        """
        from .assembly import checkpoint_path

        with self._counted():
            return checkpoint_path(self._model, weights_dir=self._weights_dir)

    def path_if_here(self) -> Path | None:
        """The directory if it is complete; None where it must be fetched.

        Raises:
            ConfigError: a directory is not on this node.
        """
        from .assembly import checkpoint_path, fetched_directory

        found = fetched_directory(self._model, self._weights_dir)
        if found is None:
            return checkpoint_path(self._model)
        url = str(ModelUrl.parse(self._model))
        return found.path if found.missing(found.manifest(), url, "all") == [] else None

    def fetching(self) -> Fetching | None:
        """How far the fetch is that a call of `path` waits for; None where none does."""
        if not self._waiting:
            return None
        from .assembly import fetched_directory

        found = fetched_directory(self._model, self._weights_dir)
        state = None if found is None else found.state()
        return None if state is None else (state.holder, state.done, state.total)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
