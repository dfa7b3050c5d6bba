"""The link between two machines: payload through torch process groups, gloo between CPUs and NCCL between GPUs.

A TCP connection beside them carries the handshake, the rendezvous, each frame's sizes and the peer's liveness. Frames
are staged: a send copies its tensors into one of `FRAMES_IN_FLIGHT` buffers and returns, so that a router can send to
all hosts before the first has begun to receive. Each frame is one transfer of exactly its size; between CPUs, a small
one follows its header through the TCP connection instead.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist

from ...configs.errors import HandshakeError, LinkError
from ..deadline import Deadline
from .acceptor import Acceptor
from .base import FRAMES_IN_FLIGHT, Frame, Link, LinkAddress, Listener
from .control import ControlChannel
from .handshake import authenticate
from .lifecycle import GuardedLink
from .pair_groups import GroupKind, PairGroup, create_pair, transfer_device
from .receive_buffers import ReceiveBuffers, allocate_bytes, size_class
from .rendezvous import Rendezvous
from .sockets import dial_tcp, endpoint_of, listen_tcp, make_peer_loss_visible
from .wire import MessageType, Payload, read_payload, write_payload

CONTROL_BUFFER_BYTES = 256 * 1024
"""Socket buffers of the control channel (the kernel doubles this, and caps it): frames in flight fit without a wait, so
that a slow peer does not look like a vanished one, whose full window `make_peer_loss_visible` would end."""

_PROBE_BYTES: Final = 32


class _Staging:
    """A reusable buffer to send from, and the transfer that uses it."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = allocate_bytes(size_class(0), device)
        self.work: dist.Work | None = None

    def room(self, nbytes: int) -> torch.Tensor:
        """The first `nbytes` of the buffer as uint8 [nbytes], grown if need be; no transfer may be using it."""
        if self._buffer.numel() < nbytes:
            self._buffer = allocate_bytes(size_class(nbytes), self._buffer.device)
        return self._buffer.narrow(0, 0, nbytes)


class ProcessGroupLink(GuardedLink):
    """One end of a gloo or NCCL link. Received tensors are on `device`.

    They stay as they are for as long as the caller holds them or views of them, beyond the next `recv` too, which is more
    than `Frame` promises; see `receive_buffers.py`.
    """

    def __init__(self, kind: GroupKind, control: ControlChannel, outgoing: PairGroup, incoming: PairGroup) -> None:
        super().__init__(kind, control.peer)
        self.device = outgoing.device
        self._control = control
        self._outgoing = outgoing
        self._incoming = incoming
        self._outbox = [_Staging(self.device) for _ in range(FRAMES_IN_FLIGHT)]
        self._inbox = ReceiveBuffers(self.device)
        self._sent = 0
        self._received = 0

    def _send(self, header: bytes, tensors: Sequence[torch.Tensor], payload: Payload, deadline: Deadline) -> None:
        staging = self._outbox[self._sent % FRAMES_IN_FLIGHT]
        if staging.work is not None:
            self._outgoing.wait(staging.work, deadline=deadline, check=self._check)
            staging.work = None
        buffer = staging.room(payload.nbytes)
        content: memoryview | None = None
        if 0 < payload.nbytes <= self._outgoing.beside_bytes:
            write_payload(buffer, payload, tensors)
            content = buffer.numpy().data
        # The header goes first: the peer posts a receive of the exact size while the payload is being staged and moves.
        self._control.send(MessageType.FRAME, self._sent, header, payload, content=content, deadline=deadline)
        if payload.nbytes and content is None:
            write_payload(buffer, payload, tensors)
            staging.work = self._outgoing.start_send(buffer, _tag(self._sent))
        self._sent += 1

    def _recv(self, deadline: Deadline) -> Frame:
        message = self._control.receive(deadline)
        if message.type is not MessageType.FRAME or message.sequence != self._received:
            raise LinkError(
                self.peer, f"sent {message.type.name} {message.sequence} where FRAME {self._received} belongs"
            )
        buffer = self._inbox.take(message.payload.nbytes)
        if 0 < message.payload.nbytes <= self._incoming.beside_bytes:
            self._control.receive_content(buffer.numpy().data, deadline)
        elif message.payload.nbytes:
            work = self._incoming.start_recv(buffer, _tag(self._received))
            self._incoming.wait(work, deadline=deadline, check=self._check)
        self._received += 1
        return Frame(message.header, read_payload(buffer, message.payload))

    def _wait(self, deadline: Deadline) -> bool:
        return self._control.wait(deadline)

    def _check(self) -> None:
        self._control.check()

    def _shut(self) -> None:
        self._control.shut()

    def _break(self, error: LinkError) -> None:
        super()._break(error)
        self._abandon()  # now, not at `close`: a transfer that nobody completes would hold the GPU until then

    def _release(self) -> None:
        self._control.close()
        self._abandon()

    def _abandon(self) -> None:
        for staging in self._outbox:
            staging.work = None
        self._outgoing.abandon()
        self._incoming.abandon()


