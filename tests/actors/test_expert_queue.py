"""Who gives which expert: decisions alone, nothing is read or copied."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moray.actors import expert_queue
from moray.actors.expert_queue import DISK, ExpertQueue, Key
from moray.kernels.experts import MlpWeights

KEYS: list[Key] = [(layer, expert) for layer in (1, 2) for expert in range(8)]
NEVER = 3600.0
"""Patience that no test outlasts."""


def mlp() -> MlpWeights:
    return MlpWeights(torch.empty(0, 0), torch.empty(0, 0))


def queue_of(
    keys: list[Key], sources: dict[str, list[Key]] | None = None, *, size: int = 10, patience_s: float = NEVER
) -> tuple[ExpertQueue, list[int]]:
    delivered: list[int] = []
    held = {name: frozenset(has) for name, has in (sources or {}).items()}
    sizes = dict.fromkeys(keys, size)
    return ExpertQueue(sizes, held, on_delivered=delivered.append, patience_s=patience_s), delivered


def give(queue: ExpertQueue, giver: str, keys: list[Key]) -> None:
    for key in keys:
        queue.deliver(giver, key, mlp())


def test_the_disk_alone_reads_everything_in_order_and_in_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_queue, "DISK_BYTES", 65)
    queue, delivered = queue_of(list(reversed(KEYS)))
    batches = []
    while batch := queue.take(DISK):
        batches.append(batch)
        give(queue, DISK, batch)
    assert batches == [KEYS[:6], KEYS[6:12], KEYS[12:]]
    assert queue.wait(0)
    assert list(queue.result()) == KEYS
    assert queue.given(DISK) == (16, 160) == (len(delivered), sum(delivered))


def test_an_expert_larger_than_a_batch_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_queue, "DISK_BYTES", 5)
    monkeypatch.setattr(expert_queue, "SOURCE_BYTES", 5)
    queue, _ = queue_of(KEYS, {"a": KEYS})
    assert queue.take(DISK) == KEYS[:1]
    assert queue.take("a") == KEYS[-1:]


def test_beside_a_source_the_disks_batches_shrink() -> None:
    """So that the last batch does not outlast everything else by much."""
    queue, _ = queue_of(KEYS, {"a": KEYS})
    sizes = []
    while batch := queue.take(DISK):
        sizes.append(len(batch))
        give(queue, DISK, batch)
    assert sizes == [4, 3, 2, 1, 1, 1, 1, 1, 1, 1]


def test_sources_take_what_they_have_from_the_back_and_the_disk_what_it_alone_has() -> None:
    expert_7 = [(1, 7), (2, 7)]
    queue, _ = queue_of(KEYS, {"a": expert_7, "b": [(1, 0), *expert_7]}, size=expert_queue.SOURCE_BYTES)
    assert queue.take("a") == [(2, 7)]
    assert queue.take("b") == [(1, 7)]
    give(queue, "b", [(1, 7)])
    assert queue.take("b") == [(1, 0)]
    assert queue.take(DISK)[0] == (1, 1)


def test_small_experts_are_asked_for_together() -> None:
    queue, _ = queue_of(KEYS, {"a": KEYS})
    assert queue.take("a") == KEYS[::-1]


def test_what_a_lost_source_had_in_hand_goes_to_others_and_it_is_asked_no_more() -> None:
    queue, _ = queue_of(KEYS, {"a": KEYS})
    taken = queue.take("a")
    give(queue, "a", taken[:3])
    queue.withdraw("a", RuntimeError("gone"))
    assert queue.take("a") == []
    assert queue.take(DISK) == sorted(taken[3:])
    give(queue, DISK, taken)
    assert queue.given("a") == (3, 30)
    assert queue.given(DISK) == (13, 130)
    assert queue.result().keys() == set(KEYS)


def test_a_giver_with_nothing_to_do_waits_for_what_may_come_back() -> None:
    queue, _ = queue_of(KEYS[:2], {"a": KEYS})
    taken = queue.take("a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.take, DISK)
        queue.withdraw("a", RuntimeError("gone"))
        assert waiting.result(20) == sorted(taken)


def test_whoever_waits_is_told_of_the_end() -> None:
    queue, _ = queue_of(KEYS[:2], {"a": KEYS})
    taken = queue.take("a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.take, DISK)
        give(queue, "a", taken)
        assert waiting.result(20) == []
    assert queue.wait(20)


def test_the_last_experts_do_not_wait_for_whoever_is_slow() -> None:
    """An idle giver takes what is in another's hands; what comes second is let go, and counted nowhere."""
    queue, delivered = queue_of(KEYS[:4], {"a": KEYS}, patience_s=0.0)
    slow = queue.take("a")
    assert len(slow) == 4
    took_over = []
    while batch := queue.take(DISK):
        took_over += batch
        give(queue, DISK, batch)
    assert sorted(took_over) == sorted(slow)
    first = queue.result()[slow[0]]
    give(queue, "a", slow)
    assert queue.result()[slow[0]] is first
    assert queue.given("a") == (0, 0)
    assert sum(delivered) == 40


