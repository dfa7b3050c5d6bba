"""Models whose layers are run natively, of which a test makes one host fail in the middle of a step."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.actors import layer_run, native_exchange
from moray.actors.links.wire import MessageType, encode
from moray.actors.placement_table import COLD_HOST
from moray.actors.testing import EngineParts
from moray.model.compute import Compute

from .played_hosts import lent, wait_until
from .real_hosts import router_ends
from .whole_models import Models, Stuck, after_layer, batch, run_of

BATCH = batch((0, 0, 5), (1, 0, 3))
"""Both hosts are asked in every layer."""


class Faulty:
    """A model of two hosts, or two and a cold one, and what it should give."""

    def __init__(self, deep: Path, *, cold: bool = False) -> None:
        self.parts = EngineParts(deep, compute=Compute.native())
        table = self.parts.table(2)
        if cold:
            everything = self.parts.table(1).slots["expert-host-0"]
            table = replace(table, slots={**table.slots, f"{COLD_HOST}0": everything})
        self.models = Models(self.parts, len(table.slots), table=table)
        self.host = self.models.hosts[0]
        self.stuck = Stuck(self.host)
        self.model = self.models.model()
        self.dispatch = self.model.dispatch
        for _ in range(9):
            self.wanted = self.forward()
        assert self.model.ran == [True] * 9
        assert lent(self.dispatch) == []

    @property
    def end(self) -> Any:
        return router_ends(self.dispatch)[0]

    def forward(self) -> torch.Tensor:
        return self.model.transformer.hidden_states(BATCH).clone()

    def natively(self) -> int:
        """Layers of a batch that are done natively; its bits are right."""
        before = self.model.layers
        assert torch.equal(self.forward(), self.wanted)
        return self.model.layers - before

    def assert_usable(self) -> None:
        """Everything is native again."""
        self.model.assert_settled()
        assert self.natively() == 4
        self.model.assert_settled()

    def relink(self) -> None:
        """A new link to the first host."""
        wait_until(lambda: not self.host._links)
        self.dispatch.set_link(self.host.host_id, self.parts.link(self.host, "shm"))
        self.model.warm()
        self.assert_usable()

    def counts(self) -> tuple[int, int, int]:
        return self.dispatch.resent_shares, self.dispatch.hedged_shares, self.dispatch.fenced_hosts

    def close(self) -> None:
        self.stuck.close()
        self.models.close()
        self.parts.close()


def shorten_native_waits(it: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    _wait_natively(it, 1000, monkeypatch)


def be_patient(it: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    _wait_natively(it, 30_000_000, monkeypatch)


def _wait_natively(it: Faulty, microseconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(it.dispatch)
    monkeypatch.setattr(native_exchange, "_WAIT_US", microseconds)
    monkeypatch.setattr(layer_run, "_WAIT_US", microseconds)
    run._run.wait_us = microseconds


def waits_for_first(it: Faulty) -> bool:
    """Whether Python waits for the first host alone."""
    first, *others = it.dispatch._hosts.lines.values()
    return bool(first.owed) and all(line.idle for line in others)


def hold_after(it: Faulty, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def hold() -> None:
        it.stuck.begin()
        shorten_native_waits(it, monkeypatch)

    after_layer(it.model, layer, hold, monkeypatch)


def pass_time(it: Faulty, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once Python waits for the first host alone."""
    attend, left = it.dispatch._receiver.attend, [seconds]

    def attend_later() -> None:
        if left and waits_for_first(it):
            it.model.clock.now += left.pop()
        attend()

    monkeypatch.setattr(it.dispatch._receiver, "attend", attend_later)


@contextlib.contextmanager
def full_sockets(ends: Sequence[Any]) -> Iterator[list[int]]:
    """Native code's packets are taken by none of them; which of the ends Python sends to, as it can."""
    sent: list[int] = []
    with contextlib.ExitStack() as stack:
        for number, end in enumerate(ends):
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for one in pair:
                stack.enter_context(contextlib.closing(one))
            pair[0].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    pair[0].send(encode(MessageType.SPACE, 0))

            def send(*arguments: Any, number: int = number, own: int = end._state.fd, **options: Any) -> None:
                sent.append(number)
                ends[number]._state.fd = own
                del ends[number]._packets.send
                ends[number]._packets.send(*arguments, **options)

            end._state.fd, end._packets.send = pair[0].fileno(), send
        yield sent
