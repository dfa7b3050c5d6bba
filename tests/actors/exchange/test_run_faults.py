"""Hosts that are lost, stuck or refuse while the layers of a step are run: bits and errors are those of layers one by one.

A cold host has replicas of everything: it is asked where others are late or lost, and otherwise nothing is chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moray.configs.errors import ExpertsUnavailableError

from .faulty_runs import Faulty, be_patient, full_sockets, hold_after, pass_time, waits_for_first
from .played_hosts import wait_until
from .real_hosts import host_end, router_ends
from .whole_models import after_layer, batch

LAYERS = [1, 2, 3]
"""After which something happens; the layers with experts are 1 to 4."""

LOST = r"^16 .* no reachable replica: link to expert-host-0: "


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


# ---- a host that dies ----------------------------------------------------------------------------------------------------


def lose(it: Faulty, layer: int, when: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A batch in which the first host is lost, that has answered up to this layer."""
    end = host_end(it.host)
    if when == "before it is asked":
        after_layer(it.model, layer, end.abort, monkeypatch)
        return it.forward()
    # Of the others, all that are asked have answered: how long that takes here does not tell that they are late.
    states = [it.end._state, host_end(it.models.hosts[1])._state]
    sent: list[int] = []

    def hold() -> None:
        it.stuck.begin()
        sent.extend(state.sent for state in states)

    after_layer(it.model, layer, hold, monkeypatch)
    result = pool.submit(it.forward)
    wait_until(lambda: result.done() or (bool(sent) and all(s.sent > n for s, n in zip(states, sent, strict=True))))
    end.abort()
    try:
        return result.result(20)
    finally:
        it.stuck.end()