def test_a_slow_disk_is_not_waited_for_either() -> None:
    queue, _ = queue_of(KEYS[:1], {"a": KEYS, "b": []}, patience_s=0.0)
    assert queue.take(DISK) == KEYS[:1]
    assert queue.take("a") == KEYS[:1]
    give(queue, "a", KEYS[:1])
    assert queue.take("b") == queue.take(DISK) == []


def test_what_two_have_in_hand_is_not_given_to_a_third_when_one_is_lost() -> None:
    queue, _ = queue_of(KEYS[:1], {"a": KEYS}, patience_s=0.0)
    assert queue.take("a") == queue.take(DISK) == KEYS[:1]
    queue.withdraw("a", RuntimeError("gone"))
    assert not queue.wait(0)
    give(queue, DISK, KEYS[:1])
    assert queue.wait(0)


def test_without_the_disk_sources_go_on_as_long_as_they_have_all_that_is_left() -> None:
    failed = OSError("disk")
    queue, _ = queue_of(KEYS[:4], {"a": KEYS[:2], "b": KEYS[1:]})
    taken = queue.take(DISK)
    queue.withdraw(DISK, failed)
    assert taken
    assert not queue.wait(0)
    give(queue, "b", queue.take("b"))
    queue.withdraw("b", RuntimeError("gone"))
    assert not queue.wait(0)  # what is left, a has too
    queue.withdraw("a", RuntimeError("gone"))
    assert queue.wait(0)
    with pytest.raises(OSError, match="disk"):
        queue.result()


def test_without_the_disk_what_nobody_has_is_an_error_at_once() -> None:
    queue, _ = queue_of(KEYS, {"a": KEYS[1:]})
    queue.withdraw(DISK, OSError("disk"))
    assert queue.take("a") == []
    with pytest.raises(OSError, match="disk"):
        queue.result()


def test_the_first_error_counts_and_none_after_the_end() -> None:
    queue, delivered = queue_of(KEYS)
    queue.fail(ValueError("first"))
    queue.fail(ValueError("second"))
    give(queue, DISK, KEYS)
    with pytest.raises(ValueError, match="first"):
        queue.result()
    assert delivered == []
    done, _ = queue_of(KEYS[:1])
    give(done, DISK, KEYS[:1])
    done.fail(ValueError("late"))
    assert done.result().keys() == {KEYS[0]}


def test_many_givers_deliver_each_expert_once() -> None:
    sources = {f"host-{n}": KEYS[n::2] for n in range(4)}
    queue, delivered = queue_of(KEYS, sources, patience_s=0.0)
    barrier = threading.Barrier(5)

    def work(giver: str) -> None:
        barrier.wait(20)
        while batch := queue.take(giver):
            give(queue, giver, batch)

    with ThreadPoolExecutor(5) as pool:
        for worker in [pool.submit(work, giver) for giver in (DISK, *sources)]:
            worker.result(20)
    assert sum(queue.given(giver)[0] for giver in (DISK, *sources)) == len(KEYS) == len(delivered)
    assert queue.result().keys() == set(KEYS)
