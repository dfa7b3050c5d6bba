"""The cluster under test, from outside: its HTTP API, its Ray, and its processes on this machine."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from ...actors.front.settings import load_api_keys
from ...configs.errors import ClusterError, MorayError
from ..changes import Change, Wanted
from ..run_state import ProcessId, RunState

NAMESPACE: Final = "moray"
_STATUS_TIMEOUT_S: Final = 10.0
_INJECT_TIMEOUT_S: Final = 10.0
_CHANGE_TIMEOUT_S: Final = 600.0
_POLL_S: Final = 0.1
_RETRY_PAUSE_S: Final = 1.0
HEARTBEAT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Process:
    """One entry of `processes` in `/v1/moray/status`; see `ProcessStatus`."""

    id: str
    role: str
    pid: int
    node: str
    state: str
    actor: str = ""

    @property
    def in_role(self) -> str:
        """Its role, or `standby` for a warm process that waits for one, or comes up to."""
        return "standby" if self.state == "standby" or self.id.startswith("standby-") else self.role


@dataclass(frozen=True, slots=True)
class View:
    """What of a status the harness looks at; see `ClusterStatus`. `routers` has the routers' own counters."""

    model: str
    epoch: int
    health: str
    reason: str
    min_replicas: int
    missing_replicas: int
    processes: tuple[Process, ...]
    routers: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, status: dict[str, Any]) -> View:
        """From the API's answer."""
        return cls(
            model=status["model"],
            epoch=status["epoch"],
            health=status["health"],
            reason=status["reason"],
            min_replicas=status["min_replicas"],
            missing_replicas=status["missing_replicas"],
            processes=tuple(
                Process(p["id"], p["role"], p["pid"], p["node"], p["state"], p["actor"]) for p in status["processes"]
            ),
            routers=tuple(status["routers"]),
        )

    def of_role(self, role: str) -> list[Process]:
        """The processes that serve in this role."""
        return [process for process in self.processes if process.in_role == role]

    def counts(self) -> dict[str, int]:
        """How many processes of each role there are, warm ones as `standby`."""
        return dict(Counter(process.in_role for process in self.processes))


def not_whole(view: View, counts: Mapping[str, int] | None, gone: Sequence[int] = ()) -> str:
    """Why the cluster is not what it should be, in words; empty if it is.

    Args:
        counts: processes it should have, by role; None if that is not known yet.
        gone: pids that must not be its any more.
    """
    if view.health != "ok":
        return f"health is {view.health}: {view.reason}"
    not_ready = [f"{p.id} is {p.state}" for p in view.processes if p.state not in ("ready", "standby")]
    if not_ready:
        return ", ".join(not_ready)
    if view.missing_replicas:
        return f"{view.missing_replicas} replicas are missing"
    if counts is not None and view.counts() != counts:
        return f"there are {_counted(view.counts())}, wanted {_counted(counts)}"
    reporting = {stats["router_id"] for stats in view.routers}
    silent = [p.id for p in view.of_role("router") if p.id not in reporting]
    if silent:
        return f"the front has no report of {', '.join(silent)}"
    trouble = [
        f"{stats['router_id']} has trouble with {', '.join((*stats['broken_links'], *stats['late_hosts']))}"
        for stats in view.routers
        if stats["broken_links"] or stats["late_hosts"] or stats["unreachable_experts"]
    ]
    if trouble:
        return "; ".join(trouble)
    still = [f"{p.id} is pid {p.pid} still" for p in view.processes if p.pid in gone]
    return ", ".join(still)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {role}" for role, count in sorted(counts.items()))


