"""What runs inside the processes of a cluster: Ray actors around the plain classes, and what only a process needs.

Nothing heavy is imported at the top. Ray imports this module in the main thread of a new process; torch and the rest follow
in a thread whose weight can be lowered, so that a process which comes up beside serving ones leaves the cores to them.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..actors.background import run_in_background
from .node_weights import Fetching, NodeWeights
from .threads import host_threads_here, threads_here

if TYPE_CHECKING:
    from ..actors.links import LinkAddress, LinkKind
    from ..actors.placement_table import PlacementTable
    from ..actors.reports import HostReport, RouterReport
    from ..actors.router_process import HostAddresses, RouterProcess
    from ..model.compute import Compute
    from ..model.reader import BytesRead
    from .chaos.fault_points import FaultPoints

T = TypeVar("T")

logger = logging.getLogger("moray.worker")

_SWITCH_S = 0.0005
"""How long a thread may keep the interpreter's lock while another one wants it. A thread that computes gives it up for every
operation, and with Python's 5 ms waits so long for it dozens of times a step while others load experts."""

_LEASE_CHECKS = 10
"""Looks at the lease in its length."""

_NICENESS = 10
"""Of a process that comes up beside serving ones: a ninth of the weight. With less it would starve where these never rest."""

START_TIMEOUT_S = 600.0
"""For imports and the first allocation on a device; a network disk can make them slow."""


class _Worker(ABC):
    """What every process has: it says where it is, and ends when it is told to, or when no controller speaks to it any more.

    Args:
        lease_s: how long without a word from a controller.
    """

    def __init__(self, lease_s: float) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        sys.setswitchinterval(_SWITCH_S)
        self._lease_s = lease_s
        self._heard = time.monotonic()
        self._watcher = ""
        self._watched = threading.Condition()
        threading.Thread(target=self._keep_lease, name="moray-lease", daemon=True).start()

    def where(self) -> tuple[int, str, str]:
        """Process id, node address and Ray's id of the node."""
        import ray

        self._heard = time.monotonic()
        return os.getpid(), _node_ip(), ray.get_runtime_context().get_node_id()

    def watch(self, watcher: str) -> None:
        """Return once `stop` was called; a caller that waits for it learns at once when the process dies.

        There is one watcher, the controller: a call by another one ends that of the one before, which is dead.
        """
        with self._watched:
            self._watcher = watcher
            self._watched.notify_all()
            while self._watcher == watcher and not self._stopped(0.0):
                self._watched.wait(1.0)

    @abstractmethod
    def _stopped(self, timeout_s: float) -> bool:
        """Whether `stop` was called, or is within the time."""

    @abstractmethod
    def stop(self) -> None:
        """End what runs here. Idempotent."""

    def _ended(self) -> None:
        with self._watched:
            self._watched.notify_all()

    def _keep_lease(self) -> None:
        while not self._stopped(self._lease_s / _LEASE_CHECKS):
            silent = time.monotonic() - self._heard
            if silent > self._lease_s:
                logger.error(
                    "event=lease_ended silent_s=%.0f: no controller has asked for this process; it ends", silent
                )
                self.stop()
                os._exit(1)


