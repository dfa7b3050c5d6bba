"""Linking to an expert host: routers do it for its work, other hosts for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..configs.errors import ConfigError, HandshakeError
from .deadline import Deadline
from .links import Link, LinkAddress, LinkKind, Site, choose_kind, dial

_DIAL_TIMEOUT_S = 30.0

HostAddresses = Sequence[LinkAddress]
"""Every address one expert host listens on, one for each kind of link it offers."""


def dial_host(
    addresses: HostAddresses,
    wanted: LinkKind | Literal["auto"],
    *,
    host: str,
    secret: bytes,
    identity: str,
    device: torch.device,
    timeout_s: float = _DIAL_TIMEOUT_S,
) -> Link:
    """Link to an expert host by the kind that is wanted, or by the best one for the two places.

    Args:
        host: whose addresses these are. Where it has gone, another host of the cluster may listen at one of them by now.

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
    link = dial(address, secret=secret, identity=identity, deadline=Deadline.after(timeout_s))
    if link.peer != host:
        link.close()
        raise HandshakeError(host, f"is gone: {link.peer} listens at {address.endpoint} now")
    return link
