"""How processes come to be: the one place where plain classes become Ray actors.

Every process is a named, detached actor: it outlives the controller, and the next one finds it by its name.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import list_named_actors

from ..actors.placement_table import PlacementTable, is_cold
from ..actors.router import RouterSettings
from ..actors.router_process import HostAddresses
from ..configs.deployment import ColdHosts, Deployment, ExpertHosts, Routers
from ..configs.errors import ClusterError
from ..model.compute import Compute
from .assembly import compute, host_compute, host_names, router_name
from .handles import ATTACH_TIMEOUT_S, ExpertHostHandle, RouterHandle, free_resources
from .threads import given_threads, most_on_a_node
from .workers import ExpertHostWorker, RouterWorker, described_compute

logger = logging.getLogger("moray.controller")

_CALLS = 8
"""Calls that a process may have in hand: its watch, a load, a report, a relink, and some to spare. Each is a thread."""


_ROUNDING = 1e-6
"""Ray's amounts are multiples of 0.0001; sums of them are off by less than this."""

_Section = ExpertHosts | ColdHosts | Routers


class NoRoomError(ClusterError):
    """The Ray cluster has no room for another process."""


@dataclass(frozen=True, slots=True)
class Processes:
    """So many of each kind: expert hosts, expert hosts of the cold tier, routers."""

    hosts: int = 0
    cold: int = 0
    routers: int = 0


