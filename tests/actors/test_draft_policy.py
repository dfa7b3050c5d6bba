"""Whether drafting pays: decided from made-up times."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moray.actors.draft_policy import PERIOD_STEPS, TRIAL_STEPS, DraftWhilePaid, pays

Cost = Callable[[int, bool], tuple[float, int]]


def play(policy: DraftWhilePaid, steps: int, sequences: int, cost: Cost) -> list[bool]:
    """Steps of `cost` (of the sequences, with drafts or without: seconds and tokens); which had drafts. One that changes over
    belongs to neither way and is not measured, as in a router."""
    decisions, before = [], None
    for _ in range(steps):
        drafted = policy.wanted(sequences)
        if drafted == before:
            seconds, tokens = cost(sequences, drafted)
            policy.measured(sequences, drafted=drafted, seconds=seconds, tokens=tokens)
        decisions.append(drafted)
        before = drafted
    return decisions


def test_more_tokens_must_outweigh_longer_steps() -> None:
    assert pays(1.9, 1.3)
    assert not pays(1.2, 1.3)


def test_drafts_until_something_else_is_known() -> None:
    policy = DraftWhilePaid()
    assert all(policy.wanted(n) for n in (1, 2, 3, 50))
    policy.measured(1, drafted=True, seconds=9.0, tokens=1)
    assert policy.pays(1)


@pytest.mark.parametrize("drafts_pay", [True, False])
def test_follows_what_steps_take(drafts_pay: bool) -> None:
    policy = DraftWhilePaid()
    factor = 1.5 if drafts_pay else 2.5
    decisions = play(policy, 8 * PERIOD_STEPS, 1, lambda _, drafted: (0.01 * (factor if drafted else 1), 1 + drafted))
    assert policy.pays(1) is drafts_pay
    later = decisions[3 * PERIOD_STEPS :]
    assert 3 * TRIAL_STEPS <= later.count(not drafts_pay) <= 5 * TRIAL_STEPS, "the other way is tried, and no more"


def test_each_number_of_sequences_by_itself() -> None:
    """Verifying is free for a few sequences and costs more than decoding for many."""
    policy = DraftWhilePaid()

    def cost(sequences: int, drafted: bool) -> tuple[float, int]:
        return 0.01 * ((2.2 if sequences > 8 else 1.1) if drafted else 1), sequences * (1 + drafted)

    for sequences in (1, 4, 32):
        play(policy, PERIOD_STEPS, sequences, cost)
    assert [policy.pays(n) for n in (1, 4, 7, 32, 63)] == [True, True, True, False, False]


def test_changes_its_mind_with_how_often_drafts_are_right() -> None:
    policy = DraftWhilePaid()
    right = True

    def cost(_: int, drafted: bool) -> tuple[float, int]:
        return (0.013, 1 + right) if drafted else (0.010, 1)

    play(policy, 300, 1, cost)
    assert policy.pays(1)
    right = False
    play(policy, 100, 1, cost)
    assert not policy.pays(1)
    right = True
    play(policy, 4 * PERIOD_STEPS, 1, cost)
    assert policy.pays(1)


def test_a_machine_that_others_use_decides_nothing() -> None:
    """Speed that changes by itself, step by step and for longer, hits both ways alike."""
    policy, chance = DraftWhilePaid(), random.Random(1)
    speed = 1.0

    def cost(_: int, drafted: bool) -> tuple[float, int]:
        nonlocal speed
        if chance.random() < 0.02:
            speed = chance.uniform(0.5, 3.0)
        held_up = 20.0 if chance.random() < 0.1 else 1.0
        return 0.01 * speed * held_up * (1.3 if drafted else 1.0), 1 + drafted

    decisions = play(policy, 20 * PERIOD_STEPS, 1, cost)
    assert decisions.count(True) > 0.9 * len(decisions)
