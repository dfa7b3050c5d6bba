"""The link between two processes of one machine: payload through shared memory, everything else through a socket.

Each frame is one write into the sender's arena and one packet on an abstract-namespace Unix socket, which is header,
doorbell and liveness at once: a peer that dies closes it. A sender reuses a slot only after the receiver has released
it, which costs no system call unless the sender is waiting for it. See `shm_memory` for who owns which memory.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import torch

from ...configs.errors import ConfigError, HandshakeError, LinkError, PeerDiedError, PeerTimeoutError
from ..deadline import Deadline
from ..native_library import LinkState, Outcome
from .acceptor import Acceptor
from .base import Frame, Link, LinkAddress, Listener
from .handshake import authenticate
from .lifecycle import GuardedLink
from .machine import machine_identity
from .shm_memory import SLOTS, Arena, ControlPage, frame_and_slot, place_of, slot_bytes_for
from .sockets import SocketWaiter, Spin, shut_down
from .wire import (
    MAX_MESSAGE_BYTES,
    Message,
    MessageType,
    Payload,
    decode,
    encode,
    read_payload,
    write_payload,
)

CHANNEL: Final = "link/shm"
_SLOT_BYTES = struct.Struct("<Q")
_ANCILLARY: Final = socket.CMSG_SPACE(struct.calcsize("i"))
_TRUNCATED: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_RECHECK_S: Final = 0.01
"""A sender that waits for a slot is told of it by a packet; looking again this often covers the one case in which the
receiver read the `waiting` flag in the very moment in which it was set."""


class ShmLink(GuardedLink):
    """One end of a link within a machine. Made by `dial_shm` and `ShmListener.accept`."""

    def __init__(self, sock: socket.socket, peer: str, page: ControlPage) -> None:
        super().__init__("shm", peer)
        self._sock = sock
        self._packets = _PacketSocket(sock, peer)
        self._page: ControlPage | None = page
        self._outgoing: Arena | None = None
        self._incoming: Arena | None = None
        self._pending: deque[tuple[Message, Arena | None]] = deque()
        # The counters of frames are this structure's alone, so that native code can go on from them at any time.
        self._state = LinkState(fd=sock.fileno(), spin_next_rest=1)
        self._state.released_here, self._state.peer_waits, self._state.released_by_peer = page.addresses

    def lend(self) -> LinkState | None:
        """See `Link.lend`."""
        self._begin()
        if self._pending:
            self._end()
            return None
        self._prepared = None
        return self._state

    def take_back(self) -> None:
        """See `Link.take_back`."""
        self._end()

    def operate(self, native: Callable[[LinkState], Outcome], *, send_timeout_s: float) -> Outcome:
        """See `Link.operate`."""
        state = self.lend()
        if state is None:
            return Outcome.LEFT
        try:
            outcome = native(state)
            if outcome is Outcome.FAILED:
                raise OSError(state.error, os.strerror(state.error))
            if outcome is Outcome.UNSENT:
                packet = bytes(state.packet[: state.packet_bytes])
                self._packets.send(packet, deadline=Deadline.after(send_timeout_s))
                state.sent += 1
                return Outcome.QUIET
            return outcome
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.take_back()

    def _prepare(self, payload: Payload, deadline: Deadline) -> tuple[torch.Tensor, ...] | None:
        arena = self._room_for(payload, deadline)
        return None if arena is None else arena.tensors(self._slot, payload)

    def _send(self, header: bytes, tensors: Sequence[torch.Tensor], payload: Payload, deadline: Deadline) -> None:
        if tensors is not self._prepared:
            arena = self._room_for(payload, deadline)
            if arena is not None:
                write_payload(arena.slot(self._slot), payload, tensors)
        place = place_of(self._state.sent, self._slot)
        self._packets.send(encode(MessageType.FRAME, place, header, payload), deadline=deadline)
        self._state.sent += 1

    @property
    def _slot(self) -> int:
        """Of the next frame, once there is room for it."""
        return self._state.slots[self._state.sent % SLOTS]

    def _room_for(self, payload: Payload, deadline: Deadline) -> Arena | None:
        """The arena whose slot of the next frame is free and takes the payload; None where it has no bytes."""
        self._wait_for_slot(deadline)
        if payload.nbytes and (self._outgoing is None or self._outgoing.slot_bytes < payload.nbytes):
            self._send_through(self._offer_arena(slot_bytes_for(payload.nbytes), deadline))
        return self._outgoing if payload.nbytes else None

    def _recv(self, deadline: Deadline) -> Frame:
        self._release_received()
        if not self._wait(deadline):
            raise PeerTimeoutError(self.peer, "sent nothing before the deadline")
        message, arena = self._pending.popleft()
        self._state.received += 1
        if arena is None:
            return Frame(message.header, read_payload(torch.empty(0, dtype=torch.uint8), message.payload))
        return Frame(message.header, arena.tensors(frame_and_slot(message.sequence)[1], message.payload))

    def _wait(self, deadline: Deadline) -> bool:
        while not self._pending:
            # Looked for before it is waited for: that is one system call less where it is there already.
            if not self._read_packet() and (deadline.passed or not self._packets.wait(deadline)):
                return False
        return True

    def _check(self) -> None:
        if self._packets.hung_up():
            raise PeerDiedError(self.peer, "closed the connection")

    def _shut(self) -> None:
        shut_down(self._sock)

    def _release(self) -> None:
        self._sock.close()
        self._page = self._outgoing = self._incoming = None
        self._pending.clear()

    def _wait_for_slot(self, deadline: Deadline) -> None:
        if self._take_free_slot():
            return
        page = self._control_page()
        page.wait_for_slot(True)
        try:
            while not self._take_free_slot():
                if deadline.passed:
                    raise PeerTimeoutError(self.peer, f"has left {SLOTS} frames unread until the deadline")
                if self._packets.wait(Deadline(min(deadline.at, Deadline.after(_RECHECK_S).at))):
                    self._read_packet()
        finally:
            page.wait_for_slot(False)

    def _take_free_slot(self) -> bool:
        """Put the next frame into the first slot that is free; False if none is."""
        state = self._state
        unreleased = state.sent - self._control_page().released_by_peer
        if not 0 <= unreleased <= SLOTS:
            raise LinkError(self.peer, f"corrupted the control page: {unreleased} frames unreleased")
        used = {state.slots[frame % SLOTS] for frame in range(state.sent - unreleased, state.sent)}
        free = next((slot for slot in range(SLOTS) if slot not in used), None)
        if free is not None:
            state.slots[state.sent % SLOTS] = free
        return free is not None

    def _release_received(self) -> None:
        """By the contract of `Frame`, the caller is done with the previous one."""
        page = self._control_page()
        page.release(self._state.received)
        if page.peer_waits:
            # If its queue is full it is about to read, and will look at the counter by itself.
            self._packets.send_if_room(encode(MessageType.SPACE, self._state.received))

    def _send_through(self, arena: Arena | None) -> None:
        """Put the frames that follow into this arena; None: into one that is made for the next of them."""
        self._outgoing = arena
        state = self._state
        state.outgoing, state.outgoing_slot_bytes = (arena.address, arena.slot_bytes) if arena else (None, 0)

    def _offer_arena(self, slot_bytes: int, deadline: Deadline) -> Arena:
        arena, fd = Arena.create(slot_bytes)
        try:
            packet = encode(MessageType.ARENA, self._state.sent, _SLOT_BYTES.pack(slot_bytes))
            self._packets.send(packet, deadline=deadline, fd=fd)
        finally:
            os.close(fd)
        return arena

    def _read_packet(self) -> bool:
        """Take one packet off the socket and act on it; whether there was one."""
        received = self._packets.receive()
        if received is None:
            return False
        message, fd = received
        if message.type is MessageType.ARENA and fd is not None and len(message.header) == _SLOT_BYTES.size:
            attached = Arena.attach(fd, _SLOT_BYTES.unpack(message.header)[0], self.peer)
            self._state.incoming, self._state.incoming_slot_bytes = attached.address, attached.slot_bytes
            self._incoming = attached
            return True
        if fd is not None:
            os.close(fd)
            raise LinkError(self.peer, f"sent a file descriptor with a {message.type.name} message")
        if message.type is MessageType.SPACE:
            return True  # the waiting sender looks at the counter
        if message.type is not MessageType.FRAME:
            raise LinkError(self.peer, f"sent a {message.type.name} message on an established link")
        frame, _ = frame_and_slot(message.sequence)
        if frame != self._state.arrived or self._state.arrived - self._state.received >= SLOTS:
            raise LinkError(self.peer, f"sent frame {frame} where {self._state.arrived} belongs")
        arena = None
        if message.payload.nbytes:
            arena = self._incoming
            if arena is None or arena.slot_bytes < message.payload.nbytes:
                raise LinkError(self.peer, f"sent {message.payload.nbytes} bytes without an arena that holds them")
        self._state.arrived += 1
        self._pending.append((message, arena))
        return True

    def _control_page(self) -> ControlPage:
        assert self._page is not None, "operations end before resources are released"
        return self._page


class _PacketSocket:
    """Control messages, each one packet, with at most one file descriptor beside it."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._peer = peer
        self._waiter = SocketWaiter(sock)
        self._spin = Spin()

    def wait(self, deadline: Deadline) -> bool:
        """Whether a packet, or the end of the connection, arrived before the deadline."""
        return self._spin.wait(self._waiter.readable_now) or self._waiter.readable(deadline)

    def hung_up(self) -> bool:
        return self._waiter.hung_up()

    def send(self, packet: bytes, *, deadline: Deadline, fd: int | None = None) -> None:
        ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        while True:
            try:
                self._sock.sendmsg([packet], ancillary)
                return
            except BlockingIOError:
                if not self._waiter.writable(deadline):
                    raise PeerTimeoutError(self._peer, "left its packets unread until the deadline") from None

    def send_if_room(self, packet: bytes) -> None:
        with contextlib.suppress(BlockingIOError):
            self._sock.send(packet)

    def receive(self) -> tuple[Message, int | None] | None:
        """The next packet and its file descriptor, for the caller to close; None if there is none yet."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(MAX_MESSAGE_BYTES, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        try:
            if not data:
                raise PeerDiedError(self._peer, "closed the connection")
            if flags & _TRUNCATED or len(fds) > 1:
                raise LinkError(self._peer, "sent a packet larger than any of ours")
            message = decode(data, self._peer)
        except LinkError:
            for fd in fds:
                os.close(fd)
            raise
        return message, fds[0] if fds else None


class ShmListener(Listener):
    """Listens on an abstract-namespace Unix socket: it has no file, and goes away with the process."""

    def __init__(self, *, secret: bytes, identity: str) -> None:
        name = f"moray-{secrets.token_hex(8)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.bind(f"\0{name}")
            sock.listen(128)
            self._acceptor = Acceptor[Link](
                sock,
                secret=secret,
                identity=identity,
                channel=CHANNEL,
                establish=_establish,
                discard=lambda link: link.close(),
            )
        except BaseException:
            sock.close()
            raise
        self.address = LinkAddress("shm", name, machine_identity())

    def accept(self, *, deadline: Deadline) -> Link | None:
        """See `Listener.accept`."""
        return self._acceptor.accept(deadline=deadline)

    def close(self) -> None:
        """See `Listener.close`."""
        self._acceptor.close()


def dial_shm(address: LinkAddress, *, secret: bytes, identity: str, deadline: Deadline) -> Link:
    """Dial a `ShmListener` of this machine; see `factory.dial` for the errors."""
    here = machine_identity()
    if address.machine != here:
        raise ConfigError(f"{address.endpoint} is on machine {address.machine}, this is {here}: use gloo or nccl")
    sock = _connect(address.endpoint, deadline)
    try:
        peer = authenticate(
            sock,
            secret=secret,
            identity=identity,
            channel=CHANNEL,
            initiator=True,
            deadline=deadline,
            remote=address.endpoint,
        )
        page, fd = ControlPage.create()
        try:
            _PacketSocket(sock, peer).send(encode(MessageType.PAGE, 0), deadline=deadline, fd=fd)
        except OSError as error:
            raise PeerDiedError(peer, f"connection lost ({error.strerror})") from error
        finally:
            os.close(fd)
        return ShmLink(sock, peer, page)
    except BaseException:
        sock.close()
        raise


def _connect(name: str, deadline: Deadline) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # A non-blocking connect does not wait for a full backlog on Unix sockets; a send timeout does what is meant.
        microseconds = max(1, int(deadline.remaining() * 1e6))
        timeval = struct.pack("@ll", microseconds // 1_000_000, microseconds % 1_000_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        sock.connect(f"\0{name}")
    except BlockingIOError:
        sock.close()
        raise PeerTimeoutError(name, "did not accept the connection before the deadline") from None
    except OSError as error:
        sock.close()
        raise PeerDiedError(name, f"cannot be reached ({error.strerror})") from error
    return sock


def _establish(sock: socket.socket, peer: str, deadline: Deadline) -> Link:
    packets = _PacketSocket(sock, peer)
    if not packets.wait(deadline):
        raise PeerTimeoutError(peer, "did not send its control page in time")
    try:
        received = packets.receive()
    except OSError as error:
        raise PeerDiedError(peer, f"connection lost ({error.strerror})") from error
    if received is None or received[1] is None:
        raise HandshakeError(peer, "did not send its control page")
    message, fd = received
    assert fd is not None
    if message.type is not MessageType.PAGE:
        os.close(fd)
        raise HandshakeError(peer, f"sent {message.type.name} where its control page belongs")
    return ShmLink(sock, peer, ControlPage.attach(fd, peer))