class ExpertHostWorker(_Worker):
    """An expert host, or a warm process that becomes one.

    Args:
        compute: where and in what the experts compute.
        threads, alike: compute threads, and where that is None, how many such hosts share the node's cores.
        gently: come up and load in a thread of little weight.
        model, weights_dir: of the deployment. One that comes up gently warms up for it, and has it fetched if it is not here,
            before it is asked to load anything.
    """

    def __init__(
        self,
        compute: Mapping[str, Any],
        *,
        threads: int | None,
        lease_s: float,
        gently: bool,
        model: str,
        weights_dir: str | None,
        alike: int = 1,
    ) -> None:
        self._stopping = threading.Event()
        super().__init__(lease_s)
        self._read: BytesRead | None = None
        self._weights = NodeWeights(model, weights_dir)
        self._loads = False
        here = self._weights.path_if_here() if gently else None
        self._host: FaultPoints = _started(
            lambda: _expert_host(compute, host_threads_here(threads, alike), here), gently
        )
        from ..model.progress import CountingProgress

        self._progress = CountingProgress()
        if gently and here is None:
            threading.Thread(target=self._fetch_ahead, name="moray-fetch-ahead", daemon=True).start()

    def listen(self, host_id: str, link: LinkKind | Literal["auto"], secret: bytes) -> list[LinkAddress]:
        """Be this expert host from now on, and listen for every kind that the deployment's `link` may turn into here.

        In one call: those of one caller run side by side, in any order.

        Raises:
            ConfigError: this machine cannot compute as the deployment asks for.
        """
        from ..model.compute import use_instructions

        use_instructions(self._host.compute)
        self._host.become(host_id)
        kinds: list[LinkKind] = [link] if link != "auto" else ["shm", "gloo"]
        if link == "auto" and self._host.compute.device.type == "cuda":
            kinds.append("nccl")
        return [self._host.listen(kind, bind_host=_node_ip(), secret=secret) for kind in kinds]

    def load(self, slots: Sequence[Sequence[int]], epoch: int, how: Mapping[str, Any]) -> BytesRead:
        """See `ExpertHost.load`; `how` are its other arguments. Fetches the model first, if it is not on this node."""
        self._loads = True
        read = self._host.load(self._weights.path(), slots, epoch=epoch, progress=self._progress, **how)
        self._read = read if self._read is None else self._read + read
        return read

    def bytes_read(self) -> BytesRead | None:
        """What all loads have read and copied; None before the first."""
        return self._read

    def retire(self, epoch: int) -> None:
        """See `ExpertHost.retire`."""
        self._host.retire(epoch)

    def abandon(self, epoch: int) -> None:
        """See `ExpertHost.abandon`."""
        self._host.abandon(epoch)

    def report(self) -> HostReport:
        """See `ExpertHost.report`; renews the lease."""
        self._heard = time.monotonic()
        return self._host.report()

    def bytes_loaded(self) -> int:
        """Bytes of tensors read and copied so far; renews the lease."""
        self._heard = time.monotonic()
        return self._progress.done

    def fetching(self) -> Fetching | None:
        """How far the fetch of the model is that this process waits for."""
        return self._weights.fetching()

    def _fetch_ahead(self) -> None:
        """Have the model here before it is needed."""
        from ..configs.errors import MorayError

        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            path = self._weights.path()
            if not self._loads:
                self._host.warm_up(path)
        except MorayError as error:  # whoever has it load is told, if it is still so then
            logger.warning("event=fetch_ahead_failed reason=%s", error)

    def inject(self, fault: str, seconds: float, settings: dict[str, Any]) -> int:
        """See `FaultPoints.inject`: for `moray chaos`. Who can call this can call anything in this process."""
        return self._host.inject(fault, seconds, **settings)

    def stop(self) -> None:
        """See `ExpertHost.stop`."""
        self._stopping.set()
        self._host.stop()
        self._ended()

    def _stopped(self, timeout_s: float) -> bool:
        return self._stopping.wait(timeout_s)


