"""Deadlines that move: what they cut off, and what they leave alone."""

from __future__ import annotations

import asyncio

import pytest

from moray.actors.front.patience import Patience


class TooLateError(Exception):
    pass


def test_what_takes_too_long_is_cancelled_with_the_given_error() -> None:
    async def wait() -> None:
        async with Patience() as patience:
            patience.give(0.01, TooLateError)
            try:
                await asyncio.Event().wait()
            finally:
                assert patience.expired

    async def main() -> None:
        with pytest.raises(TooLateError):
            await wait()
        await asyncio.sleep(0)  # the task goes on uncancelled

    asyncio.run(main())


def test_a_deadline_that_is_moved_does_not_cut_off() -> None:
    async def main() -> None:
        async with Patience() as patience:
            for _ in range(8):
                patience.give(0.05, TooLateError)
                await asyncio.sleep(0.02)
        assert not patience.expired

    asyncio.run(main())


def test_a_nearer_deadline_counts_at_once_and_with_its_own_error() -> None:
    async def wait() -> None:
        async with Patience() as patience:
            patience.give(60.0, ValueError)
            patience.give(0.01, TooLateError)
            await asyncio.sleep(30)

    with pytest.raises(TooLateError):
        asyncio.run(wait())


def test_an_error_inside_is_left_as_it_is() -> None:
    async def fail() -> None:
        async with Patience() as patience:
            patience.give(60.0, TooLateError)
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(fail())


def test_a_cancellation_from_outside_stays_one() -> None:
    async def wait() -> None:
        async with Patience() as patience:
            patience.give(60.0, TooLateError)
            await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
