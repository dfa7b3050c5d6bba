"""Expert hosts that a test plays itself, at the other ends of real shm links: they answer when and what it says.

An expert multiplies hidden states by its number plus one, so that whoever computes a pair is checked by equality.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moray.actors.deadline import Deadline
from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.links import Frame, dial, listen
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.native_exchange import NativeExchange, native_exchange
from moray.actors.placement_table import PlacementTable
from moray.actors.testing import SECRET
from moray.configs.errors import MorayError
from moray.kernels.combine import combine

from ..host_loop.packed_hosts import patience as patience
from ..host_loop.packed_hosts import wait_until as wait_until

FIRST_LAYER, LAYERS, HIDDEN, TOP_K = 3, 2, 40, 2
Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states, top-k ids and weights of one layer."""


def new_exchange() -> NativeExchange:
    exchange = native_exchange()
    assert exchange is not None, "the package was installed without its native parts: is there a compiler?"
    return exchange


def random_step(tokens: int, *, seed: int, experts: int, top_k: int = TOP_K, hidden: int = HIDDEN) -> Step:
    generator = torch.Generator().manual_seed(seed)
    topk_ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator)
    return torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16), topk_ids, weights


def outcome(call: Callable[..., torch.Tensor], *arguments: Any) -> object:
    """What came of it in a form that can be compared."""
    try:
        return call(*arguments).numpy().tobytes()
    except (MorayError, ValueError, IndexError) as error:
        return type(error), str(error)


def lent(dispatch: ExpertDispatch) -> list[str]:
    """Hosts whose links are in use."""
    links: dict[str, Any] = {host: line.link for host, line in dispatch._hosts.lines.items()}
    return [host for host, link in links.items() if link._busy.locked()]


class Clock:
    """Lateness is measured on it, and it stands: however slow the machine is, nobody is late unless a test says so.

    After longer than any test takes it goes, so that no wait is without end.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self._goes_from = time.monotonic() + 30

    def __call__(self) -> float:
        return self.now + max(0.0, time.monotonic() - self._goes_from)


class PlayedHost:
    """One host, and `router_end`, the router's link to it. Reads and answers nothing by itself."""

    def __init__(self, host: str, table: PlacementTable) -> None:
        listener = listen("shm", bind_host="127.0.0.1", secret=SECRET, identity=host)
        self.router_end: Any = dial(listener.address, secret=SECRET, identity="router-0", deadline=patience())
        self.link: Any = listener.accept(deadline=patience())
        listener.close()
        self.host = host
        self.table = table

    @property
    def asked(self) -> bool:
        """Whether there is a request that was not taken."""
        return bool(self.link.wait(deadline=Deadline.after(0)))

    def take(self) -> Frame:
        """The next request."""
        frame = self.link.recv(deadline=patience())
        return Frame(frame.header, tuple(t.clone() for t in frame.tensors))

    def outputs(self, request: Frame) -> torch.Tensor:
        """What is to be answered."""
        hidden_states, (rows, slots) = request.tensors
        assert bool((slots.diff() >= 0).all()), "slots ascend"
        layer = MoeHeader.unpack(request.header).layer
        held = torch.tensor(self.table.slots[self.host][layer - FIRST_LAYER])
        return hidden_states[rows.long()] * (held[slots.long()] + 1).to(hidden_states.dtype)[:, None]

    def send(self, request: Frame, *tensors: torch.Tensor, more: bytes = b"", **changes: Any) -> None:
        """Reply with these tensors and the request's header, of which some is changed."""
        header = MoeHeader.unpack(request.header)._replace(kind=Kind.DONE)._replace(**changes)
        self.link.send(header.pack() + more, tensors, deadline=patience())

    def answer(self) -> None:
        """Take a request and reply what it should be."""
        request = self.take()
        self.send(request, self.outputs(request))

    def close(self) -> None:
        self.link.close()
        self.router_end.close()


class PlayedCluster:
    """A dispatch and its hosts.

    Args:
        held: for each host the experts in its slots, in every layer.
        native: whether the dispatch has an exchange.
    """

    def __init__(self, *held: Sequence[int], native: bool = True) -> None:
        self.clock = Clock()
        self.experts = max(map(max, held)) + 1
        self.table = self.place(1, *held)
        self.hosts = {host: PlayedHost(host, self.table) for host in self.table.slots}
        self.exchange = new_exchange() if native else None
        links = {host: played.router_end for host, played in self.hosts.items()}
        self.dispatch = ExpertDispatch(
            self.table, links, reply_timeout_s=10.0, exchange=self.exchange, clock=self.clock
        )
        self._seed = 0

    def place(self, epoch: int, *held: Sequence[int]) -> PlacementTable:
        slots = {f"h{i}": (tuple(experts),) * LAYERS for i, experts in enumerate(held)}
        return PlacementTable(epoch, FIRST_LAYER, self.experts, slots)

    def __getitem__(self, host: int) -> PlayedHost:
        return self.hosts[f"h{host}"]

    @property
    def layers(self) -> int:
        """How many were done natively."""
        return self.exchange.layers if self.exchange else 0

    def step(self, tokens: int = 6) -> Step:
        self._seed += 1
        return random_step(tokens, seed=self._seed, experts=self.experts)

    def expected(self, step: Step) -> torch.Tensor:
        hidden_states, topk_ids, weights = step
        return combine(hidden_states[:, None] * (topk_ids + 1).to(hidden_states.dtype)[:, :, None], weights)

    def answer_all(self) -> None:
        """Have every host answer what it was asked for."""
        for host in self.hosts.values():
            while host.asked:
                host.answer()

    def run(self, step: Step | None = None, layer: int = FIRST_LAYER) -> None:
        """One layer whose result must be right to the bit."""
        step = step or self.step()
        claim = self.dispatch.start(layer, *step)
        self.answer_all()
        assert torch.equal(self.dispatch.finish(claim), self.expected(step))

    def warm(self) -> None:
        """Have both ends of all links make their arenas: from here on what is ordinary needs no Python."""
        for _ in range(2):
            self.run(self.step(40))
        assert self.layers == (1 if self.exchange else 0)

    def close(self) -> None:
        self.dispatch.close()
        for host in self.hosts.values():
            host.close()