class Spawner:
    """Starts processes as Ray actors, finds those that run. `max_restarts` stays 0: a restartable actor hides its death.

    Args:
        namespace: Ray's, of all processes of one cluster and of nothing else.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._watcher = secrets.token_hex(4)
        self._prepared: dict[str, ExpertHostHandle | tuple[str, Any]] = {}

    def prepare(self, deployment: Deployment) -> None:
        """Have the deployment's processes come up at once; `expert_host` and `router` then find them.

        Starting Python and importing torch take longer than anything else a small model's process does, and no process
        needs another for it.
        """
        for name in host_names(deployment.experts):
            self._prepared[name] = self._host(name, deployment, gently=False)
        for index in range(deployment.routers.replicas):
            self._prepared[router_name(index)] = self._router_actor(router_name(index), deployment, gently=False)

    def expert_host(self, host_id: str, deployment: Deployment, *, gently: bool = False) -> ExpertHostHandle:
        """Start an empty expert host; `gently` beside processes that serve."""
        prepared = self._prepared.pop(host_id, None)
        return prepared if isinstance(prepared, ExpertHostHandle) else self._host(host_id, deployment, gently=gently)

    def standby(self, deployment: Deployment) -> ExpertHostHandle:
        """Start a process that can become any expert host, but for those of the cold tier."""
        return self._host("standby", deployment, gently=True)

    def router(
        self,
        router_id: str,
        deployment: Deployment,
        *,
        settings: RouterSettings,
        table: PlacementTable,
        hosts: Mapping[str, HostAddresses],
        secret: bytes,
        gently: bool = False,
    ) -> RouterHandle:
        """Start a router that links to `hosts`."""
        prepared = self._prepared.pop(router_id, None)
        name, actor = (
            prepared if isinstance(prepared, tuple) else self._router_actor(router_id, deployment, gently=gently)
        )
        started = actor.start.remote(
            described_compute(self._compute(deployment)),
            settings=settings,
            table=table,
            hosts=dict(hosts),
            link=deployment.link,
            reply_timeout_s=deployment.experts.reply_timeout_s,
            secret=secret,
        )
        return RouterHandle(name, actor, self._watcher, started)

    def attach_host(self, actor_name: str) -> ExpertHostHandle:
        """An expert host, or a warm process, that another controller started.

        Raises:
            ClusterError: it is not there, or does not answer.
        """
        handle = ExpertHostHandle(actor_name, self._actor(actor_name), self._watcher)
        handle.locate(ATTACH_TIMEOUT_S)
        return handle

    def attach_router(self, actor_name: str) -> RouterHandle:
        """A router that another controller started.

        Raises:
            ClusterError: it is not there, or does not answer.
        """
        handle = RouterHandle(actor_name, self._actor(actor_name), self._watcher)
        handle.locate(ATTACH_TIMEOUT_S)
        return handle

    def sweep(self, keep: set[str]) -> None:
        """End every process of ours that is not among these actors: another controller began it and kept no record."""
        prepared = {p.actor_name if isinstance(p, ExpertHostHandle) else p[0] for p in self._prepared.values()}
        for named in list_named_actors(all_namespaces=True):
            if named["namespace"] == self._namespace and named["name"] not in keep | prepared:
                logger.warning("event=swept process=%s", named["name"])
                try:
                    ray.kill(ray.get_actor(named["name"], namespace=self._namespace))
                except ValueError:
                    continue  # it has ended

    def check_room(self, deployment: Deployment, more: Processes, *, running: Processes) -> None:
        """Refuse to start so many more processes where the cluster has no room for them.

        What is short is asked of Ray, whose autoscaler adds nodes where there is one.

        Args:
            deployment: whose processes.
            more: how many of each kind.
            running: how many there are.

        Raises:
            NoRoomError: says how much of what is missing.
        """
        on_gpu = self._compute(deployment).device.type == "cuda"
        kinds = [
            (needs(deployment.experts, on_gpu), more.hosts, running.hosts, "expert host"),
            (needs(deployment.experts.cold, on_gpu), more.cold, running.cold, "cold expert host"),
            (needs(deployment.routers, on_gpu), more.routers, running.routers, "router"),
        ]
        short = lacking([(each, count) for each, count, _, _ in kinds], _free_of_nodes())
        if not short:
            _ask_ray_for([])
            return
        # Of all processes: Ray is asked for a size, not for more.
        _ask_ray_for([each for each, count, there, _ in kinds for _ in range(count + there)])
        described = [
            f"{count} more {what}{'s' if count > 1 else ''} of {_in_words(each)} each"
            for each, count, _, what in kinds
            if count
        ]
        raise NoRoomError(
            f"{' and '.join(described)} need {' and '.join(short)}{free_resources()}: add nodes "
            "(Ray was told; where its autoscaler can start some, they come by themselves: then try again)"
        )

    def close(self) -> None:
        """End processes that were prepared and never asked for."""
        while self._prepared:
            _, prepared = self._prepared.popitem()
            if isinstance(prepared, ExpertHostHandle):
                prepared.kill()
            else:
                ray.kill(prepared[1])

    def wait_for_deaths(self, handles: Mapping[str, ExpertHostHandle | RouterHandle], *, timeout_s: float) -> list[str]:
        """Names of those that have ended, as soon as one has, or none after `timeout_s`."""
        if not handles:
            time.sleep(timeout_s)
            return []
        by_reference = {handle.ended: name for name, handle in handles.items()}
        ended, _ = ray.wait(list(by_reference), num_returns=1, timeout=timeout_s, fetch_local=False)
        return [by_reference[reference] for reference in ended]

    def _host(self, label: str, deployment: Deployment, *, gently: bool) -> ExpertHostHandle:
        section = deployment.experts.cold if is_cold(label) else deployment.experts
        computing = host_compute(deployment, label, gpus=self.gpus(deployment))
        name, options = self._options(label, section, computing)
        experts = deployment.experts
        together = experts.hosts + experts.cold.hosts if self._compute(deployment).packed else experts.cold.hosts
        actor = (
            ray.remote(ExpertHostWorker)
            .options(**options)
            .remote(
                described_compute(computing),
                threads=given_threads(section.threads, section.cpus, computing),
                alike=most_on_a_node(together, section.resources, _nodes()),
                lease_s=deployment.supervision.lease_s,
                gently=gently,
                model=deployment.model,
                weights_dir=deployment.weights_dir,
            )
        )
        return ExpertHostHandle(name, actor, self._watcher)

    def _router_actor(self, router_id: str, deployment: Deployment, *, gently: bool) -> tuple[str, Any]:
        section, computing = deployment.routers, self._compute(deployment)
        name, options = self._options(router_id, section, computing)
        actor = (
            ray.remote(RouterWorker)
            .options(**options)
            .remote(
                router_id,
                threads=given_threads(section.threads, section.cpus, computing),
                alike=most_on_a_node(section.replicas, section.resources, _nodes()),
                lease_s=deployment.supervision.lease_s,
                gently=gently,
                model=deployment.model,
                weights_dir=deployment.weights_dir,
            )
        )
        return name, actor

    def _options(self, label: str, section: _Section, computing: Compute) -> tuple[str, dict[str, Any]]:
        """A name of its own, and Ray's options, for one process.

        Processes go to nodes in turn: so that a node that fails takes few with it, copies of an expert are on several, and
        routers share no network card. Where only some nodes have room, such as after a death, they go there.
        """
        # One that is restored must not wait for Ray to forget the name of the one before.
        name = f"{label}.{secrets.token_hex(3)}"
        reserved = needs(section, computing.device.type == "cuda")
        return name, {
            "name": name,
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_cpus": reserved["CPU"],
            "num_gpus": reserved.get("GPU", 0),
            "resources": dict(section.resources),
            "scheduling_strategy": "SPREAD",
            "max_restarts": 0,
            "max_concurrency": _CALLS,
        }

    def _actor(self, name: str) -> Any:
        try:
            return ray.get_actor(name, namespace=self._namespace)
        except ValueError as error:
            raise ClusterError(f"{name}: there is no such process any more") from error

    def _compute(self, deployment: Deployment) -> Compute:
        return compute(deployment, gpus=self.gpus(deployment))

    def gpus(self, deployment: Deployment) -> float:
        """GPUs there are for its processes."""
        if deployment.device == "cuda":
            return 1.0  # asked for by name: nodes with GPUs may be still to come
        gpus: float = ray.cluster_resources().get("GPU", 0.0)
        return gpus


def needs(section: _Section, on_gpu: bool) -> dict[str, float]:
    """What Ray reserves for one process of a section, where those that can are on GPUs."""
    gpus = {} if isinstance(section, ColdHosts) or not on_gpu else {"GPU": section.gpus}
    return {"CPU": float(section.cpus), **gpus, **section.resources}


def lacking(more: Sequence[tuple[dict[str, float], int]], free: Sequence[Mapping[str, float]]) -> list[str]:
    """What is missing for more processes, in words; empty where nothing is known to be.

    Never more than is missing: what each kind of process needs on one node is looked at for that kind alone.

    Args:
        more: what one process of each kind needs, and how many there are to be.
        free: what each node has left.
    """
    wanted: dict[str, float] = {}
    for each, count in more:
        for name, amount in each.items():
            wanted[name] = wanted.get(name, 0.0) + count * amount
    there = {name: sum(node.get(name, 0.0) for node in free) for name in wanted}
    short = [
        f"{amount - there[name]:g} more {_plural(name)}"
        for name, amount in wanted.items()
        if amount > there[name] + _ROUNDING
    ]
    if short:
        return short
    for each, count in more:
        room = sum(min(int(node.get(name, 0.0) / amount + _ROUNDING) for name, amount in each.items()) for node in free)
        if room < count:
            short.append(f"{_in_words(each)} on one node, {count - room} times more")
    return short


def _plural(resource: str) -> str:
    return f"{resource}s" if resource in ("CPU", "GPU") else resource


def _in_words(each: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in each.items())


def _ask_ray_for(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _nodes() -> list[dict[str, float]]:
    """What each node that is alive has of every resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free_of_nodes() -> list[dict[str, float]]:
    """What is free on each node that is alive."""
    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return list(found.values())
