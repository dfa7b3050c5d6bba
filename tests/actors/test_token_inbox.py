"""Outputs that wait for their taker come as one, errors after everything before them."""

from __future__ import annotations

import asyncio

import pytest

from moray.actors.messages import TokenLogprobs, TokenOutput, joined
from moray.actors.token_inbox import TokenInbox
from moray.configs.errors import RouterLostError


def test_what_waits_comes_as_one() -> None:
    async def main() -> None:
        inbox = TokenInbox()
        entries = [TokenLogprobs(-0.5, [n], [-0.5]) for n in range(3)]
        inbox.put(TokenOutput("r", [1, 2], entries[:2]))
        inbox.put(TokenOutput("r", [3], entries[2:], "length"))
        assert await inbox.take() == TokenOutput("r", [1, 2, 3], entries, "length")

    asyncio.run(main())


def test_an_output_is_taken_when_it_comes() -> None:
    async def main() -> None:
        inbox = TokenInbox()
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        assert not taking.done()
        inbox.put(TokenOutput("r", [1]))
        inbox.put(TokenOutput("r", [2]))  # before the task had its turn
        assert await taking == TokenOutput("r", [1, 2])

    asyncio.run(main())


def test_an_error_is_raised_once_all_before_it_was_taken() -> None:
    async def main() -> None:
        inbox = TokenInbox()
        inbox.put(TokenOutput("r", [1]))
        inbox.put(RouterLostError("gone"))
        assert await inbox.take() == TokenOutput("r", [1])
        with pytest.raises(RouterLostError, match="gone"):
            await inbox.take()

    asyncio.run(main())


def test_a_taker_that_is_cancelled_leaves_what_comes_for_the_next() -> None:
    async def main() -> None:
        inbox = TokenInbox()
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        inbox.put(TokenOutput("r", [1]))
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert await inbox.take() == TokenOutput("r", [1])

    asyncio.run(main())


def test_the_last_word_of_joined_outputs_counts() -> None:
    outputs = [TokenOutput("r", [1]), TokenOutput("r", [], None, "error", "why", 2.0)]
    assert joined(outputs) == TokenOutput("r", [1], None, "error", "why", 2.0)
    assert joined([TokenOutput("r", [1], cached_tokens=8), TokenOutput("r", [2])]).cached_tokens == 8
