"""What the front needs of the rest of the cluster, as one small interface.

Two implementations stand behind it: in one process for local mode, and over sockets to routers for a cluster. The front's
tests use a third, scripted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator

from .messages import ClusterStatus, GenerateRequest, TokenOutput


class EngineClient(ABC):
    """An asynchronous handle on the engine. All methods are called on one event loop."""

    @abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """Run one request. The last output has a `finish_reason`. Closing the iterator early cancels the request, which
        frees its pages.

        Raises (from the first step of the iteration):
            QueueFullError: too many requests are waiting.
            ContextTooLongError: prompt and max_tokens do not fit.
            ExpertsUnavailableError, RouterLostError: the cluster cannot answer now.
        """

    @property
    def resubmitted(self) -> int:
        """How often a request went on at another router because its own was lost; only ever grows."""
        return 0

    @abstractmethod
    async def status(self) -> ClusterStatus:
        """The cluster's state now; bounded by a deadline of its own, never raises for a sick cluster."""

    async def aclose(self) -> None:  # noqa: B027  (most clients hold nothing)
        """Release what the client holds; outstanding requests end as cancelled."""
