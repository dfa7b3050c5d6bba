"""Errors in the middle of a step whose layers are run natively: what was asked for is owed, and nobody waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from moray.actors import layer_run_driver
from moray.actors.pending_experts import PendingExperts

from .faulty_runs import Faulty, be_patient, full_sockets
from .real_hosts import router_ends
from .whole_models import after_layer, run_of


class FailsOnce:
    """A function that raises in its nth call, before or after doing what it should."""

    def __init__(self, function: Callable[..., Any], call: int, *, after: bool = False) -> None:
        self._function, self._left, self._after = function, call, after

    def __call__(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise MemoryError
        result = self._function(*arguments)
        if self._left == 0:
            raise MemoryError
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["_ask", "start", "_take_over", "finish"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_an_error_of_pythons_in_the_middle(
    faulty: Callable[..., Faulty], layer: int, name: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's answers are left over, whoever asked for them."""
    it = faulty()
    run = run_of(it.dispatch)

    def break_it() -> None:
        if name in ("_ask", "start"):
            run._described[layer + 1].routes.keys = None
        else:
            run._run.wait_us = 0
        owner = it.dispatch if name in ("start", "finish") else it.dispatch._driver
        monkeypatch.setattr(owner, name, FailsOnce(getattr(owner, name), 1, after=after))
        if name not in ("_ask", "start"):
            it.stuck.begin()
            monkeypatch.setattr(it.dispatch._hosts, "excuse", lambda seconds: it.stuck.end())

    with monkeypatch.context() as patch:
        after_layer(it.model, layer, break_it, patch)
        with pytest.raises(MemoryError):
            it.forward()
    it.stuck.end()
    monkeypatch.undo()
    be_patient(it, monkeypatch)
    run._layers = ()
    it.assert_usable()
    assert it.counts() == (0, 0, 0)


@pytest.mark.parametrize("full", [0, 1])
def test_an_error_when_only_one_host_was_asked(
    faulty: Callable[..., Faulty], full: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's socket was full; its answer is owed."""
    it = faulty()
    with contextlib.ExitStack() as stack:

        def break_it() -> None:
            stack.enter_context(full_sockets([router_ends(it.dispatch)[full]]))
            monkeypatch.setattr(layer_run_driver, "PendingExperts", FailsOnce(PendingExperts, 1))

        after_layer(it.model, 2, break_it, monkeypatch)
        with pytest.raises(MemoryError):
            it.forward()
    it.assert_usable()
    assert it.dispatch.broken == {}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_around_the_native_call(
    faulty: Callable[..., Faulty], call: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it a layer may have been asked for natively, and be waited for by nobody."""
    it = faulty()
    run = run_of(it.dispatch)
    after_layer(it.model, 2, lambda: None, monkeypatch)
    library = run._library

    class Library:
        run_layers = staticmethod(FailsOnce(library.run_layers, call, after=after))

    with monkeypatch.context() as patch:
        patch.setattr(run, "_library", Library)
        with pytest.raises(MemoryError):
            it.forward()
    it.assert_usable()
    assert it.counts() == (0, 0, 0)
