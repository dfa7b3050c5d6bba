"""Whether the cluster can answer: asked with a deadline, and never reported better than it is."""

from __future__ import annotations

import asyncio
import logging

from ..engine_client import EngineClient
from ..messages import ClusterStatus

logger = logging.getLogger(__name__)


async def ask_status(client: EngineClient, *, timeout_s: float) -> ClusterStatus | None:
    """The cluster's state, or None if it did not say within `timeout_s`; the log says why."""
    try:
        async with asyncio.timeout(timeout_s):
            return await client.status()
    except TimeoutError:
        logger.warning("the cluster did not report its state within %g s", timeout_s)
    except Exception:
        # `status` promises not to raise; a health check must still answer when it breaks that promise.
        logger.exception("asking for the cluster's state failed")
    return None


def is_healthy(status: ClusterStatus | None) -> bool:
    """Whether every expert is reachable. A router that sees it otherwise is believed over the cluster's own word."""
    return (
        status is not None
        and status.health in ("ok", "degraded")
        and not any(router.unreachable_experts for router in status.routers)
    )


def describe(status: ClusterStatus | None) -> dict[str, str]:
    """The body of /health: the state in one word, and the reason."""
    if status is None:
        return {"health": "unavailable", "reason": "the cluster does not report its state; see the server's log"}
    unreachable = max((router.unreachable_experts for router in status.routers), default=0)
    if status.health in ("ok", "degraded") and unreachable:
        return {"health": "unavailable", "reason": f"{unreachable} experts cannot be reached"}
    return {"health": status.health, "reason": status.reason}
