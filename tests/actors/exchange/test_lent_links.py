"""Links are given back whatever happens between lending them to native code and its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moray.actors import native_exchange
from moray.configs.errors import LinkError

from .played_hosts import PlayedCluster, Step, lent, patience

Play = Callable[..., PlayedCluster]


class Failing:
    """A library of which one function raises."""

    def __init__(self, library: Any, name: str) -> None:
        self._library = library
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise MemoryError(name)
        return getattr(self._library, name)


@pytest.fixture
def cluster(play: Play) -> PlayedCluster:
    cluster = play((0, 1), (2, 3))
    cluster.warm()
    return cluster


def answered(cluster: PlayedCluster) -> tuple[Any, Step]:
    one = cluster.step()
    claim = cluster.dispatch.start(3, *one)
    cluster.answer_all()
    return claim, one


@pytest.mark.parametrize("point", ["asking", "collecting"])
def test_a_link_that_is_broken_when_it_is_lent(cluster: PlayedCluster, point: str) -> None:
    """Of the others none is used: Python finds out what is wrong."""
    before = cluster.layers
    end = cluster[1].router_end

    def broken() -> None:
        raise LinkError("h1", "is broken")

    if point == "asking":
        end.lend = broken
        claim, one = answered(cluster)
    else:
        claim, one = answered(cluster)
        end.lend = broken
    assert lent(cluster.dispatch) == []
    assert torch.equal(cluster.dispatch.finish(claim), cluster.expected(one))
    assert lent(cluster.dispatch) == []
    assert cluster.layers == before
    del end.lend
    cluster.run()
    assert cluster.layers - before == 1


def test_a_link_that_another_thread_uses_is_a_bug_that_leaves_none_lent(cluster: PlayedCluster) -> None:
    with cluster[1].router_end._busy, pytest.raises(RuntimeError, match="in use by another thread"):
        cluster.dispatch.start(3, *cluster.step())
    assert lent(cluster.dispatch) == []
    claim, one = answered(cluster)
    with cluster[1].router_end._busy, pytest.raises(RuntimeError, match="in use by another thread"):
        cluster.dispatch.finish(claim)
    assert lent(cluster.dispatch) == []
    cluster.dispatch.check()
    cluster.run(one)


@pytest.mark.parametrize("function", ["ask_experts", "collect_experts"])
def test_an_error_in_the_middle(cluster: PlayedCluster, function: str) -> None:
    assert cluster.exchange
    library = cluster.exchange._library
    vars(cluster.exchange)["_library"] = Failing(library, function)
    with pytest.raises(MemoryError):
        cluster.dispatch.finish(answered(cluster)[0])
    cluster.exchange._library = library
    assert lent(cluster.dispatch) == []
    cluster.dispatch.check()
    before = cluster.layers
    cluster.run()
    assert cluster.layers - before == 1


def test_no_memory_for_the_sum(cluster: PlayedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, _ = answered(cluster)

    class Torch:
        float32 = torch.float32

        @staticmethod
        def empty(*arguments: Any, **options: Any) -> torch.Tensor:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(native_exchange, "torch", Torch)
        with pytest.raises(MemoryError):
            cluster.dispatch.finish(claim)
    assert lent(cluster.dispatch) == []
    cluster.dispatch.check()
    cluster.run()


@pytest.mark.parametrize("hosts", [(0,), (1,), (0, 1)], ids=str)
def test_a_reply_that_somebody_looked_for_meanwhile(cluster: PlayedCluster, hosts: tuple[int, ...]) -> None:
    """It is off the socket then, and native code has no link."""
    before = cluster.layers
    claim, one = answered(cluster)
    for host in map(cluster.__getitem__, hosts):
        assert host.router_end.wait(deadline=patience())
    assert torch.equal(cluster.dispatch.finish(claim), cluster.expected(one))
    assert cluster.layers == before
    cluster.run()
    assert cluster.layers - before == 1
