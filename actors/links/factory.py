"""Making links, whatever their kind."""

from __future__ import annotations

from ...configs.errors import ConfigError
from ..deadline import Deadline
from .base import Link, LinkAddress, LinkKind, Listener
from .inline import InlineListener, dial_inline
from .process_group import ProcessGroupListener, dial_process_group
from .shm import ShmListener, dial_shm


def listen(kind: LinkKind, *, bind_host: str, secret: bytes, identity: str) -> Listener:
    """Listen for links of one kind.

    Args:
        bind_host: this node's address on the network the links use, for gloo and nccl; the other kinds ignore it.
        secret: the cluster's secret, at least 16 bytes.
        identity: this end's name, e.g. `expert-host-2`: letters, digits and `._:@/-`.

    Raises:
        ConfigError: the address cannot be used, the secret is too short, or this process cannot make links of the kind.
    """
    if kind == "inline":
        return InlineListener(secret=secret, identity=identity)
    if kind == "shm":
        return ShmListener(secret=secret, identity=identity)
    if kind in ("gloo", "nccl"):
        return ProcessGroupListener(kind, bind_host=bind_host, secret=secret, identity=identity)
    raise ConfigError(f"no link is of kind {kind!r}: use inline, shm, gloo or nccl")


def dial(address: LinkAddress, *, secret: bytes, identity: str, deadline: Deadline) -> Link:
    """Connect to a listener.

    Raises:
        PeerDiedError: nobody listens there, or the peer hung up.
        PeerTimeoutError: the peer did not answer before the deadline.
        HandshakeError: the peer is not ours: another secret, protocol version or kind of connection.
        ConfigError: the address cannot be dialled from here (shm on another machine, nccl without a GPU).
    """
    if address.kind == "inline":
        return dial_inline(address.endpoint, secret=secret, identity=identity)
    if address.kind == "shm":
        return dial_shm(address, secret=secret, identity=identity, deadline=deadline)
    if address.kind in ("gloo", "nccl"):
        return dial_process_group(address.kind, address.endpoint, secret=secret, identity=identity, deadline=deadline)
    raise ConfigError(f"no link is of kind {address.kind!r}: use inline, shm, gloo or nccl")
