"""The controller's end of a process: calls with deadlines, whose every failure is one of our errors."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..actors.links import LinkAddress, LinkKind
from ..actors.placement_table import PlacementTable
from ..actors.reports import HostReport, RouterReport
from ..actors.router_process import HostAddresses
from ..actors.weight_copy import Sources
from ..configs.errors import ClusterError, MorayError
from ..model.reader import BytesRead
from .directory import LOAD_TIMEOUT_S
from .node_weights import Fetching

logger = logging.getLogger("moray.controller")

R = TypeVar("R", HostReport, RouterReport)

SPAWN_TIMEOUT_S = 120.0
"""For a process to come up: seconds on a free machine; on a cluster it may have to wait for a node."""

CALL_TIMEOUT_S = 30.0
ATTACH_TIMEOUT_S = 5.0
"""For a process that runs already to say where it is."""

_LOAD_POLL_S = 5.0
_STOP_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 5.0


def get(reference: Any, *, what: str, timeout_s: float) -> Any:
    """A Ray call's result.

    Raises:
        MorayError: what it raised; for whatever is not one of ours, and where it has no answer in time, a `ClusterError`.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MorayError):
            raise cause from None
        raise ClusterError(f"{what}: {error}") from error
    except GetTimeoutError as error:
        raise ClusterError(f"{what}: no answer within {timeout_s:.0f} s{free_resources()}") from error
    except RayError as error:
        raise ClusterError(f"{what}: {error}") from error


def free_resources() -> str:
    """What the cluster has free, for the commonest reason that an actor does not start."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return f"; CPUs free: {free.get('CPU', 0):g} of {total.get('CPU', 0):g}" + (
        f", GPUs free: {free.get('GPU', 0):g} of {total['GPU']:g}" if "GPU" in total else ""
    )


class Patience:
    """With something that may take long, as long as it gets on.

    Args:
        state: something else each time it got on; not asked before the first `timeout_s` are over.
        timeout_s: for which it may stand still.
    """

    def __init__(self, state: Callable[[], object], timeout_s: float) -> None:
        self._state = state
        self._timeout_s = timeout_s
        self._seen: object = None
        self._deadline = time.monotonic() + timeout_s

    def check(self, what: str) -> None:
        """Look whether it got on, if it is time to.

        Raises:
            ClusterError: it did not.
        """
        if time.monotonic() < self._deadline:
            return
        state = self._state()
        if state == self._seen:
            raise ClusterError(f"{what}: loading has not got on for {self._timeout_s:.0f} s; its log says why")
        self._seen, self._deadline = state, time.monotonic() + self._timeout_s


class Handle(Generic[R]):
    """A process, the call that ends when it does, and what it reports.

    Attributes:
        actor_name: name of the Ray actor, by which another controller finds it.
        pid, node: where it is, once `locate` has asked.
        ended: Ray's reference to the end of the process.
    """

    def __init__(self, actor_name: str, actor: Any, watcher: str) -> None:
        self.actor_name = actor_name
        self.pid = 0
        self.node = ""
        self._node_id = ""
        self._actor = actor
        self._asked: Any = None
        self.ended = actor.watch.remote(watcher)

    def locate(self, timeout_s: float = SPAWN_TIMEOUT_S) -> None:
        """Ask where it is: it has come up once it answers."""
        self.pid, self.node, self._node_id = self.call("where", timeout_s=timeout_s)

    def poll(self) -> R | None:
        """Its report, if it has answered since the last call; asks for the next one. Never blocks.

        Raises:
            MorayError: it has ended, or failed to make one.
        """
        report: R | None = None
        if self._asked is not None:
            answered, _ = ray.wait([self._asked], timeout=0, fetch_local=False)
            if not answered:
                return None
            asked, self._asked = self._asked, None
            report = get(asked, what=f"{self.actor_name}: report", timeout_s=CALL_TIMEOUT_S)
        self._asked = self._actor.report.remote()
        return report

    def bytes_loaded(self) -> int:
        """Bytes of tensors it has read so far."""
        done: int = self.call("bytes_loaded")
        return done

    def fetching(self) -> Fetching | None:
        """How far the fetch of the model is that it waits for; None where it waits for none."""
        state: Fetching | None = self.call("fetching")
        return state

    def how_far(self) -> object:
        """Something else each time, as long as it gets on with loading."""
        return self.bytes_loaded(), self.fetching()

    def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call a method and wait."""
        return get(getattr(self._actor, method).remote(*args), what=f"{self.actor_name}: {method}", timeout_s=timeout_s)

    def stop(self) -> None:
        """Ask it to end; end it if it does not."""
        try:
            ray.get(self._actor.stop.remote(), timeout=_STOP_TIMEOUT_S)
        except RayActorError:
            return  # dead already
        except RayError as error:
            logger.warning("event=kill process=%s reason=%s", self.actor_name, error)
            self.kill()
        else:
            ray.kill(self._actor)

    def kill(self) -> None:
        """End it at once, also if it is stopped: Ray alone then takes it for dead and leaves the process."""
        ended, _ = ray.wait([self.ended], timeout=0, fetch_local=False)
        ray.kill(self._actor)
        if ended or not self.pid:
            return
        strategy = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
        killing = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=strategy).remote(self.pid)
        try:
            ray.get(killing, timeout=_KILL_TIMEOUT_S)
        except RayError as error:  # the node is gone, and the process with it
            logger.warning("event=kill_failed process=%s pid=%d reason=%s", self.actor_name, self.pid, error)