class Target:
    """A running cluster that is about to suffer. Use `connected`."""

    def __init__(
        self, client: httpx.Client, controller: Any, say: Callable[[str], None], server: ProcessId | None
    ) -> None:
        self._client = client
        self._controller = controller
        self._say = say
        self.server = server
        self.seen: dict[int, ProcessId] = {}  # every process of the cluster so far that ran on this machine

    def view(self) -> View:
        """The cluster's state now.

        Raises:
            ClusterError: it does not say.
        """
        try:
            response = self._client.get("/v1/moray/status")
            if response.status_code != 200:
                raise ClusterError(f"/v1/moray/status: {response.status_code}: {response.text[:200]}")
            found = View.of(response.json())
        except (httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
            raise ClusterError(f"/v1/moray/status: {type(error).__name__}: {error}") from error
        for process in found.processes:
            running = ProcessId.of(process.pid) if self.is_here(process) else None
            if running is not None:
                self.seen[process.pid] = running
        return found

    def is_here(self, process: Process) -> bool:
        """Whether it runs on this machine, so that its pid means something here."""
        import ray

        return process.pid > 0 and process.node == ray.util.get_node_ip_address()

    def wait_until(self, check: Callable[[View], str], what: str, *, timeout_s: float) -> tuple[float, View]:
        """Ask until `check` has nothing to say; how long that took in seconds, and the state then.

        Raises:
            ClusterError: it has not come to that within `timeout_s`; says what was the matter at last.
        """
        started = said = time.monotonic()
        while True:
            try:
                view = self.view()
                reason = check(view)
                if not reason:
                    return time.monotonic() - started, view
            except ClusterError as error:
                reason = str(error)
            now = time.monotonic()
            if now - started > timeout_s:
                raise ClusterError(f"not {what} within {timeout_s:.0f} s: {reason}")
            if now - said > HEARTBEAT_S:
                said = now
                self._say(f"  ... not {what} after {now - started:.0f} s: {reason}")
            time.sleep(_POLL_S)

    def inject(self, actor: str, fault: str, seconds: float, *, seed: int = 0) -> int:
        """Ask the expert host with this actor for a fault of `fault_points`; how many links it shows on.

        Raises:
            ClusterError: the process cannot be asked.
        """
        import ray
        from ray.exceptions import RayError

        try:
            handle = ray.get_actor(actor, namespace=NAMESPACE)
            links: int = ray.get(handle.inject.remote(fault, seconds, {"seed": seed}), timeout=_INJECT_TIMEOUT_S)
        except (RayError, ValueError) as error:
            raise ClusterError(f"{actor} cannot be asked for {fault}: {error}") from error
        return links

    def actors(self) -> list[str]:
        """Names of the actors of all processes there are now."""
        from ray.util import list_named_actors

        return [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]

    def change(self, wanted: Wanted, *, timeout_s: float = _CHANGE_TIMEOUT_S) -> Change:
        """Ask the controller for a change and wait for it.

        Raises:
            MorayError: it was refused or failed; the cluster is what it was.
        """
        from ..admin import ask

        change: Change = ask(self._controller.change.remote(wanted, False), timeout_s)
        return change

    def change_until_done(self, wanted: Wanted, *, timeout_s: float) -> tuple[Change, int]:
        """As `change`, again as long as it fails; with how many times it failed.

        Raises:
            ClusterError: it failed for all of `timeout_s`; has the last reason.
        """
        deadline = time.monotonic() + timeout_s
        failures = 0
        while True:
            try:
                return self.change(wanted, timeout_s=max(1.0, deadline - time.monotonic())), failures
            except MorayError as error:
                failures += 1
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{wanted} failed {failures} times in {timeout_s:.0f} s; at last: {error}"
                    ) from error
                self._say(f"  ... a change failed and is tried again: {error}")
                time.sleep(_RETRY_PAUSE_S)


@contextlib.contextmanager
def connected(
    url: str | None, address: str | None, key_file: Path | None, say: Callable[[str], None]
) -> Iterator[tuple[Target, Callable[[], httpx.Client]]]:
    """The cluster at `url` with its Ray at `address`, and what makes HTTP clients of it for streams.

    Raises:
        ClusterError: it is not there, or only one of the two is known and nothing on this machine tells the other.
    """
    from ..admin import controller_at

    records = [record for record in RunState().records() if record.server.alive and record.ray_address]
    if url is not None:
        records = [record for record in records if record.url.rstrip("/") == url.rstrip("/")]
    if address is not None:
        records = [record for record in records if record.ray_address == address]
    record = records[0] if records else None
    if record is not None:
        url, address = record.url, record.ray_address
    if url is None or address is None:
        missing = " and ".join(flag for flag, given in (("--url", url), ("--address", address)) if given is None)
        raise ClusterError(
            f"no `moray serve` with a Ray of its own that fits runs here: start one, or give {missing} too"
        )
    base = url.rstrip("/").removesuffix("/v1")
    headers = {} if key_file is None else {"Authorization": f"Bearer {load_api_keys(key_file)[0]}"}

    def client(timeout_s: float) -> httpx.Client:
        return httpx.Client(base_url=base, headers=headers, timeout=timeout_s, trust_env=False)

    from .traffic import SILENCE_S

    with controller_at(address) as controller, client(_STATUS_TIMEOUT_S) as asking:
        target = Target(asking, controller, say, None if record is None else record.server)
        yield target, lambda: client(SILENCE_S)
