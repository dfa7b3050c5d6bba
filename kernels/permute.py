"""Bringing (token, expert) pairs into the order of the experts' slots: a stable counting sort on the device.

Counting sort (Seward, 1954; Knuth, The Art of Computer Programming, volume 3, 5.2, algorithm D): a pair's place is the number
of pairs in lower slots, plus those of its own slot in front of it. Each program places one block of pairs and counts for
itself what is in front of them, reading all slots; one launch, no atomics, nothing left to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .cases import Case, Work
from .launch import Config, kernel, launch, uses_triton

if TYPE_CHECKING:
    import triton.language as tl

_MAX_SLOTS = 2047


def sort_by_slot(slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by their slot; pairs of one slot stay in order.

    Args:
        slots: [P] integers, the slot of each pair.
        num_slots: slots are 0 .. num_slots - 1; at most 2047 on a GPU.

    Returns:
        order: [P] int64, the pairs in ascending order of their slots, i.e. `slots[order]` ascends.
        counts: [num_slots] int32, the pairs of each slot.

    Raises:
        ValueError: a slot is out of range. On a GPU nobody looks, since that would wait for the device: such pairs come
            last, in order, and are not counted.
    """
    if not uses_triton(slots):
        return sort_by_slot_reference(slots, num_slots)
    if num_slots > _MAX_SLOTS:
        raise ValueError(f"{num_slots} slots; the sorting kernel takes at most {_MAX_SLOTS}")
    pairs = slots.shape[0]
    order = torch.empty(pairs, dtype=torch.int64, device=slots.device)
    counts = torch.empty(num_slots, dtype=torch.int32, device=slots.device)
    config = _config(num_slots)
    launch(
        _sort_by_slot,
        (max(1, -(-pairs // config.tiles["BLOCK"])),),
        slots.contiguous(),
        order,
        counts,
        pairs,
        num_slots,
        config=config,
    )
    return order, counts


def sort_by_slot_reference(slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`sort_by_slot` in plain torch."""
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        raise ValueError(f"slots {int(slots.min())}..{int(slots.max())}, expected 0..{num_slots - 1}")
    counts = torch.bincount(slots, minlength=num_slots).to(torch.int32)
    return slots.sort(stable=True).indices, counts


@kernel
def _sort_by_slot(
    slots_ptr: tl.tensor,
    order_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    pairs: tl.int32,
    num_slots: tl.int32,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    start = tl.program_id(0) * BLOCK
    slot = tl.arange(0, SLOTS)
    counts, before = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.int32)
    for chunk in range(0, pairs, CHUNK):
        pair = chunk + tl.arange(0, CHUNK)
        found = _slots_or_last(slots_ptr, pair, pairs, num_slots)
        in_chunk = tl.histogram(found, SLOTS, mask=pair < pairs)
        counts += in_chunk
        before += tl.where(chunk + CHUNK <= start, in_chunk, 0)
    pair = start // CHUNK * CHUNK + tl.arange(0, CHUNK)
    before += tl.histogram(_slots_or_last(slots_ptr, pair, pairs, num_slots), SLOTS, mask=pair < start)
    if start == 0:
        tl.store(counts_ptr + slot, counts, mask=slot < num_slots)
    base = tl.cumsum(counts, axis=0) - counts + before

    pair = start + tl.arange(0, BLOCK)
    own = _slots_or_last(slots_ptr, pair, pairs, num_slots)
    # The same pairs once more, along the other axis of a comparison of each with each.
    other_pair = start + tl.arange(0, BLOCK)
    other = _slots_or_last(slots_ptr, other_pair, pairs, num_slots)
    in_front = (other[None, :] == own[:, None]) & (other_pair[None, :] < pair[:, None])
    place = tl.gather(base, own, axis=0) + tl.sum(in_front.to(tl.int32), axis=1)
    tl.store(order_ptr + place, pair.to(tl.int64), mask=pair < pairs)


@kernel
def _slots_or_last(slots_ptr: tl.tensor, pair: tl.tensor, pairs: tl.int32, num_slots: tl.int32) -> tl.tensor:
    """The slots of pairs; `num_slots` for those out of range and past the end."""
    slot = tl.load(slots_ptr + pair, mask=pair < pairs, other=-1)
    return tl.where((slot >= 0) & (slot < num_slots), slot, num_slots).to(tl.int32)


def _config(num_slots: int) -> Config:
    slots = max(32, 1 << num_slots.bit_length())  # one more than the slots, for pairs out of range
    return Config(
        num_warps=4 if slots <= 512 else 8,
        num_stages=1,
        tiles={"SLOTS": slots, "BLOCK": 128, "CHUNK": 512},
        source="128 x 128 comparisons are 128 a thread; decode's 8 to 2048 pairs are counted in one or two steps",
    )


def cases(architecture: int) -> Iterator[Case]:
    """DeepSeek-R1's pairs by expert, 8 a token."""
    config = _config(256)

    def work(tokens: int) -> Work:
        pairs = 8 * tokens
        blocks = -(-pairs // config.tiles["BLOCK"])
        return Work(
            bytes=pairs * 16 + 256 * 4, flops=0.0, programs=blocks, iterations=-(-pairs // config.tiles["CHUNK"])
        )

    yield Case(
        name="sort_by_slot 256 experts",
        kernel=_sort_by_slot,
        architecture=architecture,
        arguments={
            "slots_ptr": "*i64",
            "order_ptr": "*i64",
            "counts_ptr": "*i32",
            "pairs": "i32",
            "num_slots": "i32",
        },
        constants={},
        config=config,
        unaligned=frozenset({"pairs"}),
        max_loop_instructions=650,
        work=work,
    )
