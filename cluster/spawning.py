"""How processes come to be: the one place where plain actor classes become Ray actors."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ..actors.expert_host import ExpertHost
from ..actors.links import LinkAddress, LinkKind
from ..actors.placement_table import PlacementTable
from ..actors.router import RouterSettings
from ..actors.router_process import HostAddresses, RouterProcess
from ..configs.deployment import Deployment, ExpertHosts, Routers
from ..configs.errors import ClusterError, MorayError
from ..model.compute import Compute
from ..model.progress import CountingProgress
from ..model.reader import BytesRead
from .assembly import compute, host_name, router_name

logger = logging.getLogger("moray.controller")

T = TypeVar("T")

SPAWN_TIMEOUT_S = 120.0
"""For a process to come up: seconds on a free machine; on a cluster it may have to wait for a node."""

LOAD_TIMEOUT_S = 3600.0
"""For a host to read its experts: 654 GB over ten hosts from a slow shared disk take half an hour."""

CALL_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0


def _get(reference: Any, *, what: str, timeout_s: float) -> Any:
    """A Ray call's result; every failure becomes one of our errors."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MorayError):
            raise cause from None
        raise ClusterError(f"{what}: {error}") from error
    except GetTimeoutError as error:
        raise ClusterError(f"{what}: no answer within {timeout_s:.0f} s{_shortage()}") from error
    except RayError as error:
        raise ClusterError(f"{what}: {error}") from error


def _shortage() -> str:
    """What the cluster has free, for the commonest reason that an actor does not start."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return f"; CPUs free: {free.get('CPU', 0):g} of {total.get('CPU', 0):g}" + (
        f", GPUs free: {free.get('GPU', 0):g} of {total['GPU']:g}" if "GPU" in total else ""
    )


class _Handle:
    """An actor and the call that ends when it does."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.pid = 0
        self.node = ""
        self._actor = actor
        self.ended = actor.wait_until_stopped.remote()

    def bytes_loaded(self) -> int:
        """Bytes of tensors it has read so far."""
        done: int = self.call("bytes_loaded")
        return done

    def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, **kwargs: Any) -> Any:
        """Call a method and wait."""
        reference = getattr(self._actor, method).remote(*args, **kwargs)
        return _get(reference, what=f"{self.name}: {method}", timeout_s=timeout_s)

    def stop(self) -> None:
        """Ask, wait, kill."""
        try:
            ray.get(self._actor.stop.remote(), timeout=_STOP_TIMEOUT_S)
        except RayActorError:
            return  # dead already
        except RayError as error:
            logger.warning("event=kill process=%s reason=%s", self.name, error)
        ray.kill(self._actor)


class ExpertHostHandle(_Handle):
    """An expert host in a process of its own."""

    _loading: Any = None

    def listen(self, link: LinkKind | Literal["auto"], secret: bytes) -> list[LinkAddress]:
        """Have it listen for the kinds of link the deployment may use."""
        self.pid, self.node = self.call("where", timeout_s=SPAWN_TIMEOUT_S)
        addresses: list[LinkAddress] = self.call("listen_all", link, secret)
        return addresses

    def begin_load(self, checkpoint: Path, slots: Sequence[Sequence[int]], epoch: int) -> None:
        """Start reading its experts."""
        self._loading = self._actor.load_slots.remote(checkpoint, slots, epoch)

    def finish_load(self) -> BytesRead:
        """Wait until they are read."""
        bytes_read: BytesRead = _get(self._loading, what=f"{self.name}: load", timeout_s=LOAD_TIMEOUT_S)
        return bytes_read

    def retire(self, epoch: int) -> None:
        """Have it serve `epoch` alone."""
        self.call("retire", epoch)


