"""A cluster of threads: the controller's hosts and routers without any process, and one question to it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moray.actors.expert_host import ExpertHost
from moray.actors.links import LinkAddress, LinkKind
from moray.actors.messages import ClusterStatus, GenerateRequest, TokenOutput
from moray.actors.placement_table import PlacementTable
from moray.actors.reports import HostReport, RouterReport
from moray.actors.router import RouterSettings
from moray.actors.router_client import ClusterClient
from moray.actors.router_process import HostAddresses, RouterProcess
from moray.actors.weight_copy import Sources
from moray.cluster.assembly import checkpoint_path, compute, host_compute
from moray.cluster.controller import Controller
from moray.cluster.handles import ExpertHostHandle, RouterHandle
from moray.cluster.spawning import NoRoomError, Processes, Spawner
from moray.configs.deployment import Deployment
from moray.configs.errors import ClusterError
from moray.model.reader import BytesRead
from moray.model.sampling import SamplingParams

PROMPT = [5, 9, 200, 31, 7, 7, 80]


class ThreadHost(ExpertHostHandle):
    """An expert host in this process.

    Attributes:
        dead: it has ended, as a killed process has.
        silent: it answers nothing, as a stopped process.
        cannot_load: its loads fail.
        may_load: cleared, its loads wait.
    """

    def __init__(self, spawner: ThreadSpawner, label: str, host: ExpertHost, checkpoint: Path) -> None:
        self.actor_name = f"{label}.{next(spawner.numbers)}"
        self.pid, self.node = id(host) % 100_000 + 1, "here"
        self.spawner, self.host, self.checkpoint = spawner, host, checkpoint
        self.dead = self.silent = self.cannot_load = self.loading = False
        self.read: BytesRead | None = None
        self.may_load = threading.Event()
        self.may_load.set()

    def locate(self, timeout_s: float = 0.0) -> None:
        self._answer()

    def poll(self) -> HostReport | None:
        return None if self.silent or self.dead else self.host.report()

    def call(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        self._answer()
        return self.read if method == "bytes_read" else getattr(self.host, method)(*args)

    def become(self, host_id: str) -> None:
        self.host.become(host_id)
        self.spawner.hosts[host_id] = self

    def listen(self, host_id: str, link: LinkKind | Literal["auto"], secret: bytes) -> tuple[LinkAddress, ...]:
        self._answer()
        if not self.host.host_id:
            self.become(host_id)
        return (self.host.listen("shm", bind_host="127.0.0.1", secret=secret),)

    def begin_load(
        self,
        slots: Sequence[Sequence[int]],
        epoch: int,
        *,
        sources: Sources,
        link: LinkKind | Literal["auto"],
        secret: bytes,
        gently: bool,
    ) -> None:
        if self.cannot_load:
            raise ClusterError(f"{self.host.host_id}: is dead")
        self._load = partial(
            self.host.load,
            self.checkpoint,
            slots,
            epoch=epoch,
            sources=sources,
            link=link,
            secret=secret,
            gently=gently,
        )
        self.loading = True

    def loaded(self, timeout_s: float) -> BytesRead | None:
        self._answer()
        if not self.may_load.wait(timeout_s):
            return None
        self.loading = False
        read = self._load()
        self.read = read if self.read is None else self.read + read
        return read

    def retire(self, epoch: int) -> None:
        self._answer()
        self.host.retire(epoch)

    def abandon(self, epoch: int) -> None:
        self._answer()
        self.host.abandon(epoch)
        self.loading = False

    def bytes_loaded(self) -> int:
        return 0

    def stop(self) -> None:
        self.host.stop()

    def kill(self) -> None:
        self.dead = self.cannot_load = True
        self.host.stop()
        self.spawner.changed_now()

    def _answer(self) -> None:
        if self.dead or self.silent:
            raise ClusterError(f"{self.host.host_id}: is dead")


class ThreadRouter(RouterHandle):
    """A router in this process; `start` makes it, so that a failure shows where a Ray actor's would."""

    def __init__(self, spawner: ThreadSpawner, name: str, start: Callable[[], RouterProcess]) -> None:
        self.actor_name = f"{name}.{next(spawner.numbers)}"
        self.pid, self.node = id(self) % 100_000 + 1, "here"
        self.spawner, self._make = spawner, start
        self.router: RouterProcess | None = None
        self.dead = self.silent = False

    def locate(self, timeout_s: float = 0.0) -> None:
        self._alive()

    def poll(self) -> RouterReport | None:
        return None if self.silent or self.dead or self.router is None else self.router.report()

    def call(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        found = getattr(self._alive(), method)
        return found if method == "bytes_read" else found(*args)

    def finish_start(self) -> str:
        self.router = self._make()
        self.bytes_read = self.router.bytes_read
        return self.router.address

    def relink(self, host_id: str, addresses: HostAddresses) -> None:
        self._alive().relink(host_id, addresses)

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        self._alive().adopt(table, hosts)

    def _alive(self) -> RouterProcess:
        if self.dead or self.silent or self.router is None:
            raise ClusterError(f"{self.actor_name}: is dead")
        return self.router

    def bytes_loaded(self) -> int:
        return 0

    def stop(self) -> None:
        if self.router is not None:
            self.router.stop()

    def kill(self) -> None:
        self.dead = True
        self.stop()
        self.spawner.changed_now()


class ThreadSpawner(Spawner):
    """Makes `ThreadHost`s and `ThreadRouter`s.

    Attributes:
        made: names of all that were made, in order.
        hosts, routers: the last one of each name.
        before: called with the name of each before it is made.
        after_host: called with each host once it is made.
        room: how many more processes `check_room` allows.
    """

    def __init__(self) -> None:
        super().__init__("threads")
        self.changed = threading.Condition()
        self.numbers = itertools.count()
        self.made: list[str] = []
        self.actors: dict[str, ThreadHost | ThreadRouter] = {}
        self.hosts: dict[str, ThreadHost] = {}
        self.routers: dict[str, ThreadRouter] = {}
        self.before: Callable[[str], None] = lambda name: None
        self.after_host: Callable[[ThreadHost], None] = lambda host: None
        self.room = 100

    def changed_now(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def check_room(self, deployment: Deployment, more: Processes, *, running: Processes) -> None:
        asked = more.hosts + more.cold + more.routers
        if asked > self.room:
            raise NoRoomError(f"{asked - self.room} more CPUs")

    def gpus(self, deployment: Deployment) -> float:
        return 0.0

    def expert_host(self, host_id: str, deployment: Deployment, *, gently: bool = False) -> ExpertHostHandle:
        self.before(host_id)
        self.made.append(host_id)
        handle = self._made_host(host_id, deployment)
        handle.become(host_id)
        self.after_host(handle)
        return handle

    def standby(self, deployment: Deployment) -> ExpertHostHandle:
        self.before("standby")
        self.made.append("standby")
        return self._made_host("standby", deployment)

    def _made_host(self, label: str, deployment: Deployment) -> ThreadHost:
        host = ExpertHost("", compute=host_compute(deployment, label, gpus=0))
        handle = ThreadHost(self, label, host, checkpoint_path(deployment.model))
        self.actors[handle.actor_name] = handle
        return handle

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
        self.before(router_id)
        self.made.append(router_id)

        def start() -> RouterProcess:
            return RouterProcess(
                router_id,
                checkpoint=checkpoint_path(deployment.model),
                compute=compute(deployment, gpus=0),
                settings=settings,
                table=table,
                hosts=hosts,
                link=deployment.link,
                reply_timeout_s=5.0,
                bind_host="127.0.0.1",
                secret=secret,
                threads=1,
            )

        handle = ThreadRouter(self, router_id, start)
        self.actors[handle.actor_name] = handle
        self.routers[router_id] = handle
        return handle

    def attach_host(self, actor_name: str) -> ExpertHostHandle:
        found = self.actors[actor_name]
        assert isinstance(found, ThreadHost), actor_name
        found.locate()
        return found

    def attach_router(self, actor_name: str) -> RouterHandle:
        found = self.actors[actor_name]
        assert isinstance(found, ThreadRouter), actor_name
        found.locate()
        return found

    def sweep(self, keep: set[str]) -> None:
        for name, handle in self.actors.items():
            if name not in keep:
                handle.stop()

    def close(self) -> None:
        pass

    def wait_for_deaths(self, handles: Mapping[str, ExpertHostHandle | RouterHandle], *, timeout_s: float) -> list[str]:
        def dead() -> list[str]:
            return [
                name
                for name, handle in handles.items()
                if isinstance(handle, ThreadHost | ThreadRouter) and handle.dead
            ]

        with self.changed:
            self.changed.wait_for(dead, timeout_s)
            return dead()


def deployment(checkpoint: Path, hosts: int = 2, routers: int = 1, min_replicas: int = 1, **experts: Any) -> Deployment:
    return Deployment.from_dict(
        {
            "model": str(checkpoint),
            "experts": {"hosts": hosts, "min_replicas": min_replicas, **experts},
            "routers": {"replicas": routers, "cache_tokens": 512, "drain_timeout_s": 0.5},
            "supervision": {"heartbeat_s": 0.1, "stuck_after_s": 0.5, "replace_after_s": 1.0, "lease_s": 600.0},
        }
    )


def eventually(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.01)


def ask(controller: Controller, at: Callable[[int], None] = lambda tokens: None) -> list[TokenOutput]:
    """One greedy answer through a front; `at` is called with every number of tokens that have arrived, from 1 on: several may
    come at once."""

    async def directory() -> Mapping[str, str]:
        return controller.directory().routers

    async def describe() -> ClusterStatus:
        return controller.status()

    async def run() -> list[TokenOutput]:
        secret = controller.directory().secret
        client = ClusterClient(directory, describe, secret=secret, front_id="front-0", restore_timeout_s=20.0)
        await client.connect()
        outputs: list[TokenOutput] = []
        async for output in client.generate(GenerateRequest("r", PROMPT, SamplingParams(40, temperature=0.0))):
            before = len(tokens(outputs))
            outputs.append(output)
            for count in range(before + 1, len(tokens(outputs)) + 1):
                await asyncio.to_thread(at, count)
        await client.aclose()
        return outputs

    return asyncio.run(asyncio.wait_for(run(), 60))


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
