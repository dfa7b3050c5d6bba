"""Memory for packed weights: whole, apart from each other, and the system's again when it is not used."""

from __future__ import annotations

import gc
import itertools
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moray.actors.weight_copy import TensorForm
from moray.kernels.cpu.library import NativeLibrary
from moray.kernels.cpu.matrix import pack
from moray.kernels.cpu.memory import HUGE, WeightMemory, weight_memory
from moray.kernels.cpu.memory import REGION as WHOLE

REGION = 8 * HUGE


@pytest.fixture
def memory() -> WeightMemory:
    return WeightMemory(REGION)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def numbered(memory: WeightMemory, number: int, rows: int) -> torch.Tensor:
    return memory.empty((rows, 64), torch.int32).fill_(number)


def ranges(tensors: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        yield tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1000, 96), (0, 5), (5, 0)])
def test_a_tensor_is_what_was_asked_for(memory: WeightMemory, shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensor = memory.empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert tensor.data_ptr() % 64 == 0


def test_tensors_never_overlap_while_others_come_and_go(memory: WeightMemory) -> None:
    generator = torch.Generator().manual_seed(3)
    held: dict[int, torch.Tensor] = {}
    for number in range(400):
        rows = int(torch.randint(1, 3000, (), generator=generator))
        held[number] = numbered(memory, number, rows)
        if len(held) > 12:
            del held[sorted(held)[int(torch.randint(0, len(held), (), generator=generator))]]
        if number % 50 == 0:
            assert all(bool((tensor == n).all()) for n, tensor in held.items())
    ends = sorted(ranges(list(held.values())))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
    assert all(bool((tensor == n).all()) for n, tensor in held.items())


def test_what_is_given_back_is_given_out_again(memory: WeightMemory) -> None:
    tensors = [memory.empty((HUGE // 64, 48), torch.uint8) for _ in range(8)]
    free = memory.free
    addresses = {tensor.data_ptr() for tensor in tensors}
    del tensors
    gc.collect()
    assert memory.free == free + 8 * (HUGE // 64 * 48) == REGION
    again = [memory.empty((HUGE // 64, 48), torch.uint8) for _ in range(8)]
    assert {tensor.data_ptr() for tensor in again} == addresses


def test_whole_pages_that_nobody_uses_are_the_systems(memory: WeightMemory) -> None:
    before = resident_bytes()
    tensors = [memory.empty((HUGE, 2), torch.uint8).fill_(1) for _ in range(16)]
    assert resident_bytes() - before > 15 * 2 * HUGE
    kept = tensors[5].clone()
    del tensors[6:], tensors[:5]
    gc.collect()
    assert resident_bytes() - before < 8 * HUGE
    assert torch.equal(tensors[0], kept)


def test_a_kernel_without_huge_pages_has_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # which the kernel refuses as it does what it was built without
    assert bool((numbered(WeightMemory(REGION), 5, 10) == 5).all())


def test_a_view_keeps_its_memory(memory: WeightMemory) -> None:
    view = numbered(memory, 7, 100)[3:5]
    gc.collect()
    others = [numbered(memory, 8, 100) for _ in range(3)]
    assert bool((view == 7).all())
    assert not any(begin <= view.data_ptr() < end for begin, end in ranges(others))


def test_a_matrix_larger_than_a_region_has_one_of_its_own(memory: WeightMemory) -> None:
    large = memory.empty((REGION, 3), torch.uint8)
    large[-1] = 1
    assert memory.free == 0
    del large
    gc.collect()
    assert memory.free == 3 * REGION


def test_any_thread_may_ask_and_let_go(memory: WeightMemory) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            tensor = numbered(memory, number, 97)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    gc.collect()
    assert memory.free == REGION


def test_packed_weights_and_copies_of_them_are_there(library: NativeLibrary) -> None:
    del library
    gc.collect()
    free = weight_memory.free
    packed = pack(torch.zeros(1 << 12, 1 << 10, dtype=torch.bfloat16))
    copy = TensorForm(64, 1 << 14, torch.bfloat16, packs=1024).empty(64, torch.device("cpu"))
    taken = packed.tiles.nbytes + copy.nbytes
    assert (free - weight_memory.free) % WHOLE == taken % WHOLE
