"""What the tests of the native loop ask hosts with packed experts for, and what they should get."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Frame, Link, dial
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.testing import SECRET

SLOTS = ((4, 1, 6), (0, 7))
"""Experts of layers 1 and 2."""

HIDDEN = 192
EPOCH = 3
Tensors = tuple[torch.Tensor, ...]
Reply = tuple[MoeHeader, Tensors]


def connect(host: ExpertHost, router: str = "router-0") -> Any:
    address = host.listen("shm", bind_host="127.0.0.1", secret=SECRET)
    return dial(address, secret=SECRET, identity=router, deadline=patience())


def patience() -> Deadline:
    return Deadline.after(20)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = patience()
    while not condition():
        assert not deadline.passed
        time.sleep(0.005)


def native_frames(host: ExpertHost) -> int:
    return host._one_at_a_time.native_frames


def work(tokens: int = 2, *, seed: int = 0, slots: int = len(SLOTS[0])) -> Tensors:
    """Hidden states, and pairs of every second token with every slot."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    rows = torch.arange(0, tokens, 2, dtype=torch.int32)
    slot = torch.arange(slots, dtype=torch.int32).repeat_interleave(len(rows))
    return hidden_states, torch.stack([rows.repeat(slots), slot])


def header(*, kind: Kind = Kind.WORK, layer: int = 1, epoch: int = EPOCH, sequence: int = 7) -> bytes:
    return MoeHeader(kind, layer, epoch, sequence).pack()


def send(link: Link, tensors: Tensors, head: bytes | None = None) -> None:
    link.send(header() if head is None else head, tensors, deadline=patience())


def receive(link: Link) -> Reply:
    frame = link.recv(deadline=patience())
    return MoeHeader.unpack(frame.header), tuple(t.clone() for t in frame.tensors)


def ask(link: Link, tensors: Tensors, head: bytes | None = None) -> Reply:
    send(link, tensors, head)
    return receive(link)


def expected(host: ExpertHost, tensors: Tensors, head: bytes | None = None) -> Reply:
    """What Python answers."""
    packed, outputs = host.handle(Frame(header() if head is None else head, tensors))
    return MoeHeader.unpack(packed), tuple(outputs)


def assert_same(found: Reply, wanted: Reply) -> None:
    assert found[0] == wanted[0]
    assert [(t.dtype, t.shape) for t in found[1]] == [(t.dtype, t.shape) for t in wanted[1]]
    for one, other in zip(found[1], wanted[1], strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@contextlib.contextmanager
def warm(host: ExpertHost) -> Iterator[Any]:
    """A link whose two ends have arenas for a few tokens: from here on what is ordinary needs no Python."""
    link = connect(host)
    with contextlib.closing(link):
        ask(link, work())
        yield link


def wait_for_links(host: ExpertHost) -> list[Any]:
    wait_until(lambda: len(host._links) == 1)
    return list(host._links)


def type_of_experts() -> Any:
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    return ctypes.CFUNCTYPE(ctypes.c_int, pointer, number, pointer, pointer, number, pointer, number, pointer)
