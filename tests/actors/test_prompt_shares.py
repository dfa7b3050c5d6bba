"""How prompts share a step: the first is never starved, and neither are short ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.actors.prompt_shares import Prompt, prompt_shares


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 8, []),
        ([100], 8, [8]),
        ([3], 8, [3]),
        ([100, 100, 100], 9, [9, 0, 0]),
        ([100, 90, 80], 9, [5, 0, 4]),
        ([100, 3, 2], 9, [5, 2, 2]),
        ([100, 3, 2], 20, [15, 3, 2]),
        ([2, 100, 3], 9, [2, 4, 3]),
        ([2, 1, 1], 1, [1, 0, 0]),
    ],
    ids=str,
)
def test_shares(lengths: list[int], budget: int, expected: list[int]) -> None:
    assert prompt_shares([Prompt(length, length) for length in lengths], budget) == expected


def test_what_is_not_ready_is_left_to_others() -> None:
    assert prompt_shares([Prompt(100, 2), Prompt(50, 50), Prompt(10, 3)], 16) == [2, 11, 3]


prompts = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 60)).map(lambda pair: Prompt(sum(pair), pair[0])), max_size=12
)


@given(prompts=prompts, budget=st.integers(1, 64))
def test_the_budget_is_used_up_and_the_first_has_its_half(prompts: list[Prompt], budget: int) -> None:
    shares = prompt_shares(prompts, budget)
    assert len(shares) == len(prompts)
    assert all(0 <= share <= prompt.ready for share, prompt in zip(shares, prompts, strict=True))
    assert sum(shares) == min(budget, sum(prompt.ready for prompt in prompts))
    if prompts:
        assert shares[0] >= min(prompts[0].ready, (budget + 1) // 2)
