"""What runs in a router's process: the router, its links to expert hosts, and its server for fronts."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..configs.errors import ClusterError
from ..kernels.cpu.library import set_threads
from ..model.checkpoint import Checkpoint
from ..model.compute import Compute, instructions_used, use_instructions
from ..model.config import ModelConfig
from ..model.loading import load_dense
from ..model.progress import Progress
from ..model.reader import BytesRead
from ..model.weights import router_weights
from .dialling import HostAddresses as HostAddresses  # part of what is asked of a router
from .expert_dispatch import ExpertDispatch
from .host_links import HostLinks
from .links import LinkKind
from .messages import RouterStats
from .native_exchange import native_exchange
from .placement_table import PlacementTable
from .reports import RouterReport
from .router import Router, RouterSettings
from .router_server import RouterServer

_ADOPT_TIMEOUT_S = 20.0
"""A step is over in less, or has failed for want of experts: then too the new table is taken before it is tried again."""

_SPIN_US = 60
"""How long idle compute threads of a router look for work: its native layers follow each other within less, but for the time in
which hosts compute, and those of its own node want the cores then. 300 us made a step of 32 tokens 1.08 times as long."""


class RouterProcess:
    """One router, its links and its server, built whole: reads the dense weights, dials the hosts, starts to serve.

    Args:
        router_id: unique in the cluster, e.g. `router-0`.
        checkpoint: directory to read the dense weights from.
        compute: where and in what the router computes.
        table, hosts: where the experts are, and the addresses of each of those hosts. Hosts that are gone or silent are linked
            to when they answer.
        link: kind of the links to them.
        bind_host: this node's address on the cluster's network.
        secret: the cluster's.
        threads: compute threads.
        progress: where to show the read of the weights.

    Raises:
        ConfigError: this machine cannot compute so.
        CheckpointError, LinkError: the weights cannot be read, or no host can be reached.
    """

    def __init__(
        self,
        router_id: str,
        *,
        checkpoint: Path,
        compute: Compute,
        settings: RouterSettings,
        table: PlacementTable,
        hosts: Mapping[str, HostAddresses],
        link: LinkKind | Literal["auto"],
        reply_timeout_s: float,
        bind_host: str,
        secret: bytes,
        threads: int,
        progress: Progress | None = None,
    ) -> None:
        set_threads(threads, packed=compute.packed, spin_us=_SPIN_US)
        use_instructions(compute)
        self.stopped = threading.Event()
        self._router_id, self._compute = router_id, compute
        config = ModelConfig.load(checkpoint)
        if settings.draft_tokens:
            config = config.with_draft_layer()
        dense, self._bytes_read = load_dense(Checkpoint.open(checkpoint), config, progress=progress)
        weights = router_weights(config, dense, compute)
        self._links = HostLinks(router_id, hosts, link=link, secret=secret, device=compute.device)
        dispatch = ExpertDispatch(
            table,
            self._links.dial_those_there(),
            reply_timeout_s=reply_timeout_s,
            exchange=native_exchange() if compute.packed else None,
        )
        self._router = Router(router_id, config, weights, dispatch, settings, compute=compute)
        self._router.start(on_failure=self.stopped.set)  # a process without its step loop is of no use: be restored
        self._server = RouterServer(self._router, bind_host=bind_host, secret=secret)
        threading.Thread(
            target=self._links.mend,
            args=(lambda: self._router.unlinked, self._router.set_link, self.stopped),
            name=f"{router_id}-mend",
            daemon=True,
        ).start()

    @property
    def address(self) -> str:
        """`host:port` where fronts connect."""
        return self._server.address

    @property
    def bytes_read(self) -> BytesRead:
        """What was read from the checkpoint."""
        return self._bytes_read

    @property
    def pid(self) -> int:
        """Process this router lives in."""
        return os.getpid()

    def relink(self, host: str, addresses: HostAddresses) -> None:
        """Link anew to a host that was restored, and use the link from the next step on.

        Raises:
            LinkError: the host is not there.
        """
        self._links.know({host: addresses})
        self._router.set_link(host, self._links.dial_all([host])[host])

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        """Link to the hosts that are new in `table`, and use it from the next step on; returns once that is so.

        Args:
            table: of a later epoch; each of its hosts has loaded its slots already.
            hosts: addresses of every host of the table.

        Raises:
            LinkError: a new host cannot be reached; the old table stays in use.
            ClusterError: the step that is running did not end in time.
        """
        self._links.know(hosts)
        present = self._router.dispatch.table.slots
        adopted = self._router.adopt(table, self._links.dial_all(host for host in table.slots if host not in present))
        if not adopted.wait(_ADOPT_TIMEOUT_S):
            raise ClusterError(
                f"{self._router_id}: still in the step before epoch {table.epoch} after {_ADOPT_TIMEOUT_S:.0f} s"
            )

    def stats(self) -> RouterStats:
        """The router's counters."""
        return self._router.stats()

    def report(self) -> RouterReport:
        """What the router knows of itself, its hosts and its fronts. Does not wait for the step that is running."""
        dispatch = self._router.dispatch
        return RouterReport(
            stats=self._router.stats(),
            epoch=dispatch.table.epoch,
            expert_tokens=dispatch.expert_tokens.copy(),
            hosts=dispatch.host_views(),
            silent_fronts=self._server.silent_fronts(),
            instructions=instructions_used(self._compute),
        )

    def stop(self) -> None:
        """Stop serving, fail what is left, close the links. Idempotent."""
        self._server.close()
        self._router.stop()
        self.stopped.set()
