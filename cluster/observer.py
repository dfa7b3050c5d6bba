"""What the reports of routers and hosts add up to: what is to be told of it, and what the autoscaler makes of it."""

from __future__ import annotations

import logging
import threading
import time

from ..actors.reports import HostReport, RouterReport
from ..configs.errors import MorayError
from .autoscaler import Autoscaler, Decision, Observation
from .change_planner import ChangePlanner
from .changes import Wanted
from .load_monitor import LoadMonitor, UtilisationMonitor, balance
from .mixed_cpus import mixtures
from .registry import Registry, by_kind
from .transition import Transition

logger = logging.getLogger("moray.controller")

_BALANCE_EVERY_S = 5.0
"""Between looks at the balance: for a model of R1's size one takes tens of milliseconds."""


class Observer:
    """Keeps the measured load, and has done what the autoscaler decides. Called by the supervisor's heartbeat alone.

    Args:
        monitor: shared with the planner of changes.
    """

    def __init__(
        self, registry: Registry, transition: Transition, planner: ChangePlanner, monitor: LoadMonitor
    ) -> None:
        self._registry = registry
        self._transition = transition
        self._planner = planner
        self._monitor = monitor
        self._utilisation = UtilisationMonitor()
        self._autoscaler = Autoscaler(registry.deployment.autoscale)
        self._known: set[str] = set()
        self._balance_at = 0.0
        self._instructions: set[str] = set()
        self._acting: threading.Thread | None = None

    def heard_router(self, name: str, report: RouterReport) -> None:
        """A router has reported."""
        self._monitor.observe(name, report.expert_tokens, time.monotonic())

    def heard_host(self, name: str, report: HostReport) -> None:
        """An expert host has reported."""
        self._utilisation.observe(name, report.busy_s, time.monotonic())

    def tick(self) -> None:
        """Look at all of it, after every round of reports."""
        registry, now = self._registry, time.monotonic()
        self._forget_the_gone()
        self._tell_mixed_cpus()
        if now >= self._balance_at:
            self._balance_at = now + _BALANCE_EVERY_S
            load = self._planner.load()
            registry.balance = 1.0 if load is None else balance(load, registry.table)
        policy = registry.deployment.autoscale
        if not (policy.experts.enabled or policy.routers.enabled):
            return
        decision = self._autoscaler.decide(self._seen(), now, balance_after=self._balance_after)
        if decision is not None:
            self._acting = threading.Thread(target=self._act, args=(decision,), name="moray-autoscaler", daemon=True)
            self._acting.start()

    def _forget_the_gone(self) -> None:
        there = {member.name for member in self._registry.members()}
        for name in self._known - there:
            self._monitor.forget(name)
            self._utilisation.forget(name)
        self._known = there

    def _tell_mixed_cpus(self) -> None:
        """Say that processes compute with different instructions: once, until these are others."""
        registry = self._registry
        with registry.lock:
            members = registry.members()
            used = {member.name: member.report.instructions for member in members if member.report is not None}
            epoch = registry.table.epoch
        found = set(used.values())
        if len(used) < len(members) or found == self._instructions:
            return  # one that was restored may compute as the one before
        self._instructions = found
        for told in mixtures(used):
            registry.happened("mixed_cpus", f"epoch-{epoch}", detail=told, bad=True)

    def _seen(self) -> Observation:
        registry, deployment = self._registry, self._registry.deployment
        with registry.lock:
            (hosts, cold), table = by_kind(registry.table.slots), registry.table
            reports = [router.report for router in registry.routers.values() if router.report is not None]
            whole = all(m.state == "ready" for m in registry.members())
        pages = sum(report.stats.pages_total for report in reports)
        limit = len(reports) * deployment.routers.max_running
        return Observation(
            epoch=table.epoch,
            hosts=len(hosts),
            routers=len(registry.routers),
            utilisation=self._utilisation.mean(hosts),
            balance=registry.balance,
            tokens_per_expert=self._monitor.tokens / max(1, table.experts * table.layers),
            waiting=sum(report.stats.waiting for report in reports),
            running=sum(report.stats.running for report in reports),
            running_limit=limit,
            kv_use=sum(report.stats.pages_in_use for report in reports) / pages if pages else 0.0,
            fewest_hosts=max(1, deployment.experts.min_replicas - len(cold)),
            changing=not whole or self._transition.busy or (self._acting is not None and self._acting.is_alive()),
        )

    def _balance_after(self) -> float:
        try:
            change, _ = self._planner.plan(Wanted(rebalance=True))
        except MorayError as error:
            logger.info("event=no_plan reason=%s", error)
            return 0.0
        return change.balance_after

    def _act(self, decision: Decision) -> None:
        registry, begun = self._registry, time.monotonic()
        registry.happened("autoscale", f"epoch-{registry.table.epoch}", detail=decision.reason)
        try:
            self._transition.change(decision.wanted)
        except MorayError as error:
            seconds = time.monotonic() - begun
            registry.happened(
                "autoscale_failed", f"epoch-{registry.table.epoch}", seconds=seconds, detail=str(error), bad=True
            )
