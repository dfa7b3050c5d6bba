"""Control messages over TCP: the socket beside a process group, for headers and to see whether the peer lives."""

from __future__ import annotations

import socket

from ...configs.errors import PeerDiedError
from ..deadline import Deadline
from .sockets import SocketWaiter, recv_exactly, recv_into, send_all, shut_down
from .wire import EMPTY_PAYLOAD, HEAD_BYTES, Message, MessageType, Payload, decode_body, decode_head, encode


class ControlChannel:
    """One end of an authenticated connection, in messages."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        self.peer = peer
        self._sock = sock
        self._waiter = SocketWaiter(sock)

    @property
    def local_host(self) -> str:
        """The address under which the peer reaches this end."""
        host: str = self._sock.getsockname()[0]
        return host

    def send(
        self,
        type: MessageType,
        sequence: int,
        header: bytes = b"",
        payload: Payload = EMPTY_PAYLOAD,
        *,
        content: memoryview | None = None,
        deadline: Deadline,
    ) -> None:
        """Send one message, and the payload's `content` behind it if it travels here; raises as `send_all`."""
        data = encode(type, sequence, header, payload)
        if content is not None:
            data += content
        send_all(self._sock, self._waiter, data, deadline=deadline, peer=self.peer)

    def receive(self, deadline: Deadline) -> Message:
        """The next message; raises as `recv_exactly`, and `LinkError` if it is malformed."""
        raw = recv_exactly(self._sock, self._waiter, HEAD_BYTES, deadline=deadline, peer=self.peer)
        head = decode_head(raw, self.peer)
        body = recv_exactly(self._sock, self._waiter, head.body_bytes, deadline=deadline, peer=self.peer)
        return decode_body(head, body, self.peer)

    def receive_content(self, buffer: memoryview, deadline: Deadline) -> None:
        """Fill `buffer` with the content behind the message that was just received; raises as `recv_into`."""
        recv_into(self._sock, self._waiter, buffer, deadline=deadline, peer=self.peer)

    def wait(self, deadline: Deadline) -> bool:
        """Whether a message began to arrive before the deadline.

        Raises:
            PeerDiedError: the connection ended instead.
        """
        if not self._waiter.readable(deadline):
            return False
        if not self._sock.recv(1, socket.MSG_PEEK):
            raise PeerDiedError(self.peer, "closed the connection")
        return True

    def check(self) -> None:
        """Raise `PeerDiedError` if the connection has ended. Never blocks."""
        if self._waiter.hung_up():
            raise PeerDiedError(self.peer, "closed the connection")

    def shut(self) -> None:
        """End the connection and wake a wait on it. Any thread, any number of times."""
        shut_down(self._sock)

    def close(self) -> None:
        """Close the socket; only when nothing waits on it."""
        self._sock.close()