class RouterHandle(_Handle):
    """A router in a process of its own."""

    bytes_read: BytesRead

    def __init__(self, name: str, actor: Any, started: Any) -> None:
        super().__init__(name, actor)
        self._started = started

    def finish_start(self) -> str:
        """Wait until it serves; the address of its front channel."""
        self.pid, self.node = self.call("where", timeout_s=SPAWN_TIMEOUT_S)
        address: str
        address, self.bytes_read = _get(self._started, what=f"{self.name}: start", timeout_s=LOAD_TIMEOUT_S)
        return address

    def relink(self, host_id: str, addresses: HostAddresses) -> None:
        """Have it link to a restored host."""
        self.call("relink", host_id, addresses)

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        """Have it change to another table."""
        self.call("adopt", table, hosts)


class ExpertHostActor(ExpertHost):
    """`ExpertHost` with what only a Ray worker needs."""

    def __init__(self, host_id: str, *, compute: Compute, threads: int) -> None:
        _configure(threads)
        super().__init__(host_id, compute=compute)
        self._progress = CountingProgress()

    def load_slots(self, checkpoint: Path, slots: Sequence[Sequence[int]], epoch: int) -> BytesRead:
        """See `ExpertHost.load`."""
        return self.load(checkpoint, slots, epoch=epoch, progress=self._progress)

    def bytes_loaded(self) -> int:
        """Bytes of tensors read so far."""
        return self._progress.done

    def where(self) -> tuple[int, str]:
        """Process id and node address."""
        return self.pid, _node_ip()

    def listen_all(self, link: LinkKind | Literal["auto"], secret: bytes) -> list[LinkAddress]:
        """Listen for every kind the deployment's `link` may turn into on this node."""
        kinds: list[LinkKind] = [link] if link != "auto" else ["shm", "gloo"]
        if link == "auto" and self.compute.device.type == "cuda":
            kinds.append("nccl")
        return [self.listen(kind, bind_host=_node_ip(), secret=secret) for kind in kinds]

    def wait_until_stopped(self) -> None:
        """Return once `stop` was called; a caller waiting on it learns at once when the process dies."""
        self._stopping.wait()


class RouterActor:
    """A Ray worker that becomes a router: the process can come up before the hosts it is to link to are known."""

    def __init__(self, router_id: str, *, threads: int) -> None:
        _configure(threads)
        self._router_id = router_id
        self._threads = threads
        self._router: RouterProcess | None = None
        self._progress = CountingProgress()
        self._decided = threading.Event()  # it has become a router, or it will not

    def where(self) -> tuple[int, str]:
        """Process id and node address."""
        return os.getpid(), _node_ip()

    def start(self, **settings: Any) -> tuple[str, BytesRead]:
        """Become the `RouterProcess` with these settings; the address of its front channel, and bytes read."""
        router = RouterProcess(
            self._router_id, bind_host=_node_ip(), threads=self._threads, progress=self._progress, **settings
        )
        self._router = router
        self._decided.set()
        return router.address, router.bytes_read

    def bytes_loaded(self) -> int:
        """Bytes of tensors read so far."""
        return self._progress.done

    def relink(self, host: str, addresses: HostAddresses) -> None:
        """See `RouterProcess.relink`."""
        assert self._router is not None, "started before anything else is asked"
        self._router.relink(host, addresses)

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        """See `RouterProcess.adopt`."""
        assert self._router is not None, "started before anything else is asked"
        self._router.adopt(table, hosts)

    def stop(self) -> None:
        """Stop the router, if it has become one. Idempotent."""
        if self._router is not None:
            self._router.stop()
        self._decided.set()

    def wait_until_stopped(self) -> None:
        """See `ExpertHostActor.wait_until_stopped`."""
        self._decided.wait()
        if self._router is not None:
            self._router.stopped.wait()


