"""Whatever a stranger says, they get a refusal: no identity, no memory, no more of this side's time than the deadline."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moray.actors.deadline import Deadline
from moray.actors.links.handshake import authenticate
from moray.configs.errors import LinkError, PeerDiedError, PeerTimeoutError

SECRET = b"the secret that no stranger knows"
MESSAGE = struct.Struct("!8sHBB32s64s32s32s")
HELLO, CHALLENGE, PROOF, WELCOME, REFUSED = 1, 2, 3, 4, 5

deterministic = settings(max_examples=100, derandomize=True, deadline=None, database=None)


def said(
    step: int, *, version: int = 1, channel: bytes = b"front", name: bytes = b"router-0", mac: bytes = b""
) -> bytes:
    return MESSAGE.pack(b"MORAY-HS", version, step, 0, channel, name, bytes(32), mac)


messages = st.one_of(
    st.binary(max_size=400),
    st.builds(
        MESSAGE.pack,
        st.sampled_from([b"MORAY-HS", b"MORAY-HT"]),
        st.sampled_from([1, 0, 65535]),
        st.integers(0, 255),
        st.integers(0, 255),
        st.sampled_from([b"front", b"link/shm", b"\xff" * 32]),
        st.one_of(st.binary(max_size=64), st.sampled_from([b"router-0", b"a\nb", b"%s%n"])),
        st.binary(max_size=32),
        st.binary(max_size=32),
    ),
)
conversations = st.lists(messages, min_size=1, max_size=3).map(b"".join)


@deterministic
@example(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", False)
@example(said(HELLO), False)
@example(said(HELLO) + said(PROOF, mac=bytes(32)), False)
@example(said(HELLO) + said(HELLO), False)
@example(said(HELLO)[:100], False)
@example(said(HELLO, name=b"\0" * 64), False)
@example(said(CHALLENGE) + said(WELCOME, mac=bytes(32)), True)
@example(said(HELLO) * 100, True)
@given(conversations, st.booleans())
def test_nobody_is_let_in_and_nothing_is_given_away(data: bytes, initiator: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkError):
            authenticate(
                ours, secret=SECRET, identity="h", channel="front", initiator=initiator, deadline=Deadline.after(20)
            )
        ours.shutdown(socket.SHUT_WR)
        answer = b""
        while more := theirs.recv(4096):
            answer += more
    assert len(answer) % MESSAGE.size == 0
    steps = [MESSAGE.unpack_from(answer, at)[2] for at in range(0, len(answer), MESSAGE.size)]
    allowed = [HELLO, PROOF, REFUSED] if initiator else [CHALLENGE, REFUSED]
    assert set(steps) <= set(allowed)
    assert len(set(steps)) == len(steps)
    if not initiator:
        assert all(MESSAGE.unpack_from(answer, at)[7] == bytes(32) for at in range(0, len(answer), MESSAGE.size))


def test_a_handshake_takes_no_memory_that_the_peer_decides_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        data = b"MORAY-HS" + b"\xff" * (1 << 20)

        def flood() -> None:
            with contextlib.suppress(OSError):  # it ends when the other end has closed
                while True:
                    theirs.sendall(data)

        flooding = pool.submit(flood)
        tracemalloc.start()
        with pytest.raises(LinkError):
            authenticate(
                ours, secret=SECRET, identity="h", channel="front", initiator=False, deadline=Deadline.after(20)
            )
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        ours.close()
        flooding.result(20)
    assert peak < 1 << 20


def test_drops_of_bytes_do_not_hold_the_deadline_up() -> None:
    """Each would put off a timeout that is counted from the last one."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        deadline = Deadline.after(0.3)
        accepting = pool.submit(
            authenticate, ours, secret=SECRET, identity="h", channel="front", initiator=False, deadline=deadline
        )
        for byte in said(HELLO)[:-1]:
            theirs.send(bytes([byte]))
            if wait([accepting], timeout=0.02).done:
                break
        assert isinstance(accepting.exception(0), PeerTimeoutError)


@pytest.mark.parametrize("label", [b"initiator", b"acceptor"])
def test_a_proof_of_another_secret_or_place_is_none(label: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as theirs:
        ours, _ = server.accept()
        with ours, ThreadPoolExecutor(1) as pool:
            accepting = pool.submit(
                authenticate,
                ours,
                secret=SECRET,
                identity="h",
                channel="front",
                initiator=False,
                deadline=Deadline.after(20),
            )
            hello = said(HELLO)
            theirs.sendall(hello)
            challenge = theirs.recv(MESSAGE.size, socket.MSG_WAITALL)
            # With the right secret even, but for another address than the one that was dialled.
            mac = hmac.digest(SECRET, b"moray handshake " + label + hello + challenge + b"10.0.0.1 1", hashlib.sha256)
            theirs.sendall(said(PROOF, mac=mac))
            answer = theirs.recv(MESSAGE.size, socket.MSG_WAITALL)
            assert MESSAGE.unpack(answer)[2] == REFUSED
            assert isinstance(accepting.exception(20), LinkError)
            assert not isinstance(accepting.exception(20), PeerDiedError)
