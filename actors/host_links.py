"""A router's dialling of expert hosts: those it begins with, new ones, and again those it has lost. Never in a step's way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from ..configs.errors import LinkError, PeerDiedError, PeerTimeoutError
from .dialling import HostAddresses, dial_host
from .links import Link, LinkKind

logger = logging.getLogger("moray.router")

_DIAL_TIMEOUT_S = 20.0
"""For hosts that are needed now and known to listen."""

_MEND_TIMEOUT_S = 3.0
"""For hosts that were lost. The kernel takes connections in for a stopped process too, but nobody shakes hands then."""

_MEND_PAUSE_S = 0.5
"""Between looks at lost links. A host that was killed refuses a dial at once; one that was only slow takes it."""


class HostLinks:
    """Knows where expert hosts listen, and links to them.

    Args:
        router_id: what the router is called, there and in the log.
        hosts: addresses of each host.
        link: kind of the links.
        device: what the router computes on.
    """

    def __init__(
        self,
        router_id: str,
        hosts: Mapping[str, HostAddresses],
        *,
        link: LinkKind | Literal["auto"],
        secret: bytes,
        device: torch.device,
    ) -> None:
        self._router_id = router_id
        self._link = link
        self._secret = secret
        self._device = device
        self._hosts = dict(hosts)
        self._mending: set[str] = set()  # hosts that a thread dials now
        self._lock = threading.Lock()  # guards the two above

    def know(self, hosts: Mapping[str, HostAddresses]) -> None:
        """From now on these hosts listen at these addresses."""
        with self._lock:
            self._hosts.update(hosts)

    def dial_all(self, hosts: Iterable[str]) -> dict[str, Link]:
        """Link to all of these hosts, side by side.

        Raises:
            LinkError: a host is not there, or not ours; there are links to none of them then.
            ConfigError: a host does not offer the kind of link that is wanted.
        """
        links, errors = self._dial_side_by_side(hosts)
        if errors:
            for link in links.values():
                link.close()
            raise next(iter(errors.values()))
        return links

    def dial_those_there(self) -> dict[str, Link]:
        """Link to every host that is known, side by side, and leave those that are gone or silent to `mend`.

        Raises:
            LinkError: a host is not ours, or none is there.
            ConfigError: a host does not offer the kind of link that is wanted.
        """
        links, errors = self._dial_side_by_side(self._hosts)
        away = {h: error for h, error in errors.items() if isinstance(error, PeerDiedError | PeerTimeoutError)}
        if errors and (not links or len(away) < len(errors)):
            for link in links.values():
                link.close()
            raise next(error for host, error in errors.items() if not links or host not in away)
        for host, error in away.items():
            logger.warning("event=unlinked router=%s host=%s reason=%r", self._router_id, host, str(error))
        return links

    def mend(
        self, lost: Callable[[], Iterable[str]], use: Callable[[str, Link], None], stopped: threading.Event
    ) -> None:
        """Link again to hosts whose link was lost while they live, until `stopped`: one that was slow once must not stay
        away for good.

        Args:
            lost: says which hosts there is no link to.
            use: takes a new link, from any thread.
        """
        while not stopped.wait(_MEND_PAUSE_S):
            for host in lost():
                with self._lock:
                    if host in self._mending or host not in self._hosts:
                        continue
                    self._mending.add(host)
                # A thread for each: one host's slowness must not delay the others.
                name = f"{self._router_id}-mend-{host}"
                threading.Thread(target=self._mend, args=(host, use, stopped), name=name, daemon=True).start()

    def _dial_side_by_side(self, hosts: Iterable[str]) -> tuple[dict[str, Link], dict[str, BaseException]]:
        wanted = {host: self._addresses(host) for host in hosts}
        if not wanted:
            return {}, {}
        with ThreadPoolExecutor(len(wanted), thread_name_prefix=f"{self._router_id}-dial") as threads:
            dials = {host: threads.submit(self._dial, host, there, _DIAL_TIMEOUT_S) for host, there in wanted.items()}
        errors = {host: error for host, dial in dials.items() if (error := dial.exception()) is not None}
        return {host: dial.result() for host, dial in dials.items() if host not in errors}, errors

    def _mend(self, host: str, use: Callable[[str, Link], None], stopped: threading.Event) -> None:
        addresses = self._addresses(host)
        try:
            link = self._dial(host, addresses, _MEND_TIMEOUT_S)
        except LinkError as error:
            logger.debug("%s: %s", self._router_id, error)
            return
        finally:
            with self._lock:
                self._mending.discard(host)
        if stopped.is_set() or self._addresses(host) is not addresses:
            link.close()  # the router has ended, or the host was restored elsewhere meanwhile
            return
        logger.warning("event=linked router=%s host=%s", self._router_id, host)
        use(host, link)

    def _addresses(self, host: str) -> HostAddresses:
        with self._lock:
            return self._hosts[host]

    def _dial(self, host: str, addresses: HostAddresses, timeout_s: float) -> Link:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # what a link's buffers are on is the dialling thread's own setting
        return dial_host(
            addresses,
            self._link,
            host=host,
            secret=self._secret,
            identity=self._router_id,
            device=self._device,
            timeout_s=timeout_s,
        )