def _kill(pid: int) -> None:
    """Kill a process of Ray's on this node; one that has ended meanwhile, and whose id another has, is left alone."""
    try:
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass


class ExpertHostHandle(Handle[HostReport]):
    """An expert host in a process of its own, or a warm process that becomes one."""

    _loading: Any = None

    def listen(self, host_id: str, link: LinkKind | Literal["auto"], secret: bytes) -> tuple[LinkAddress, ...]:
        """Have it become this host, and listen for the kinds of link the deployment may use."""
        return tuple(self.call("listen", host_id, link, secret))

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
        """Start to read and copy its experts; see `ExpertHost.load`."""
        how = {"sources": sources, "link": link, "secret": secret, "gently": gently}
        self._loading = self._actor.load.remote(slots, epoch, how)

    def loaded(self, timeout_s: float) -> BytesRead | None:
        """What it has read and copied, once it has all of it; None if that is not so within the time.

        Raises:
            MorayError: it could not.
        """
        done, _ = ray.wait([self._loading], timeout=timeout_s, fetch_local=False)
        if not done:
            return None
        found: BytesRead = get(self._loading, what=f"{self.actor_name}: load", timeout_s=CALL_TIMEOUT_S)
        return found

    def retire(self, epoch: int) -> None:
        """Have it serve `epoch` alone."""
        self.call("retire", epoch)

    def abandon(self, epoch: int) -> None:
        """Have it forget `epoch`, loaded or loading."""
        self.call("abandon", epoch)


class RouterHandle(Handle[RouterReport]):
    """A router in a process of its own.

    Attributes:
        bytes_read: from the checkpoint; known once it serves.
    """

    bytes_read: BytesRead = BytesRead(0, 0)

    def __init__(self, actor_name: str, actor: Any, watcher: str, started: Any = None) -> None:
        super().__init__(actor_name, actor, watcher)
        self._started = started

    def finish_start(self) -> str:
        """Wait until it serves; the address of its front channel."""
        self.locate()
        patience = Patience(self.how_far, LOAD_TIMEOUT_S)
        while not ray.wait([self._started], timeout=_LOAD_POLL_S, fetch_local=False)[0]:
            patience.check(self.actor_name)
        address: str
        address, self.bytes_read = get(self._started, what=f"{self.actor_name}: start", timeout_s=CALL_TIMEOUT_S)
        return address

    def relink(self, host_id: str, addresses: HostAddresses) -> None:
        """Have it link to a restored host."""
        self.call("relink", host_id, addresses)

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        """Have it change to another table."""
        self.call("adopt", table, hosts)
