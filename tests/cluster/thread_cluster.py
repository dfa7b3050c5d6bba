"""A cluster of threads: the controller's hosts and routers without any process, and one question to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from moray.actors.expert_host import ExpertHost
from moray.actors.links import LinkAddress, LinkKind
from moray.actors.messages import ClusterStatus, GenerateRequest, TokenOutput
from moray.actors.placement_table import PlacementTable
from moray.actors.router import RouterSettings
from moray.actors.router_client import ClusterClient
from moray.actors.router_process import HostAddresses, RouterProcess
from moray.cluster.assembly import compute
from moray.cluster.controller import Controller
from moray.cluster.spawning import ExpertHostHandle, RouterHandle, Spawner
from moray.configs.deployment import Deployment
from moray.configs.errors import ClusterError
from moray.model.reader import BytesRead
from moray.model.sampling import SamplingParams

PROMPT = [5, 9, 200, 31, 7, 7, 80]


class ThreadHost(ExpertHostHandle):
    """An expert host in this process."""

    def __init__(self, host: ExpertHost, died: Callable[[], None]) -> None:
        self.name, self.pid, self.node = host.host_id, id(host) % 100_000 + 1, "here"
        self.host = host
        self.dead = self.cannot_load = self.loading = False
        self.died = died
        self.may_load = threading.Event()
        self.may_load.set()

    def listen(self, link: LinkKind | Literal["auto"], secret: bytes) -> list[LinkAddress]:
        return [self.host.listen("shm", bind_host="127.0.0.1", secret=secret)]

    def begin_load(self, checkpoint: Path, slots: Sequence[Sequence[int]], epoch: int) -> None:
        if self.cannot_load:
            raise ClusterError(f"{self.name}: is dead")
        self._load = (checkpoint, slots, epoch)
        self.loading = True

    def retire(self, epoch: int) -> None:
        self.host.retire(epoch)

    def bytes_loaded(self) -> int:
        return 0

    def finish_load(self) -> BytesRead:
        assert self.may_load.wait(20)
        checkpoint, slots, epoch = self._load
        self.loading = False
        return self.host.load(checkpoint, slots, epoch=epoch)

    def stop(self) -> None:
        self.host.stop()

    def kill(self) -> None:
        self.dead = self.cannot_load = True
        self.host.stop()
        self.died()


class ThreadRouter(RouterHandle):
    """A router in this process; `start` makes it, so that a failure shows where a Ray actor's would."""

    def __init__(self, name: str, start: Callable[[], RouterProcess], died: Callable[[], None]) -> None:
        self.name, self.pid, self.node = name, id(self) % 100_000 + 1, "here"
        self._make = start
        self.router: RouterProcess | None = None
        self.dead = False
        self.died = died

    def finish_start(self) -> str:
        self.router = self._make()
        self.bytes_read = self.router.bytes_read
        return self.router.address

    def relink(self, host_id: str, addresses: HostAddresses) -> None:
        self._alive().relink(host_id, addresses)

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        self._alive().adopt(table, hosts)

    def _alive(self) -> RouterProcess:
        if self.dead or self.router is None:
            raise ClusterError(f"{self.name}: is dead")
        return self.router

    def stop(self) -> None:
        if self.router is not None:
            self.router.stop()

    def kill(self) -> None:
        self.dead = True
        self.stop()
        self.died()


class ThreadSpawner(Spawner):
    """Makes `ThreadHost`s and `ThreadRouter`s. `before` is called with the name of each before it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.made: list[str] = []
        self.hosts: dict[str, ThreadHost] = {}
        self.routers: dict[str, ThreadRouter] = {}
        self.before: Callable[[str], None] = lambda name: None
        self.after_host: Callable[[ThreadHost], None] = lambda host: None
        self.room = 100

    def _died(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def check_room(self, deployment: Deployment, *, hosts: int) -> None:
        if hosts > self.room:
            raise ClusterError(f"{hosts - self.room} more CPUs")

    def expert_host(self, host_id: str, deployment: Deployment) -> ExpertHostHandle:
        self.before(host_id)
        self.made.append(host_id)
        handle = ThreadHost(ExpertHost(host_id, compute=compute(deployment, gpus=0)), self._died)
        self.hosts[host_id] = handle
        self.after_host(handle)
        return handle

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
        self.before(router_id)
        self.made.append(router_id)

        def start() -> RouterProcess:
            return RouterProcess(
                router_id,
                checkpoint=checkpoint,
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

        handle = ThreadRouter(router_id, start, self._died)
        self.routers[router_id] = handle
        return handle

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


def deployment(checkpoint: Path, hosts: int = 2, routers: int = 1, min_replicas: int = 1) -> Deployment:
    return Deployment.from_dict(
        {
            "model": str(checkpoint),
            "experts": {"hosts": hosts, "min_replicas": min_replicas},
            "routers": {"replicas": routers, "cache_tokens": 512},
        }
    )


def eventually(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.01)


def ask(controller: Controller, at: Callable[[int], None] = lambda tokens: None) -> list[TokenOutput]:
    """One greedy answer through a front; `at` is called with the number of tokens that have arrived."""

    async def directory() -> Mapping[str, str]:
        return controller.directory().routers

    async def describe() -> ClusterStatus:
        return controller.status()

    async def run() -> list[TokenOutput]:
        secret = controller.directory().secret
        client = ClusterClient(directory, describe, secret=secret, front_id="front-0", restore_timeout_s=20.0)
        await client.connect()
        outputs = []
        async for output in client.generate(GenerateRequest("r", PROMPT, SamplingParams(40, temperature=0.0))):
            outputs.append(output)
            await asyncio.to_thread(at, len(outputs))
        await client.aclose()
        return outputs

    return asyncio.run(asyncio.wait_for(run(), 60))


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
