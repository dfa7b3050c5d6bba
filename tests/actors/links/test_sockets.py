from __future__ import annotations

import itertools

import pytest

from moray.actors.links import sockets
from moray.actors.links.sockets import Spin


def test_a_spin_goes_on_until_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_SPIN_S", 20.0)
    looks = itertools.chain([False] * 1000, itertools.repeat(True))
    for _ in range(3):
        assert Spin().wait(lambda: next(looks))
    assert next(looks)


def test_a_spin_that_does_not_pay_is_tried_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_SPIN_S", 0.0)
    spin = Spin()
    looked: list[int] = []

    def never(wait: int) -> bool:
        looked.append(wait)
        return False

    for wait in range(1000):
        assert not spin.wait(lambda wait=wait: never(wait))  # type: ignore[misc]
    tries = sorted(set(looked))
    assert [after - before - 1 for before, after in itertools.pairwise(tries)][:9] == [1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_a_spin_that_pays_again_is_a_spin_as_before() -> None:
    spin = Spin()
    for _ in range(5):
        while not spin.worth_it():
            pass
        spin.ended(answered=False)
    while not spin.worth_it():
        pass
    spin.ended(answered=True)
    assert all(spin.worth_it() for _ in range(10))
    spin.ended(answered=False)
    assert [spin.worth_it() for _ in range(3)] == [False, True, True]
