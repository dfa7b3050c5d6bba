from __future__ import annotations

import pytest
import torch

from moray.kernels.permute import sort_by_slot, sort_by_slot_reference


def random_slots(pairs: int, num_slots: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(pairs * 1009 + num_slots)
    return torch.randint(0, num_slots, (pairs,), generator=generator).to(device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("pairs", "num_slots"), [(8, 256), (1, 1), (127, 5), (128, 31), (129, 32), (300, 256), (1500, 384)]
)
def test_equals_a_stable_sort(pairs: int, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
    slots = random_slots(pairs, num_slots, device).to(dtype)
    order, counts = sort_by_slot(slots, num_slots)
    expected_order, expected_counts = sort_by_slot_reference(slots, num_slots)
    assert (order.dtype, counts.dtype) == (torch.int64, torch.int32)
    assert torch.equal(order, expected_order)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("slot", [0, 3, 6])
def test_all_pairs_in_one_slot(slot: int, device: torch.device) -> None:
    order, counts = sort_by_slot(torch.full((1100,), slot, device=device), 7)
    assert order.tolist() == list(range(1100))
    assert counts.tolist() == [1100 if i == slot else 0 for i in range(7)]


def test_no_pairs(device: torch.device) -> None:
    order, counts = sort_by_slot(torch.empty(0, dtype=torch.int64, device=device), 3)
    assert (order.shape, counts.tolist()) == ((0,), [0, 0, 0])


def test_slots_out_of_range_come_last_and_uncounted(device: torch.device) -> None:
    slots = torch.tensor([4, -1, 0, 10**9, 3, 0, -(10**9)], dtype=torch.int32, device=device)
    order, counts = sort_by_slot(slots, 4)
    assert order.tolist() == [2, 5, 4, 0, 1, 3, 6]
    assert counts.tolist() == [2, 0, 0, 1]


def test_the_cpu_path_refuses_slots_out_of_range() -> None:
    for slot in (-1, 4):
        with pytest.raises(ValueError, match=r"expected 0\.\.3"):
            sort_by_slot_reference(torch.tensor([0, slot, 3]), 4)


def test_a_slice_of_a_larger_tensor(device: torch.device) -> None:
    slots = random_slots(80, 9, device).view(40, 2)
    assert torch.equal(sort_by_slot(slots[:, 1], 9)[0], sort_by_slot_reference(slots[:, 1], 9)[0])


def test_too_many_slots_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="3000 slots"):
        sort_by_slot(torch.zeros(1, dtype=torch.int64, device=device), 3000)
