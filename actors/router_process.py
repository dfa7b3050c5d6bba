"""What runs in a router's process: the router, its links to expert hosts, and its server for fronts."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from ..configs.errors import ClusterError, ConfigError, LinkError
from ..model.checkpoint import Checkpoint
from ..model.compute import Compute
from ..model.config import ModelConfig
from ..model.loading import load_dense
from ..model.progress import Progress
from ..model.reader import BytesRead
from ..model.weights import router_weights
from .deadline import Deadline
from .expert_dispatch import ExpertDispatch
from .links import Link, LinkAddress, LinkKind, Site, choose_kind, dial
from .messages import RouterStats
from .placement_table import PlacementTable
from .router import Router, RouterSettings
from .router_server import RouterServer

logger = logging.getLogger("moray.router")

_DIAL_TIMEOUT_S = 30.0

_ADOPT_TIMEOUT_S = 20.0
"""A step is over in less, or has failed for want of experts: then too the new table is taken before it is tried again."""

_MEND_PAUSE_S = 0.5
"""Between looks at lost links. A host that was killed refuses a dial at once; one that was only slow takes it."""

HostAddresses = Sequence[LinkAddress]
"""Every address one expert host listens on, one for each kind of link it offers."""


def dial_host(
    addresses: HostAddresses, wanted: LinkKind | Literal["auto"], *, secret: bytes, identity: str, device: torch.device
) -> Link:
    """Link to an expert host by the kind that is wanted, or by the best one for the two places.

    Raises:
        ConfigError: the host does not offer the kind, or it cannot join the two.
        LinkError: the host is not there, or not ours.
    """
    here = Site.here(device)
    machine = next((address.machine for address in addresses if address.kind == "shm"), "")
    kind = choose_kind(wanted, here=here, there=Site(machine, any(address.kind == "nccl" for address in addresses)))
    address = next((address for address in addresses if address.kind == kind), None)
    if address is None:
        offered = ", ".join(address.kind for address in addresses) or "none"
        raise ConfigError(f"link = {wanted!r} needs a {kind} link, the expert host offers {offered}")
    return dial(address, secret=secret, identity=identity, deadline=Deadline.after(_DIAL_TIMEOUT_S))


class RouterProcess:
    """One router, its links and its server, built whole: reads the dense weights, dials every host, starts to serve.

    Args:
        router_id: unique in the cluster, e.g. `router-0`.
        checkpoint: directory to read the dense weights from.
        compute: where and in what the router computes.
        table, hosts: where the experts are, and the addresses of each of those hosts.
        link: kind of the links to them.
        bind_host: this node's address on the cluster's network.
        secret: the cluster's.
        threads: compute threads.
        progress: where to show the read of the weights.

    Raises:
        CheckpointError, LinkError: the weights cannot be read, or a host cannot be reached.
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
        torch.set_num_threads(threads)
        self.stopped = threading.Event()
        self._router_id = router_id
        self._link = link
        self._secret = secret
        self._device = compute.device
        config = ModelConfig.load(checkpoint)
        dense, self._bytes_read = load_dense(Checkpoint.open(checkpoint), config, progress=progress)
        weights = router_weights(config, dense, compute)
        links = {host: self._dial(addresses) for host, addresses in hosts.items()}
        dispatch = ExpertDispatch(table, links, reply_timeout_s=reply_timeout_s)
        self._router = Router(router_id, config, weights, dispatch, settings, compute=compute)
        self._hosts = dict(hosts)
        self._router.start(on_failure=self.stopped.set)  # a process without its step loop is of no use: be restored
        self._server = RouterServer(self._router, bind_host=bind_host, secret=secret)
        threading.Thread(target=self._mend, name=f"{router_id}-mend", daemon=True).start()

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
        self._hosts[host] = addresses
        self._router.set_link(host, self._dial(addresses))

    def adopt(self, table: PlacementTable, hosts: Mapping[str, HostAddresses]) -> None:
        """Link to the hosts that are new in `table`, and use it from the next step on; returns once that is so.

        Args:
            table: of a later epoch; each of its hosts has loaded its slots already.
            hosts: addresses of every host of the table.

        Raises:
            LinkError: a new host cannot be reached; the old table stays in use.
            ClusterError: the step that is running did not end in time.
        """
        self._hosts.update(hosts)
        links = {host: self._dial(hosts[host]) for host in table.slots if host not in self._router.dispatch.table.slots}
        adopted = self._router.adopt(table, links)
        if not adopted.wait(_ADOPT_TIMEOUT_S):
            raise ClusterError(
                f"{self._router_id}: still in the step before epoch {table.epoch} after {_ADOPT_TIMEOUT_S:.0f} s"
            )

    def stats(self) -> RouterStats:
        """The router's counters."""
        return self._router.stats()

    def stop(self) -> None:
        """Stop serving, fail what is left, close the links. Idempotent."""
        self._server.close()
        self._router.stop()
        self.stopped.set()

    def _mend(self) -> None:
        """Link again to hosts whose link was lost while they live: one that was slow once must not stay away for good."""
        while not self.stopped.wait(_MEND_PAUSE_S):
            for host in self._router.dispatch.unlinked:
                try:
                    link = self._dial(self._hosts[host])
                except LinkError as error:
                    logger.debug("%s: %s", self._router_id, error)
                else:
                    logger.warning("%s: linked to %s again", self._router_id, host)
                    self._router.set_link(host, link)

    def _dial(self, addresses: HostAddresses) -> Link:
        return dial_host(addresses, self._link, secret=self._secret, identity=self._router_id, device=self._device)
