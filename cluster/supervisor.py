"""Looks after the processes: notices those that die or no longer answer, restores them, and listens to what they report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..actors.reports import HostReport, RouterReport
from ..configs.errors import ClusterError, ConfigError, MorayError
from .handles import ATTACH_TIMEOUT_S, ExpertHostHandle, RouterHandle
from .launching import Launcher, side_by_side
from .registry import Host, Member, Registry, Router, by_kind
from .spawning import NoRoomError, Spawner
from .transition import Transition

logger = logging.getLogger("moray.controller")

_POLL_S = 0.5
"""How long the watch for deaths lasts before it looks whom to watch; a death ends it at once."""

_FAILURE_WINDOW_S = 60.0
_PAUSES_S = (0.5, 30.0)
"""Before the third attempt within the window to restore a process, and longest: each pause is twice the one before."""

_RELINK_PAUSE_S = 2.0
"""Between attempts to have a router link to a host that serves; the router itself tries more often, at the addresses it has."""

_GROW_BACK_S = 15.0
"""Between attempts to have as many expert hosts as were asked for, where some could not be restored."""

_STANDBY_PAUSE_S = 2.0
"""Between looks for missing warm processes: one that dies as it starts must not keep the machine busy."""

_JOIN_S = 30.0


class Supervisor:
    """Threads that look after every process of the registry until `stop`.

    Args:
        heard_router, heard_host: told of every report, with the process's name.
        tick: called after every round of reports.
        superseded: asked after this process stood still, whether another controller has taken over meanwhile.
    """

    def __init__(
        self,
        registry: Registry,
        spawner: Spawner,
        launcher: Launcher,
        transition: Transition,
        *,
        heard_router: Callable[[str, RouterReport], None],
        heard_host: Callable[[str, HostReport], None],
        tick: Callable[[], None],
        superseded: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._spawner = spawner
        self._launcher = launcher
        self._transition = transition
        self._heard_router = heard_router
        self._heard_host = heard_host
        self._tick = tick
        self._superseded = superseded
        self._policy = registry.deployment.supervision
        self._stopping = threading.Event()
        self._due: dict[str, float] = {}  # name -> when to restore it
        self._due_changed = threading.Condition()
        self._relinked: dict[tuple[str, str], float] = {}
        self._grow_at = time.monotonic() + _GROW_BACK_S
        self._standby_at = 0.0
        self._looked = time.monotonic()
        self._threads = [
            threading.Thread(target=target, name=f"moray-{name}", daemon=True)
            for name, target in (("deaths", self._watch), ("heartbeat", self._listen), ("restorer", self._restore_due))
        ]

    def start(self) -> None:
        """Begin."""
        for member in self._registry.members():
            if member.state == "dead":
                self._restore_later(member, "it was gone when the controller came")
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look after nothing any more. Idempotent."""
        self._stopping.set()
        with self._due_changed:
            self._due_changed.notify_all()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(_JOIN_S)

    # ---- deaths -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        registry = self._registry
        while not self._stopping.is_set():
            with registry.lock:
                watched: dict[str, ExpertHostHandle | RouterHandle] = {
                    member.name: member.handle
                    for member in [*registry.members(), *registry.standby.values()]
                    if member.state in ("ready", "stuck", "standby") and member.handle is not None
                }
            for name in self._spawner.wait_for_deaths(watched, timeout_s=_POLL_S):
                self._ended(name, watched[name])

    def _ended(self, name: str, handle: ExpertHostHandle | RouterHandle) -> None:
        registry = self._registry
        with registry.lock:
            if registry.standby.get(name) is not None and registry.standby[name].handle is handle:
                del registry.standby[name]
                registry.happened("standby_died", name, bad=True)
                return
            member = registry.member(name)
            if member is None or member.handle is not handle or member.state not in ("ready", "stuck"):
                return  # removed or replaced meanwhile
            registry.happened("died", name, detail=f"pid {handle.pid}", bad=True)
            self._restore_later(member, "died; being restored")

    def _restore_later(self, member: Member, why: str) -> None:
        """Have it restored: at once the first times, then after pauses that grow while it keeps failing."""
        now = time.monotonic()
        with self._registry.lock:
            member.failures = [t for t in member.failures if now - t < _FAILURE_WINDOW_S] + [now]
            count = len(member.failures)
            first, longest = _PAUSES_S
            pause = 0.0 if count <= 2 else min(longest, first * 2 ** (count - 3))
            if pause:
                why = f"{why} ({count} times in {_FAILURE_WINDOW_S:.0f} s; next attempt in {pause:.1f} s)"
            self._registry.set_state(member, "dead" if pause else "starting", why)
        with self._due_changed:
            self._due[member.name] = now + pause
            self._due_changed.notify_all()

    # ---- restoring ----------------------------------------------------------------------------------------------------

    def _restore_due(self) -> None:
        routers: list[threading.Thread] = []
        while not self._stopping.is_set():
            with self._due_changed:
                now = time.monotonic()
                due = [name for name, at in self._due.items() if at <= now]
                if not due:
                    self._due_changed.wait(min([_POLL_S, *(at - now for at in self._due.values())]))
                for name in due:
                    del self._due[name]
            if not due:
                self._fill_standby()
                continue
            for name in due:
                if name in self._registry.routers:
                    # Beside the hosts: a router that comes up serves what is there, and is told of the rest.
                    thread = threading.Thread(
                        target=self._restore, args=(name,), name=f"moray-restore-{name}", daemon=True
                    )
                    thread.start()
                    routers = [*(t for t in routers if t.is_alive()), thread]
            hosts = [name for name in due if name in self._registry.hosts]
            if hosts:
                self._restore_hosts(hosts)
            self._fill_standby()
        for thread in routers:
            thread.join(_JOIN_S)

    def _restore_hosts(self, names: list[str]) -> None:
        try:
            with self._transition.urgent():
                # Those that died while this waited for its turn come along; those that are to wait longer do not.
                with self._due_changed:
                    now = time.monotonic()
                    later = [n for n, at in self._due.items() if at <= now and n in self._registry.hosts]
                    for name in later:
                        del self._due[name]
                names += later
                roomless: set[str] = set()
                side_by_side(lambda name: self._restore(name, roomless), names)
                if roomless and not self._stopping.is_set():
                    self._go_on_without(roomless)
        except MorayError as error:
            self._registry.happened("not_restored", ",".join(names), detail=str(error), bad=True)
            for name in names:
                member = self._registry.member(name)
                if member is not None:
                    self._restore_later(member, str(error))

    def _restore(self, name: str, roomless: set[str] | None = None) -> None:
        registry, begun = self._registry, time.monotonic()
        member = registry.member(name)
        if member is None or self._stopping.is_set():
            return
        try:
            with registry.lock:
                old, member.handle = member.handle, None
            if old is not None:
                old.kill()
            registry.set_state(member, "starting", "died; being restored")
            if isinstance(member, Host):
                self._restore_host(member)
            else:
                self._launcher.finish_router(self._launcher.new_router(name, gently=False))
        except NoRoomError as error:
            assert roomless is not None, "only hosts are asked whether there is room"
            registry.happened("no_room", name, detail=str(error), bad=True)
            registry.set_state(member, "dead", str(error))
            roomless.add(name)
        except Exception as error:
            # Whatever it is: a process that is not tried again is lost for good.
            if not isinstance(error, MorayError):
                logger.exception("%s: restoring it failed", name)
            registry.happened("not_restored", name, seconds=time.monotonic() - begun, detail=str(error), bad=True)
            if not self._stopping.is_set():
                self._restore_later(member, str(error))
        else:
            registry.happened("restored", name, seconds=time.monotonic() - begun, bad=True)

    def _restore_host(self, host: Host) -> None:
        registry, launcher = self._registry, self._launcher
        # Where its experts are nowhere else, requests wait for it; else it must not disturb them.
        waited_for = bool((registry.live_replicas() == 0).any())
        launcher.new_host(host.name, gently=not waited_for)
        try:
            launcher.open_host(host, registry.table, gently=not waited_for, urgent=True)
        except NoRoomError:
            if host.handle is not None:
                host.handle.kill()
            raise
        launcher.finish_load(host)
        launcher.host_ready(host)

        def relink(router: Router) -> None:
            if router.handle is not None:
                router.handle.relink(host.name, host.addresses)

        for error in side_by_side(relink, registry.serving_routers().values()):
            # A router that died as well is restored in its own turn, with the host's new addresses.
            registry.happened("relink_failed", host.name, detail=str(error), bad=True)

    def _go_on_without(self, names: set[str]) -> None:
        """Have the other hosts take over what hosts held for which there is no room."""
        try:
            self._transition.without(names)
        except (ConfigError, ClusterError) as error:
            self._registry.happened("not_restored", ",".join(sorted(names)), detail=str(error), bad=True)
            for name in names:
                member = self._registry.member(name)
                if member is not None:
                    self._restore_later(member, f"{member.detail}; and the others cannot take over: {error}")

    def _fill_standby(self) -> None:
        now = time.monotonic()
        if self._stopping.is_set() or now < self._standby_at:
            return
        self._standby_at = now + _STANDBY_PAUSE_S
        try:
            self._launcher.fill_standby()
        except MorayError as error:
            self._registry.happened("no_standby", "standby", detail=str(error), bad=True)

    # ---- reports ------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        # Twice as often as asked for: a report is taken at the round after the one that asked for it.
        while not self._stopping.wait(self._policy.heartbeat_s / 2):
            now = time.monotonic()
            away = now - self._looked - self._policy.heartbeat_s
            self._looked = now
            if away > self._policy.stuck_after_s and self._superseded():
                self._registry.happened("superseded", "controller", seconds=away, bad=True)
                self._transition.stop()
                self._stopping.set()
                return
            try:
                self._round(now, away)
            except Exception as error:
                # Without this thread nobody would notice a process that stands still; the next round may do better.
                logger.exception("a round of reports failed")
                self._registry.happened("round_failed", "controller", detail=repr(error), bad=True)

    def _round(self, now: float, away: float) -> None:
        for member in [*self._registry.members(), *self._registry.standby.values()]:
            if away > self._policy.heartbeat_s:
                member.heard += away  # it was this process that stood still
            self._ask(member, now)
        self._grow_back(now)
        self._tick()

    def _ask(self, member: Member, now: float) -> None:
        handle = member.handle
        if handle is None or member.state == "dead" or (member.state == "starting" and "standby" not in member.name):
            return
        try:
            report = handle.poll()
        except MorayError as error:
            logger.debug("%s: %s", member.name, error)  # its end is noticed elsewhere
            return
        if report is not None:
            self._heard(member, report, now)
        silent = now - member.heard
        if member.state == "ready" and silent > self._policy.stuck_after_s:
            self._registry.set_state(member, "stuck", f"has not answered for {silent:.0f} s")
            self._registry.happened("stuck", member.name, seconds=silent, bad=True)
        elif member.state == "stuck" and silent > self._policy.replace_after_s:
            self._registry.happened("given_up", member.name, seconds=silent, detail="it does not answer", bad=True)
            self._restore_later(member, f"did not answer for {silent:.0f} s; being restored")

    def _heard(self, member: Member, report: HostReport | RouterReport, now: float) -> None:
        silent, member.heard = now - member.heard, now
        if member.state == "stuck":
            self._registry.set_state(member, "ready")
            self._registry.happened("answers_again", member.name, seconds=silent, bad=True)
        if isinstance(member, Router) and isinstance(report, RouterReport):
            member.report = report
            self._heard_router(member.name, report)
            self._mend(member, report, now)
        elif isinstance(member, Host) and isinstance(report, HostReport):
            member.report = report
            if member.name in self._registry.standby:
                if member.state == "starting":
                    self._warm(member)
            else:
                self._heard_host(member.name, report)

    def _warm(self, standby: Host) -> None:
        assert standby.handle is not None, f"{standby.name} has no process"
        try:
            standby.handle.locate(ATTACH_TIMEOUT_S)  # it answers calls by now
        except MorayError as error:
            logger.debug("%s: %s", standby.name, error)
            return
        self._registry.set_state(standby, "standby")
        self._registry.happened("standby", standby.name, detail=f"pid {standby.handle.pid}")

    def _mend(self, router: Router, report: RouterReport, now: float) -> None:
        """Tell a router that misses a host where the host is now."""
        hosts = self._registry.serving_hosts()
        for name, view in report.hosts.items():
            host, handle = hosts.get(name), router.handle
            tried = self._relinked.get((router.name, name), 0.0)
            if view.linked or host is None or handle is None or now - tried < _RELINK_PAUSE_S:
                continue
            self._relinked[router.name, name] = now
            threading.Thread(target=_relink, args=(handle, host), name="moray-relink", daemon=True).start()

    def _grow_back(self, now: float) -> None:
        """Try to have as many hosts as were asked for again, where some had to be given up for want of room."""
        registry = self._registry
        hosts, cold = by_kind(registry.table.slots)
        whole = len(hosts) >= registry.wanted_hosts and len(cold) >= registry.wanted_cold
        if whole or now < self._grow_at:
            return
        self._grow_at = now + _GROW_BACK_S
        threading.Thread(target=self._grow, name="moray-grow", daemon=True).start()

    def _grow(self) -> None:
        try:
            self._transition.change(None)
        except MorayError as error:
            logger.info("event=not_grown_back reason=%s", error)


def _relink(handle: RouterHandle, host: Host) -> None:
    try:
        handle.relink(host.name, host.addresses)
    except MorayError as error:
        logger.debug("%s: %s", host.name, error)  # said in the next report, and tried again
