"""How processes come to be: the one place where plain classes become Ray actors.

Every process is a named, detached actor: it outlives the controller, and the next one finds it by its name.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util import list_named_actors

from ..actors.placement_table import PlacementTable
from ..actors.router import RouterSettings
from ..actors.router_process import HostAddresses
from ..configs.deployment import Deployment, ExpertHosts, Routers
from ..configs.errors import ClusterError
from ..model.compute import Compute
from .assembly import checkpoint_path, compute, host_name, router_name
from .handles import ATTACH_TIMEOUT_S, ExpertHostHandle, RouterHandle, free_resources
from .workers import ExpertHostWorker, RouterWorker, described_compute

logger = logging.getLogger("moray.controller")

_CALLS = 8
"""Calls that a process may have in hand: its watch, a load, a report, a relink, and some to spare. Each is a thread."""


class NoRoomError(ClusterError):
    """The Ray cluster has no room for another process."""


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
        for index in range(deployment.experts.hosts):
            self._prepared[host_name(index)] = self._host(host_name(index), deployment, gently=False)
        for index in range(deployment.routers.replicas):
            self._prepared[router_name(index)] = self._router_actor(router_name(index), deployment, gently=False)

    def expert_host(self, host_id: str, deployment: Deployment, *, gently: bool = False) -> ExpertHostHandle:
        """Start an empty expert host; `gently` beside processes that serve."""
        prepared = self._prepared.pop(host_id, None)
        return prepared if isinstance(prepared, ExpertHostHandle) else self._host(host_id, deployment, gently=gently)

    def standby(self, deployment: Deployment) -> ExpertHostHandle:
        """Start a process that can become any expert host."""
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
            checkpoint=checkpoint_path(deployment.model),
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

    def check_room(
        self, deployment: Deployment, *, hosts: int = 0, routers: int = 0, running: tuple[int, int] = (0, 0)
    ) -> None:
        """Refuse to start so many more processes where the cluster has no room for them.

        What is short is asked of Ray, whose autoscaler adds nodes where there is one.

        Args:
            deployment: whose processes.
            hosts, routers: how many more.
            running: how many there are of each.

        Raises:
            NoRoomError: says how much of what is missing.
        """
        on_gpu = self._compute(deployment).device.type == "cuda"
        wanted = {"CPU": 0.0, "GPU": 0.0}
        bundles: list[dict[str, float]] = []  # of all processes: Ray is asked for a size, not for more
        described = []
        for count, there, section, what in (
            (hosts, running[0], deployment.experts, "expert host"),
            (routers, running[1], deployment.routers, "router"),
        ):
            needs = _needs(section, on_gpu)
            bundles += [needs] * (count + there)
            for kind, amount in needs.items():
                wanted[kind] += count * amount
            if count:
                each = " and ".join(f"{amount:g} {kind}" for kind, amount in needs.items())
                described.append(f"{count} more {what}{'s' if count > 1 else ''} of {each} each")
        free = ray.available_resources()
        short = [
            f"{need - free.get(kind, 0):g} more {kind}s" for kind, need in wanted.items() if need > free.get(kind, 0)
        ]
        if short:
            _ask_ray_for(bundles)
            raise NoRoomError(
                f"{' and '.join(described)} need {' and '.join(short)}{free_resources()}: add nodes "
                "(Ray was told; where its autoscaler runs, they come by themselves: then try again)"
            )
        _ask_ray_for([])

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
        section, computing = deployment.experts, self._compute(deployment)
        name, options = self._options(label, section, computing)
        actor = (
            ray.remote(ExpertHostWorker)
            .options(**options)
            .remote(
                described_compute(computing),
                threads=section.cpus,
                lease_s=deployment.supervision.lease_s,
                gently=gently,
                model=checkpoint_path(deployment.model) if gently else None,
            )
        )
        return ExpertHostHandle(name, actor, self._watcher)

    def _router_actor(self, router_id: str, deployment: Deployment, *, gently: bool) -> tuple[str, Any]:
        section = deployment.routers
        name, options = self._options(router_id, section, self._compute(deployment))
        actor = (
            ray.remote(RouterWorker)
            .options(**options)
            .remote(router_id, threads=section.cpus, lease_s=deployment.supervision.lease_s, gently=gently)
        )
        return name, actor

    def _options(self, label: str, section: ExpertHosts | Routers, computing: Compute) -> tuple[str, dict[str, Any]]:
        """A name of its own, and Ray's options, for one process."""
        # One that is restored must not wait for Ray to forget the name of the one before.
        name = f"{label}.{secrets.token_hex(3)}"
        needs = _needs(section, computing.device.type == "cuda")
        return name, {
            "name": name,
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_cpus": needs["CPU"],
            "num_gpus": needs.get("GPU", 0),
            "max_restarts": 0,
            "max_concurrency": _CALLS,
        }

    def _actor(self, name: str) -> Any:
        try:
            return ray.get_actor(name, namespace=self._namespace)
        except ValueError as error:
            raise ClusterError(f"{name}: there is no such process any more") from error

    @staticmethod
    def _compute(deployment: Deployment) -> Compute:
        return compute(deployment, gpus=ray.cluster_resources().get("GPU", 0))


def _needs(section: ExpertHosts | Routers, on_gpu: bool) -> dict[str, float]:
    return {"CPU": float(section.cpus), **({"GPU": section.gpus} if on_gpu else {})}


def _ask_ray_for(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)
