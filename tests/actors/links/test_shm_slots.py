"""Where frames lie in the memory of a shm link."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moray.actors.deadline import Deadline
from moray.actors.links import Link, LinkKind
from moray.actors.links.shm import ShmLink
from moray.actors.links.shm_memory import SLOTS

Connect = Callable[[LinkKind], tuple[Link, Link]]


def test_a_slot_is_used_again_once_its_frame_is_done_with(connect: Connect) -> None:
    """The first that is free, not all in turn; never one that the receiver may still be reading."""
    here, there = connect("shm")
    assert isinstance(here, ShmLink)
    state = here._state
    slots: list[int] = []

    def send(number: int) -> None:
        here.send(b"", [torch.full((1000,), number)], deadline=Deadline.after(20))
        slots.append(state.slots[number % SLOTS])

    def receive() -> torch.Tensor:
        return there.recv(deadline=Deadline.after(20)).tensors[0]

    send(0)
    send(1)
    for number in range(2, 8):
        received = receive()
        send(number)
        assert received.eq(number - 2).all(), "though one more was sent"
    assert slots == [0, 1, 2, 0, 1, 2, 0, 1], "one that is read, two on their way"
    assert [int(receive()[0]) for _ in range(2)] == [6, 7]
    for number in range(8, 12):
        send(number)
        assert receive().eq(number).all()
    assert slots[8:] == [0, 1, 0, 1], "one that is read, one on its way"