class ProcessGroupListener(Listener):
    """Listens on one TCP address for links of one kind."""

    def __init__(self, kind: GroupKind, *, bind_host: str, secret: bytes, identity: str) -> None:
        device = transfer_device(kind)  # of this thread: the acceptor's threads have a current device of their own
        sock = listen_tcp(bind_host)
        try:
            self.address = LinkAddress(kind, endpoint_of(sock))
            self._acceptor = Acceptor[Link](
                sock,
                secret=secret,
                identity=identity,
                channel=f"link/{kind}",
                establish=lambda sock, peer, deadline: _establish(
                    kind, device, sock, peer, initiator=False, deadline=deadline
                ),
                discard=lambda link: link.close(),
            )
        except BaseException:
            sock.close()
            raise

    def accept(self, *, deadline: Deadline) -> Link | None:
        """See `Listener.accept`."""
        return self._acceptor.accept(deadline=deadline)

    def close(self) -> None:
        """See `Listener.close`."""
        self._acceptor.close()


def dial_process_group(kind: GroupKind, endpoint: str, *, secret: bytes, identity: str, deadline: Deadline) -> Link:
    """Dial a `ProcessGroupListener`; see `factory.dial` for the errors."""
    device = transfer_device(kind)
    sock = dial_tcp(endpoint, deadline=deadline)
    try:
        peer = authenticate(
            sock,
            secret=secret,
            identity=identity,
            channel=f"link/{kind}",
            initiator=True,
            deadline=deadline,
            remote=endpoint,
        )
        return _establish(kind, device, sock, peer, initiator=True, deadline=deadline)
    except BaseException:
        sock.close()
        raise


def _establish(
    kind: GroupKind, device: torch.device, sock: socket.socket, peer: str, *, initiator: bool, deadline: Deadline
) -> Link:
    """Set up both groups over the authenticated `sock`.

    The groups' own connections are not authenticated. So each end sends random bytes through its group, which it has also
    told the peer over `sock`: who receives them is the peer, or this end never hears that the peer is ready. What works now
    works later, too.
    """
    make_peer_loss_visible(sock)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, CONTROL_BUFFER_BYTES)
    control = ControlChannel(sock, peer)
    rendezvous = Rendezvous(control, deadline)
    rank = 0 if initiator else 1
    groups: list[PairGroup] = []
    try:
        for name in ("from-dialler/", "to-dialler/"):
            store = rendezvous.store(name)
            groups.append(create_pair(kind, store, rank, peer, device, host=control.local_host, deadline=deadline))
        outgoing, incoming = groups if initiator else reversed(groups)
        for name, group in zip(("from-dialler/probe", "to-dialler/probe"), groups, strict=True):
            if group is outgoing:
                sent = os.urandom(_PROBE_BYTES)
                rendezvous.set(name, sent)
                probe = torch.frombuffer(bytearray(sent), dtype=torch.uint8).to(device)
                group.wait(group.start_send(probe, 0), deadline=deadline, check=control.check)
            else:
                probe = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=device)
                group.wait(group.start_recv(probe, 0), deadline=deadline, check=control.check)
                if not hmac.compare_digest(bytes(probe.tolist()), rendezvous.get(name)):
                    raise HandshakeError(peer, f"somebody else took its place in the {kind} group")
        rendezvous.finish()
    except BaseException as error:
        for group in groups:
            group.abandon()
        if isinstance(error, LinkError) and rendezvous.error is not None:
            raise rendezvous.error from error
        raise
    return ProcessGroupLink(kind, control, outgoing, incoming)


def _tag(sequence: int) -> int:
    """Tags keep the transfers of a group apart; gloo takes 31 bits."""
    return sequence & 0x7FFFFFFF
