"""Whether the cluster can answer: asked with a deadline, and never reported better than it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from ..engine_client import EngineClient
from ..messages import ClusterStatus, Health

logger = logging.getLogger(__name__)

_WORSE: tuple[Health, ...] = ("ok", "degraded", "starting", "unavailable")
"""From the best to the worst. With the first two requests are answered."""


async def ask_status(client: EngineClient, *, timeout_s: float) -> ClusterStatus | None:
    """The cluster's state as `judged`, or None if it did not say within `timeout_s`; the log says why."""
    try:
        async with asyncio.timeout(timeout_s):
            return judged(await client.status())
    except TimeoutError:
        logger.warning("the cluster did not report its state within %g s", timeout_s)
    except Exception:
        # `status` promises not to raise; a health check must still answer when it breaks that promise.
        logger.exception("asking for the cluster's state failed")
    return None


def judged(status: ClusterStatus, problems: Sequence[str] = ()) -> ClusterStatus:
    """The same state with the health that it allows at best, and every reason for that. Idempotent.

    Unavailable is a cluster of which some expert cannot be reached: a router that sees it so is believed over the
    cluster's own word. Degraded is one that answers, but with less than it is meant to have.

    Args:
        problems: what else makes it degraded, in words.
    """
    unreachable = any(router.unreachable_experts for router in status.routers)
    found = [*problems, *shortcomings(status)]
    at_best: Health = "unavailable" if unreachable else "degraded" if found else "ok"
    reasons = [*([status.reason] if status.reason else []), *(text for text in found if text not in status.reason)]
    return replace(status, health=max(status.health, at_best, key=_WORSE.index), reason="; ".join(reasons))


def shortcomings(status: ClusterStatus) -> list[str]:
    """What the numbers of a state say is wrong with it, the worst first."""
    found = [
        f"{router.router_id}: {router.unreachable_experts} (layer, expert) pairs unreachable: "
        + ("; ".join(router.broken_links) or "no link is broken")
        for router in status.routers
        if router.unreachable_experts
    ]
    found += [
        f"{router.router_id}: {why}"
        for router in status.routers
        if not router.unreachable_experts
        for why in router.broken_links
    ]
    if status.missing_replicas:
        found.append(
            f"{status.missing_replicas} (layer, expert) pairs have fewer than {status.min_replicas} live replicas"
        )
    found += [f"{process.id} is stuck" for process in status.processes if process.state == "stuck"]
    for host in late_hosts(status):
        routers = ", ".join(router.router_id for router in status.routers if host in router.late_hosts)
        found.append(f"{host} is late in answering {routers}")
    return found


def late_hosts(status: ClusterStatus) -> list[str]:
    """Hosts that owe some router an answer for longer than is usual for them."""
    return sorted({host for router in status.routers for host in router.late_hosts})


def is_healthy(status: ClusterStatus | None) -> bool:
    """Whether requests are answered: every expert is reachable, of a state as `ask_status` gives it."""
    return status is not None and status.health in ("ok", "degraded")


def describe(status: ClusterStatus | None) -> dict[str, str]:
    """The body of /health: the state in one word, and the reason."""
    if status is None:
        return {"health": "unavailable", "reason": "the cluster does not report its state; see the server's log"}
    return {"health": status.health, "reason": status.reason}
