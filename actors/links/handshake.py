"""Mutual authentication of two ends that share a secret, before a byte of anything else is believed.

    initiator                                           acceptor
    HELLO      channel, identity, nonce        ->
                                               <-       CHALLENGE  channel, identity, nonce
    PROOF      HMAC(secret, both of the above) ->
                                               <-       WELCOME    HMAC(secret, all of the above)

All messages have one fixed size, so there is no length to get wrong; either side may answer REFUSED with a reason
instead. The two proofs carry different labels and cover both nonces and identities: none can be replayed or reflected.
They also cover the acceptor's address, which the initiator dialled: nobody who listens where a process of ours did before
can pass the messages on to another one. This proves who the peer is; it does not encrypt what follows, so links belong on a
private network.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ...configs.errors import ConfigError, HandshakeError, LinkError, PeerDiedError
from ..deadline import Deadline
from .sockets import SocketWaiter, recv_some_into, send_all

PROTOCOL_VERSION: Final = 1
MIN_SECRET_BYTES: Final = 16
_MAGIC: Final = b"MORAY-HS"
_PREFIX = struct.Struct("!8sH")
_MESSAGE = struct.Struct("!8sHBB32s64s32s32s")
_NONCE_BYTES: Final = 32
_IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,63}")
_CHANNEL = re.compile(r"[a-z0-9][a-z0-9/-]{0,31}")


class _Step(IntEnum):
    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5


class _Refusal(IntEnum):
    NONE = 0
    VERSION = 1
    CHANNEL = 2
    IDENTITY = 3
    SECRET = 4
    PROTOCOL = 5


_REFUSAL_TEXT: Final = {
    _Refusal.VERSION: "it speaks another protocol version",
    _Refusal.CHANNEL: "it expects another kind of connection",
    _Refusal.IDENTITY: "it does not accept this side's identity",
    _Refusal.SECRET: "the secrets differ",
    _Refusal.PROTOCOL: "it expected another message",
}


@dataclass(frozen=True, slots=True)
class _Message:
    step: _Step
    refusal: int
    channel: str
    identity: str
    nonce: bytes
    mac: bytes
    raw: bytes


class _RefusedError(Exception):
    """The peer's message is refused, for `reason`."""

    def __init__(self, reason: _Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_secret(secret: bytes) -> None:
    """Raise `ConfigError` if `secret` is too short to be one. Neither it nor a part of it is ever put in a message."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"the cluster secret has {len(secret)} bytes; it needs at least {MIN_SECRET_BYTES} random ones "
            "(for example: openssl rand -hex 32)"
        )


def check_identity(identity: str) -> None:
    """Raise `ConfigError` unless `identity` is 1 to 64 letters, digits and `._:@/-`: safe in every log."""
    if not _IDENTITY.fullmatch(identity):
        raise ConfigError(f"{identity!r} cannot name an end of a link: use 1 to 64 letters, digits and ._:@/-")


def authenticate(
    sock: socket.socket,
    *,
    secret: bytes,
    identity: str,
    channel: str,
    initiator: bool,
    deadline: Deadline,
    remote: str = "unknown peer",
) -> str:
    """Prove to the peer that this side knows `secret`, and have it do the same. Works on stream and seqpacket sockets.

    Args:
        sock: a connected socket. It is left in the blocking mode it had; on an error the caller closes it.
        secret: at least `MIN_SECRET_BYTES` bytes, the same on both ends.
        identity: this end's name, e.g. `router-0`.
        channel: what the connection is for, e.g. `link/shm` or `front`; both ends must say the same.
        initiator: True on the end that dialled. Exactly one of the two is the initiator.
        remote: what to call the peer in errors until it has given its identity.

    Returns:
        The peer's identity.

    Raises:
        HandshakeError: the peer is not ours: another secret, version, channel or no Moray process at all.
        PeerDiedError: the peer hung up.
        PeerTimeoutError: the peer did not answer before the deadline.
        ConfigError: secret or identity cannot be used.
    """
    check_secret(secret)
    check_identity(identity)
    assert _CHANNEL.fullmatch(channel), channel
    timeout = sock.gettimeout()
    sock.setblocking(False)
    try:
        talk = _Talk(sock, secret, identity, channel, deadline, remote)
        return talk.initiate() if initiator else talk.accept()
    finally:
        sock.settimeout(timeout)


async def authenticate_async(
    sock: socket.socket,
    *,
    secret: bytes,
    identity: str,
    channel: str,
    initiator: bool,
    deadline: Deadline,
    remote: str = "unknown peer",
) -> str:
    """`authenticate` in a worker thread, for event loops; afterwards `sock` is non-blocking, as asyncio wants it.

    Hand the socket on with `asyncio.open_connection(sock=sock)`. Cancelling leaves the worker to its deadline.
    """
    peer = await asyncio.to_thread(
        authenticate,
        sock,
        secret=secret,
        identity=identity,
        channel=channel,
        initiator=initiator,
        deadline=deadline,
        remote=remote,
    )
    sock.setblocking(False)
    return peer


class _Talk:
    """One handshake in progress."""

    def __init__(
        self, sock: socket.socket, secret: bytes, identity: str, channel: str, deadline: Deadline, remote: str
    ) -> None:
        self._sock = sock
        self._waiter = SocketWaiter(sock)
        self._secret = secret
        self._identity = identity
        self._channel = channel
        self._deadline = deadline
        self._remote = remote
        self._place = b""  # where the acceptor listens, as this end sees it

    def initiate(self) -> str:
        self._place = _place(self._sock, self._remote, dialled=True)
        hello = self._send(_Step.HELLO, nonce=os.urandom(_NONCE_BYTES))
        try:
            challenge = self._receive(_Step.CHALLENGE)
            self._check_greeting(challenge)
            proof = self._send(_Step.PROOF, mac=self._mac(b"initiator", hello, challenge.raw))
            welcome = self._receive(_Step.WELCOME)
            expected = self._mac(b"acceptor", hello, challenge.raw, proof)
            if not hmac.compare_digest(welcome.mac, expected):
                raise _RefusedError(_Refusal.SECRET, "it does not know the secret")
        except _RefusedError as error:
            self._refuse(error.reason)
            raise HandshakeError(self._remote, f"handshake failed: {error}") from None
        return challenge.identity

    def accept(self) -> str:
        self._place = _place(self._sock, self._remote, dialled=False)
        try:
            hello = self._receive(_Step.HELLO)
            self._check_greeting(hello)
            challenge = self._send(_Step.CHALLENGE, nonce=os.urandom(_NONCE_BYTES))
            proof = self._receive(_Step.PROOF)
            if not hmac.compare_digest(proof.mac, self._mac(b"initiator", hello.raw, challenge)):
                raise _RefusedError(_Refusal.SECRET, "it does not know the secret")
            self._send(_Step.WELCOME, mac=self._mac(b"acceptor", hello.raw, challenge, proof.raw))
        except _RefusedError as error:
            self._refuse(error.reason)
            raise HandshakeError(self._remote, f"handshake failed: {error}") from None
        return hello.identity

    def _check_greeting(self, message: _Message) -> None:
        if message.channel != self._channel:
            raise _RefusedError(
                _Refusal.CHANNEL, f"it wants a connection of kind {message.channel!r}, this is {self._channel!r}"
            )
        if not _IDENTITY.fullmatch(message.identity):
            raise _RefusedError(_Refusal.IDENTITY, f"it calls itself {message.identity!r}")
        self._remote = f"{message.identity} ({self._remote})" if self._remote else message.identity

    def _mac(self, label: bytes, *transcript: bytes) -> bytes:
        # The messages have a fixed size, so that what is at the end cannot be taken for a part of them.
        said = b"moray handshake " + label + b"".join(transcript) + self._place
        return hmac.digest(self._secret, said, hashlib.sha256)

    def _send(self, step: _Step, *, nonce: bytes = b"", mac: bytes = b"", refusal: _Refusal = _Refusal.NONE) -> bytes:
        message = _MESSAGE.pack(
            _MAGIC,
            PROTOCOL_VERSION,
            step,
            refusal,
            self._channel.encode(),
            self._identity.encode(),
            nonce,
            mac,
        )
        send_all(self._sock, self._waiter, message, deadline=self._deadline, peer=self._remote)
        return message

    def _refuse(self, reason: _Refusal) -> None:
        with contextlib.suppress(LinkError):  # a courtesy to the peer's log; the handshake has failed either way
            self._send(_Step.REFUSED, refusal=reason)

    def _receive(self, expected: _Step) -> _Message:
        message = self._decode(self._read())
        if message.step == _Step.REFUSED:
            text = _REFUSAL_TEXT.get(_Refusal(message.refusal)) if message.refusal in set(_Refusal) else None
            raise HandshakeError(self._remote, f"refused this side: {text or 'it gave no reason'}")
        if message.step != expected:
            raise _RefusedError(_Refusal.PROTOCOL, f"it sent {message.step.name} where {expected.name} belongs")
        return message

    def _read(self) -> bytes:
        data = bytearray(_MESSAGE.size)
        size = 0
        while size < _MESSAGE.size:
            rest = memoryview(data)[size:]
            size += recv_some_into(self._sock, self._waiter, rest, deadline=self._deadline, peer=self._remote)
            # Checked as soon as it is there: another protocol is refused at once, not at the deadline.
            if not data.startswith(_MAGIC[:size]):
                raise _RefusedError(_Refusal.PROTOCOL, "it does not speak Moray's handshake")
            if size >= _PREFIX.size:
                _, version = _PREFIX.unpack_from(data)
                if version != PROTOCOL_VERSION:
                    raise _RefusedError(
                        _Refusal.VERSION, f"it speaks protocol version {version}, this side {PROTOCOL_VERSION}"
                    )
        return bytes(data)

    @staticmethod
    def _decode(raw: bytes) -> _Message:
        _, _, step, refusal, channel, identity, nonce, mac = _MESSAGE.unpack(raw)
        if step not in set(_Step):
            raise _RefusedError(_Refusal.PROTOCOL, f"it sent a message of unknown type {step}")
        return _Message(_Step(step), refusal, _text(channel), _text(identity), nonce, mac, raw)


def _place(sock: socket.socket, peer: str, *, dialled: bool) -> bytes:
    """The acceptor's address, the same bytes at both ends; empty for sockets without one, such as a pair's."""
    try:
        address = sock.getpeername() if dialled else sock.getsockname()
    except OSError as error:
        raise PeerDiedError(peer, f"connection lost ({error.strerror})") from error
    if isinstance(address, bytes):
        return address
    if isinstance(address, str):
        return address.encode()
    host, port = address[:2]
    # A link-local address has the interface's own name on each machine behind it.
    return f"{host.partition('%')[0]} {port}".encode()


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", errors="backslashreplace")