class Spawner:
    """Starts processes as Ray actors. `max_restarts` stays 0: a restartable actor hides its death for seconds."""

    def __init__(self) -> None:
        self._prepared: dict[str, Any] = {}

    def prepare(self, deployment: Deployment) -> None:
        """Have the deployment's processes come up at once; `expert_host` and `router` then find them.

        Starting Python and importing torch take longer than anything else a small model's process does, and no process
        needs another for it.
        """
        for index in range(deployment.experts.hosts):
            self._prepared[host_name(index)] = self._host_actor(host_name(index), deployment)
        for index in range(deployment.routers.replicas):
            self._prepared[router_name(index)] = self._router_actor(router_name(index), deployment)

    def expert_host(self, host_id: str, deployment: Deployment) -> ExpertHostHandle:
        """Start an empty expert host."""
        actor = self._prepared.pop(host_id, None) or self._host_actor(host_id, deployment)
        return ExpertHostHandle(host_id, actor)

    def router(
        self,
        router_id: str,
        deployment: Deployment,
        *,
        checkpoint: Path,
        settings: RouterSettings,
        table: PlacementTable,
        hosts: Mapping[str, HostAddresses],
        secret: bytes,
    ) -> RouterHandle:
        """Start a router that links to `hosts`."""
        actor = self._prepared.pop(router_id, None) or self._router_actor(router_id, deployment)
        started = actor.start.remote(
            checkpoint=checkpoint,
            compute=self._compute(deployment),
            settings=settings,
            table=table,
            hosts=hosts,
            link=deployment.link,
            reply_timeout_s=deployment.experts.reply_timeout_s,
            secret=secret,
        )
        return RouterHandle(router_id, actor, started)

    def check_room(self, deployment: Deployment, *, hosts: int) -> None:
        """Refuse to start `hosts` more expert hosts where the cluster has no room for them.

        Raises:
            ClusterError: says how much of what is missing.
        """
        section, computing = deployment.experts, self._compute(deployment)
        wanted = {"CPU": float(hosts * section.cpus)}
        if computing.device.type == "cuda":
            wanted["GPU"] = hosts * section.gpus
        free = ray.available_resources()
        short = [
            f"{need - free.get(kind, 0):g} more {kind}s" for kind, need in wanted.items() if need > free.get(kind, 0)
        ]
        if short:
            each = f"{section.cpus} CPU" + (f" and {section.gpus:g} GPU" if "GPU" in wanted else "")
            raise ClusterError(
                f"{hosts} more expert hosts of {each} each need {' and '.join(short)}{_shortage()}: add nodes"
            )

    def close(self) -> None:
        """End processes that were prepared and never asked for."""
        while self._prepared:
            ray.kill(self._prepared.popitem()[1])

    def wait_for_deaths(self, handles: Mapping[str, ExpertHostHandle | RouterHandle], *, timeout_s: float) -> list[str]:
        """Names of those that have ended, as soon as one has, or none after `timeout_s`."""
        if not handles:
            time.sleep(timeout_s)
            return []
        by_reference = {handle.ended: name for name, handle in handles.items()}
        ended, _ = ray.wait(list(by_reference), num_returns=1, timeout=timeout_s, fetch_local=False)
        return [by_reference[reference] for reference in ended]

    def _host_actor(self, host_id: str, deployment: Deployment) -> Any:
        section, computing = deployment.experts, self._compute(deployment)
        actor = _remote(ExpertHostActor, section, computing)
        return actor.remote(host_id, compute=computing, threads=section.cpus)

    def _router_actor(self, router_id: str, deployment: Deployment) -> Any:
        section = deployment.routers
        return _remote(RouterActor, section, self._compute(deployment)).remote(router_id, threads=section.cpus)

    @staticmethod
    def _compute(deployment: Deployment) -> Compute:
        return compute(deployment, gpus=ray.cluster_resources().get("GPU", 0))


def _remote(actor_class: type, section: ExpertHosts | Routers, computing: Compute) -> Any:
    gpus = section.gpus if computing.device.type == "cuda" else 0
    # Three calls may be in progress beside `wait_until_stopped`: a load, how far it is, and a relink.
    options = {"num_cpus": section.cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 4}
    return ray.remote(actor_class).options(**options)


def _node_ip() -> str:
    """This node's address on Ray's network: where links and front channels listen."""
    address: str = ray.util.get_node_ip_address()
    return address


def _configure(threads: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    torch.set_num_threads(threads)
