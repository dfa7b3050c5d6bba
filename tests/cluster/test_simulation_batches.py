"""What a simulated router's steps compute."""

from __future__ import annotations

from dataclasses import replace

from moray.cluster.simulation.batches import Batches, Request, StepWork
from moray.cluster.simulation.trace import Arrival
from moray.model.transformer import SPARED_ROWS

from .simulation_sites import small_site


def test_a_step_of_chunks_and_single_tokens() -> None:
    batches = Batches(replace(small_site().settings, token_budget=64))
    for number, arrival in enumerate((Arrival(0.0, 10, 4), Arrival(0.0, 40, 4))):
        batches.add(Request(number, arrival, 0.0))
    first = batches.next_step(0.0)
    # Both prompts, of which the last rows are sampled.
    assert first == StepWork(50, 0, 2, 55 + 820, 50, 40, sampled_positions=50, sampled_longest=40)
    assert first.last == StepWork.of_single_tokens(2, 50, 40)
    batches.finish_step(1.0)
    batches.add(Request(2, Arrival(0.0, 100, 4), 1.0))
    second = batches.next_step(1.0)
    # A token each of those two, and a chunk that is not the last.
    assert second is not None
    assert (second.tokens, second.sampled, second.sampled_positions, second.sampled_longest) == (64, 2, 11 + 41, 41)
    assert second.last == StepWork.of_single_tokens(2, 52, 41)


def test_the_last_layer_is_like_the_others_where_few_tokens_need_none_of_it() -> None:
    work = StepWork(SPARED_ROWS, 0, 1, 136, 16, 16, 16, 16)
    assert work.last == work
    more = replace(work, tokens=SPARED_ROWS + 1)
    assert more.last == StepWork.of_single_tokens(1, 16, 16)
    assert replace(more, sampled=0, sampled_positions=0, sampled_longest=0).last.tokens == 0


def test_two_halves_are_the_whole() -> None:
    work = StepWork(51, 7, 9, 777, 301, 90, 405, 80)
    larger, smaller = work.halves()
    for name in ("tokens", "decoding", "sampled", "kv_positions", "kv_rows", "sampled_positions"):
        assert getattr(larger, name) + getattr(smaller, name) == getattr(work, name)
        assert getattr(larger, name) - getattr(smaller, name) in (0, 1)
    assert (larger.longest, smaller.sampled_longest) == (90, 80)