class RouterWorker(_Worker):
    """A process that becomes a router: it can come up before the hosts it is to link to are known.

    Args:
        router_id: its id.
        threads, alike: compute threads, and where that is None, how many routers share the node's cores.
        gently: come up in a thread of little weight.
        model, weights_dir: of the deployment.
    """

    def __init__(
        self,
        router_id: str,
        *,
        threads: int | None,
        lease_s: float,
        gently: bool,
        model: str,
        weights_dir: str | None,
        alike: int = 1,
    ) -> None:
        self._stopping = threading.Event()
        super().__init__(lease_s)
        self._weights = NodeWeights(model, weights_dir)
        self._router_id = router_id
        self._threads = threads_here(threads, alike)
        self._router: RouterProcess | None = None
        self._make = _started(_router_process, gently)
        from ..model.progress import CountingProgress

        self._progress = CountingProgress()

    def start(self, compute: Mapping[str, Any], **settings: Any) -> tuple[str, BytesRead]:
        """Become the `RouterProcess` with these settings; the address of its front channel, and bytes read.

        Fetches the model first, if it is not on this node.
        """
        router = self._make(
            self._router_id,
            checkpoint=self._weights.path(),
            bind_host=_node_ip(),
            threads=self._threads,
            progress=self._progress,
            compute=_compute(compute),
            **settings,
        )
        self._router = router
        return router.address, router.bytes_read

    def bytes_loaded(self) -> int:
        """Bytes of tensors read so far; renews the lease."""
        self._heard = time.monotonic()
        return self._progress.done

    def fetching(self) -> Fetching | None:
        """How far the fetch of the model is that this process waits for."""
        return self._weights.fetching()

    def bytes_read(self) -> BytesRead | None:
        """What the router has read; None before it is one."""
        return None if self._router is None else self._router.bytes_read

    def report(self) -> RouterReport | None:
        """See `RouterProcess.report`; None before it has become a router. Renews the lease."""
        self._heard = time.monotonic()
        return None if self._router is None else self._router.report()

    def relink(self, host: str, addresses: HostAddresses) -> None:
        """See `RouterProcess.relink`."""
        self._serving().relink(host, addresses)

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        """See `RouterProcess.adopt`."""
        self._serving().adopt(table, hosts)

    def _serving(self) -> RouterProcess:
        from ..configs.errors import ClusterError

        if self._router is None:
            raise ClusterError(f"{self._router_id} has not become a router yet")
        return self._router

    def stop(self) -> None:
        """Stop the router, if it has become one. Idempotent."""
        self._stopping.set()
        if self._router is not None:
            self._router.stop()
        self._ended()

    def _stopped(self, timeout_s: float) -> bool:
        if self._router is None:
            return self._stopping.wait(timeout_s)
        return self._router.stopped.wait(timeout_s)


def _started(make: Callable[[], T], gently: bool) -> T:
    return run_in_background(make, timeout_s=START_TIMEOUT_S, niceness=_NICENESS) if gently else make()


def _expert_host(compute: Mapping[str, Any], threads: int, model: Path | None) -> FaultPoints:
    from ..configs.errors import ConfigError
    from ..kernels.cpu.library import set_threads
    from ..model.compute import use_instructions
    from .chaos.fault_points import FaultPoints

    set_threads(threads, packed=compute["packed"])
    host = FaultPoints("", compute=_compute(compute))
    try:
        use_instructions(host.compute)
    except ConfigError:
        return host  # `listen` says why: of a process that ends as it starts, Ray tells little more than that
    if model is not None:
        host.warm_up(model)
    return host


def _router_process() -> type[RouterProcess]:
    """The class; its import takes seconds."""
    from ..actors.router_process import RouterProcess

    return RouterProcess


def _compute(described: Mapping[str, Any]) -> Compute:
    """What `described_compute` described: `Compute` itself would bring torch into the main thread with the arguments."""
    import torch

    from ..model.compute import Compute

    return Compute(
        device=torch.device(described["device"]),
        dtype=getattr(torch, described["dtype"]),
        keep_fp8=described["keep_fp8"],
        fp8_kv=described["fp8_kv"],
        packed=described["packed"],
        instructions=described["instructions"],
    )


def described_compute(compute: Compute) -> dict[str, Any]:
    """`compute` as plain data."""
    return {
        "device": str(compute.device),
        "dtype": str(compute.dtype).removeprefix("torch."),
        "keep_fp8": compute.keep_fp8,
        "fp8_kv": compute.fp8_kv,
        "packed": compute.packed,
        "instructions": compute.instructions,
    }


def _node_ip() -> str:
    """This node's address on Ray's network: where links and front channels listen."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
