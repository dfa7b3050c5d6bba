"""Whether drafting pays: decided from made-up times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moray.actors.draft_policy import PERIOD_STEPS, TRIAL_STEPS, DraftWhilePaid

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


def test_drafts_until_something_else_is_known() -> None:
    policy = DraftWhilePaid()
    assert all(policy.wanted(n) for n in (1, 2, 3, 50))
    policy.measured(1, drafted=True, seconds=9.0, tokens=1)
    assert policy.pays(1)


@pytest.mark.parametrize("pays", [True, False])
def test_follows_what_steps_take(pays: bool) -> None:
    policy = DraftWhilePaid()
    factor = 1.5 if pays else 2.5
    decisions = play(policy, 4 * PERIOD_STEPS, 1, lambda _, drafted: (0.01 * (factor if drafted else 1), 1 + drafted))
    assert policy.pays(1) is pays
    later = decisions[PERIOD_STEPS:]
    assert later.count(not pays) == 3 * TRIAL_STEPS, "the other way is tried, and no more than that"


def test_each_number_of_sequences_by_itself() -> None:
    """Verifying is free for a few sequences and costs as much as decoding for many."""
    policy = DraftWhilePaid()

    def cost(sequences: int, drafted: bool) -> tuple[float, int]:
        rows = sequences * (1 + drafted)
        return 0.01 + 0.002 * max(0, rows - 8), sequences * 2 if drafted else sequences

    for sequences in (1, 2, 4, 64):
        play(policy, PERIOD_STEPS, sequences, cost)
    assert all(policy.pays(n) for n in (1, 2, 3, 4, 7))

    def dear(sequences: int, drafted: bool) -> tuple[float, int]:
        return 0.01 * (2.2 if drafted else 1), sequences * 2 if drafted else sequences

    play(policy, 2 * PERIOD_STEPS, 32, dear)
    assert not policy.pays(63)
    assert policy.pays(4)


def test_changes_its_mind_when_drafts_are_no_longer_right() -> None:
    policy = DraftWhilePaid()
    right = True

    def cost(_: int, drafted: bool) -> tuple[float, int]:
        return (0.013, 1 + right) if drafted else (0.010, 1)

    play(policy, 100, 1, cost)
    assert policy.pays(1)
    right = False
    play(policy, 100, 1, cost)
    assert not policy.pays(1)
    right = True
    decisions = play(policy, 2 * PERIOD_STEPS, 1, cost)
    assert policy.pays(1)
    assert decisions[-1]


def test_one_step_that_was_held_up_decides_nothing() -> None:
    policy = DraftWhilePaid()
    play(policy, PERIOD_STEPS, 1, lambda _, drafted: (0.013 if drafted else 0.010, 1 + drafted))
    policy.measured(1, drafted=True, seconds=30.0, tokens=2)
    assert policy.pays(1)
