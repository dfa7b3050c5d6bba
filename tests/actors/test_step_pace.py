"""How large steps may be, learnt from steps of a known cost; and how long a queue takes."""

from __future__ import annotations

import random

import pytest

from moray.actors.messages import GenerateRequest
from moray.actors.queue_time import QueueTime
from moray.actors.scheduler import Scheduler
from moray.actors.step_pace import StepPace
from moray.model.pages import PagePool
from moray.model.sampling import SamplingParams


def learnt(pace: StepPace, step: float, decoding: float, prompt: float, *, steps: int = 400, seed: int = 0) -> StepPace:
    """Steps of all sizes that cost so much each and for every sequence and prompt token."""
    draw = random.Random(seed)
    for _ in range(steps):
        sequences, tokens = draw.randint(0, 32), draw.choice([0, draw.randint(1, 128)])
        pace.observe(sequences, tokens, step + decoding * sequences + prompt * tokens)
    return pace


@pytest.mark.parametrize("costs", [(0.004, 0.0002, 0.00005), (0.018, 0.0034, 0.0016), (0.02, 0.0, 0.0003)])
def test_costs_are_learnt(costs: tuple[float, float, float]) -> None:
    step, decoding, prompt = costs
    pace = learnt(StepPace(0.5), *costs)
    for sequences in (1, 16, 32):
        assert pace.decoding_s(sequences) == pytest.approx(step + decoding * sequences, rel=0.1)
        tokens = pace.prompt_tokens(sequences)
        assert tokens is not None
        assert tokens * prompt == pytest.approx(0.85 * 0.5 - step - decoding * sequences, rel=0.1)


def test_one_step_that_was_held_up_moves_little() -> None:
    pace = learnt(StepPace(0.1), 0.004, 0.0002, 0.00005)
    before = pace.decoding_s(8)
    pace.observe(8, 0, 60.0)
    assert pace.decoding_s(8) <= 1.25 * before


def test_there_is_always_room_for_one_and_a_few_tokens() -> None:
    pace = learnt(StepPace(0.001), 0.004, 0.0002, 0.00005)
    assert (pace.sequences(), pace.prompt_tokens(1)) == (1, 4)


def test_nothing_is_bounded_by_what_is_not_known() -> None:
    pace = StepPace(0.1)
    assert pace.prompt_tokens(1) is None
    assert pace.sequences() == 1
    pace.observe(2, 0, 0.01)
    assert pace.sequences() == 3, "nobody knows yet what more cost"


@pytest.mark.parametrize("one", [0.0155, 0.018])
def test_where_a_target_has_room_for_one_answer_no_second_one_is_let_in(one: float) -> None:
    """Prompts take 15 times as long as a step of one, and vary by more than another sequence would cost."""
    draw, pace = random.Random(0), StepPace(0.026)
    for answer in range(300):
        pace.observe(0, 64, 0.27 * (1 + 0.1 * abs(draw.gauss(0, 1))))
        for _ in range(64):
            pace.observe(1, 0, one * (1 + 0.08 * abs(draw.gauss(0, 1))))
            assert answer < 3 or pace.sequences() == 1, answer


def test_under_overload_steps_stay_below_the_target_and_it_is_used() -> None:
    """The scheduler against a queue that never ends, over a machine whose steps vary."""
    draw, target_s = random.Random(0), 0.015
    scheduler = Scheduler(PagePool(1024, 32), token_budget=512, max_running=64, target_s=target_s)
    took: list[float] = []
    number = 0
    for _ in range(1200):
        while len(scheduler.waiting) < 4:
            prompt = [number * 1000 + i for i in range(draw.randint(20, 100))]
            scheduler.add(GenerateRequest(str(number), prompt, SamplingParams(draw.randint(20, 100))))
            number += 1
        chunks = scheduler.schedule()
        decoding = sum(chunk.length == 1 for chunk in chunks)
        tokens = sum(chunk.length for chunk in chunks) - decoding
        seconds = (0.004 + 0.0002 * decoding + 0.00005 * tokens) * (1 + 0.1 * abs(draw.gauss(0, 1)))
        scheduler.took(chunks, seconds)
        took.append(seconds)
        for chunk in chunks:
            scheduler.advance(chunk, 7 if chunk.samples else None)
            if chunk.sequence.generated >= chunk.sequence.request.sampling.max_tokens:
                scheduler.remove(chunk.sequence)
    settled = sorted(took[300:])
    assert settled[int(0.99 * len(settled))] <= target_s
    assert len(scheduler.running) >= 12


def test_a_queue_is_as_long_as_it_takes() -> None:
    queue = QueueTime()
    assert queue.wait_s(5) is None
    for _ in range(400):
        queue.observe(2, 0.5)
    assert queue.wait_s(0) == 0.0
    assert queue.wait_s(6) == pytest.approx(1.5)
    for _ in range(2000):
        queue.observe(1, 0.5)
    assert queue.wait_s(6) == pytest.approx(3.0, rel=0.01)


def test_only_what_has_not_begun_is_overdue() -> None:
    scheduler = Scheduler(PagePool(64, 4), token_budget=16, max_running=1, max_wait_s=10.0)

    def request(name: str, generated: int = 0) -> GenerateRequest:
        return GenerateRequest(name, [1, 2, 3], SamplingParams(9), [5] * generated)

    scheduler.add(request("runs"))
    scheduler.took(scheduler.schedule(), 1.0)
    begun = scheduler.add(request("begun elsewhere", generated=2))
    early = scheduler.add(request("early"))
    scheduler.took([], 6.0)
    late = scheduler.add(request("late"))
    assert scheduler.overdue() == []
    scheduler.took([], 5.0)
    assert scheduler.overdue() == [early]
    scheduler.took([], 6.0)
    assert scheduler.overdue() == [early, late]
    assert begun in scheduler.waiting
