"""Who owns received memory: reused when nobody holds it, left alone while anybody does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.links import Link, LinkKind
from moray.actors.links.receive_buffers import ReceiveBuffers, size_class

Connect = Callable[[LinkKind], tuple[Link, Link]]

CPU = torch.device("cpu")
SMALLEST = 64 * 1024


def soon() -> Deadline:
    return Deadline.after(20)


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [(0, SMALLEST), (1, SMALLEST), (SMALLEST, SMALLEST), (SMALLEST + 1, 2 * SMALLEST), (1 << 20, 1 << 20)],
)
def test_size_classes(nbytes: int, size: int) -> None:
    assert size_class(nbytes) == size


@pytest.mark.parametrize("second", [100_000, 70_000, 3])
def test_a_buffer_let_go_of_is_taken_again(second: int) -> None:
    buffers = ReceiveBuffers(CPU)
    first = buffers.take(100_000)
    assert (first.shape, first.dtype) == ((100_000,), torch.uint8)
    address = first.data_ptr()
    del first
    again = buffers.take(second)
    assert (again.data_ptr(), again.shape) == (address, (second,))


HOLDERS: list[Callable[[torch.Tensor], object]] = [
    lambda tensor: tensor,
    lambda tensor: tensor[3:],
    lambda tensor: tensor.narrow(0, 64, 64).view(torch.float32).view(4, 4).t(),
    lambda tensor: tensor.numpy()[5:],
    lambda tensor: tensor.numpy().data,
    lambda tensor: (tensor.detach(),),
    lambda tensor: np.from_dlpack(tensor),
]


@pytest.mark.parametrize("hold", HOLDERS, ids=["itself", "slice", "cast", "array", "memoryview", "detached", "dlpack"])
def test_a_buffer_anybody_holds_is_not(hold: Callable[[torch.Tensor], object]) -> None:
    buffers = ReceiveBuffers(CPU)
    held = hold(buffers.take(1000))
    (taken,) = (buffer.memory.data_ptr() for buffer in buffers._buffers)
    for _ in range(5):
        assert buffers.take(1000).data_ptr() != taken
    del held
    other = buffers.take(1000)
    assert taken in (other.data_ptr(), buffers.take(1000).data_ptr())


def test_the_smallest_that_is_large_enough_is_taken() -> None:
    buffers = ReceiveBuffers(CPU)
    large, small = buffers.take(1 << 20), buffers.take(10)
    addresses = large.data_ptr(), small.data_ptr()
    del large, small
    assert buffers.take(1 << 16).data_ptr() == addresses[1]
    assert buffers.take(1 << 17).data_ptr() == addresses[0]


def test_a_caller_that_keeps_everything_gets_new_memory_and_the_pool_forgets_the_old() -> None:
    buffers = ReceiveBuffers(CPU)
    kept = [buffers.take(1000).fill_(number) for number in range(10)]
    assert len({tensor.data_ptr() for tensor in kept}) == 10
    assert all(bool(tensor.eq(number).all()) for number, tensor in enumerate(kept))
    assert len(buffers._buffers) == 3
    assert {buffer.nbytes for buffer in buffers._buffers} == {SMALLEST}


def test_growing_frames_do_not_leave_small_buffers_behind() -> None:
    buffers = ReceiveBuffers(CPU)
    for power in range(16, 24):
        buffers.take(1 << power)
    assert sorted(buffer.nbytes for buffer in buffers._buffers) == [1 << 21, 1 << 22, 1 << 23]


def test_buffers_taken_in_inference_mode_can_be_written_outside() -> None:
    buffers = ReceiveBuffers(CPU)
    with torch.inference_mode():
        address = buffers.take(10).data_ptr()
    again = buffers.take(10)
    again += 1
    assert again.data_ptr() == address


LARGE, SMALL = (1 << 18,), (16,)
"""Shapes of float32 whose frames go through gloo, and through the control socket."""


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_a_link_allocates_nothing_for_frames_like_those_before(
    connect: Connect, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = connect("gloo")

    def exchange(number: int, size: int) -> int:
        here.send(b"", [torch.full(shape, float(number))[:size]], deadline=soon())
        (tensor,) = there.recv(deadline=soon()).tensors
        assert tensor.eq(number).all()
        return tensor.data_ptr()

    address = exchange(0, shape[0])
    exchange(0, shape[0])  # the sender has a buffer for each of two frames in flight
    allocations: list[object] = []
    monkeypatch.setattr("moray.actors.links.receive_buffers.allocate_bytes", lambda *size: allocations.append(size))
    monkeypatch.setattr("moray.actors.links.process_group.allocate_bytes", lambda *size: allocations.append(size))
    there_again = [exchange(number, shape[0] // (1 + number % 2)) for number in range(1, 6)]
    assert there_again == [address] * 5
    assert allocations == []


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_frames_a_caller_holds_stay_as_they_are(connect: Connect, shape: tuple[int, ...]) -> None:
    here, there = connect("gloo")
    held = []
    for number in range(6):
        here.send(b"", [torch.full(shape, float(number))], deadline=soon())
        held.append(there.recv(deadline=soon()).tensors[0][1:])
    assert all(bool(tensor.eq(number).all()) for number, tensor in enumerate(held))


def test_a_loop_that_names_its_frame_uses_two_buffers(connect: Connect) -> None:
    """The frame of one turn is let go of only when the next one has arrived."""
    here, there = connect("gloo")
    addresses = set()
    for _ in range(6):
        here.send(b"", [torch.ones(LARGE)], deadline=soon())
        frame = there.recv(deadline=soon())
        addresses.add(frame.tensors[0].data_ptr())
    assert len(addresses) == 2