WHEN = ["before it is asked", "while it is waited for"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_host_that_dies_is_replaced_within_the_step(
    faulty: Callable[..., Faulty], layer: int, when: str, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = faulty(cold=True)
    assert torch.equal(lose(it, layer, when, aside, monkeypatch), it.wanted)
    assert it.counts() == (1, 0, 0)
    assert it.dispatch.unlinked == ["expert-host-0"]
    assert "link to expert-host-0: " in it.dispatch.broken["expert-host-0"]
    assert it.natively() <= 4
    it.relink()


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_host_that_dies_with_the_only_replicas(
    faulty: Callable[..., Faulty], layer: int, when: str, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = faulty()
    why = "closed the connection" if "waited" in when else r"connection lost \(Broken pipe\)"
    with pytest.raises(ExpertsUnavailableError, match=f"{LOST}{why}$"):
        lose(it, layer, when, aside, monkeypatch)
    assert it.counts() == (0, 0, 0)
    for _ in range(2):
        with pytest.raises(ExpertsUnavailableError, match=f"{LOST}{why}$"):
            it.forward()
    it.relink()


def test_closing_ends_a_wait(
    faulty: Callable[..., Faulty], aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = faulty()
    ends, sent = router_ends(it.dispatch), it.end._state.sent
    with it.host._one_at_a_time:
        result = aside.submit(it.forward)
        wait_until(lambda: ends[0]._state.sent > sent)
        it.dispatch.close()
        with pytest.raises(ExpertsUnavailableError, match="link to expert-host-0: was closed on this side"):
            result.result(20)
    with pytest.raises(ExpertsUnavailableError, match="was closed on this side"):
        it.forward()
    assert [end._sock.fileno() for end in ends] == [-1, -1], "nothing holds them any more"


# ---- a host that is stuck ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_a_host_that_takes_longer_than_a_native_wait(
    faulty: Callable[..., Faulty], layer: int, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = faulty()
    hold_after(it, layer, monkeypatch)
    result = aside.submit(it.forward)
    wait_until(lambda: result.done() or waits_for_first(it))
    it.stuck.end()
    assert torch.equal(result.result(20), it.wanted)
    assert it.counts() == (0, 0, 0)
    be_patient(it, monkeypatch)
    it.assert_usable()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_stuck_host_is_hedged_once_and_then_avoided(
    faulty: Callable[..., Faulty], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked for the layers after it, and those cost no wait for it."""
    it = faulty(cold=True)
    hold_after(it, layer, monkeypatch)
    pass_time(it, 0.5, monkeypatch)
    sent = it.end._state.sent + layer + 1
    for _ in range(2):
        assert torch.equal(it.forward(), it.wanted)
        assert it.counts() == (0, 1, 0)
        assert it.dispatch.late_hosts == ["expert-host-0"]
        assert it.end._state.sent == sent
    it.stuck.end()
    it.model.assert_settled()
    it.model.clock.now += 60
    be_patient(it, monkeypatch)
    it.assert_usable()
    assert it.end._state.sent == sent + 4, "the first is asked again"


def test_a_stuck_host_is_given_up(faulty: Callable[..., Faulty], monkeypatch: pytest.MonkeyPatch) -> None:
    it = faulty()
    hold_after(it, 2, monkeypatch)
    pass_time(it, 25.0, monkeypatch)
    with pytest.raises(ExpertsUnavailableError, match=r"expert-host-0: was silent for 25\.\d\d s with work in hand$"):
        it.forward()
    it.stuck.end()
    assert it.counts() == (0, 0, 1)
    be_patient(it, monkeypatch)
    it.relink()


# ---- a host that refuses -------------------------------------------------------------------------------------------------

REFUSAL = (
    "^expert-host-0 refused its work: expert-host-0: layer {}: ValueError: placement epoch 1 is not served here; .*"
)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cold", [True, False])
def test_a_host_that_refuses_is_asked_once(
    faulty: Callable[..., Faulty], deep: Path, layer: int, cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = faulty(cold=cold)
    table = it.dispatch.table

    def change_over() -> None:
        it.host.load(deep, table.slots[it.host.host_id], epoch=2)
        it.host.retire(2)

    after_layer(it.model, layer, change_over, monkeypatch)
    sent = it.end._state.sent
    if cold:
        assert torch.equal(it.forward(), it.wanted)
    else:
        with pytest.raises(ExpertsUnavailableError, match=REFUSAL.format(layer + 1)):
            it.forward()
    assert it.counts() == (int(cold), 0, 0)
    assert it.end._state.sent == sent + layer + 1
    assert list(it.dispatch.broken) == ["expert-host-0"]
    it.model.assert_settled()  # or the other host, which has a step's work still, would owe it for a minute
    for host in it.models.hosts[1:]:
        host.load(deep, table.slots[host.host_id], epoch=2)
    it.dispatch.adopt(replace(table, epoch=2), {})
    it.model.clock.now += 60
    it.assert_usable()
    assert it.dispatch.broken == {}


# ---- sockets and arenas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [(0,), (1,), (0, 1)], ids=str)
def test_a_socket_that_takes_no_packet_at_once(
    faulty: Callable[..., Faulty], full: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python sends what is left, and nothing is asked twice."""
    it = faulty()
    ends = [router_ends(it.dispatch)[number] for number in full]
    sent: list[list[int]] = []
    with contextlib.ExitStack() as stack:
        after_layer(it.model, 2, lambda: sent.append(stack.enter_context(full_sockets(ends))), monkeypatch)
        assert torch.equal(it.forward(), it.wanted)
    assert sent == [list(range(len(full)))]
    assert it.counts() == (0, 0, 0)
    it.assert_usable()


def test_arenas_that_grow(faulty: Callable[..., Faulty]) -> None:
    it = faulty()
    python = it.models.model(native=False, whole=False)
    one = batch((2, 0, 90), (3, 0, 90), (0, 0, 80), seed=3)  # for which it is not warm
    done = []
    for _ in range(2):
        before = it.model.layers
        wanted = python.transformer.hidden_states(one)
        assert torch.equal(it.model.transformer.hidden_states(one), wanted)
        done.append(it.model.layers - before)
    assert done[0] < done[1] == 4
    it.assert_usable()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("ends", [(0,), (1,), (0, 1)], ids=str)
def test_arenas_that_have_to_be_made_in_the_middle(
    faulty: Callable[..., Faulty], ends: tuple[int, ...], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = faulty()

    def forget() -> None:
        for end in map(router_ends(it.dispatch).__getitem__, ends):
            end._outgoing = end._state.outgoing = None

    after_layer(it.model, layer, forget, monkeypatch)
    assert it.natively() == 3, "all but the next"
    assert it.counts() == (0, 0, 0)
    it.assert_usable()
