"""Expert hosts that do what a test says, behind links whose waits pass time on a clock of the test's own.

An expert multiplies hidden states by its number plus one, so that whoever computes a pair is checked by equality.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from moray.actors.deadline import Deadline
from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.links.base import FRAMES_IN_FLIGHT, Frame, Link
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.placement_table import PlacementTable
from moray.configs.errors import LinkError, PeerDiedError
from moray.kernels.combine import combine

FIRST_LAYER, LAYERS, HIDDEN = 3, 2, 8


class Clock:
    """Time that passes only where a test, or a wait, says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ScriptedHost(Link):
    """An expert host and the router's link to it.

    Attributes:
        takes_s: how long an answer takes.
        frozen: it neither reads nor answers, like a stopped process.
        dead: the link breaks.
        dies_when_sent: it dies at the next frame that is sent to it.
        refuses: it answers that it cannot.
        before_wait: called at the beginning of each wait on it.
        seen: layers it was asked for, one entry for each frame.
    """

    kind = "inline"

    def __init__(self, host: str, table: PlacementTable, clock: Clock) -> None:
        self.peer = host
        self.takes_s = 0.004
        self.frozen = self.dead = self.dies_when_sent = self.refuses = self.closed = False
        self.before_wait: Callable[[float], None] = lambda seconds: None
        self.seen: list[int] = []
        self._table = table
        self._clock = clock
        self._unread: deque[Frame] = deque()
        self._answers: deque[tuple[float, Frame]] = deque()

    def serve(self, table: PlacementTable) -> None:
        """Know the slots of one more epoch, as hosts do before a router adopts it."""
        self._table = table

    def send(self, header: bytes, tensors: Sequence[torch.Tensor], *, deadline: Deadline) -> None:
        self.check()
        if self.dies_when_sent:
            self.dead = True
            self.check()
        assert len(self._unread) < FRAMES_IN_FLIGHT, f"{self.peer}: this send would have had to wait"
        assert len(self._unread) + len(self._answers) < 2 * FRAMES_IN_FLIGHT, f"{self.peer}: replies are left unread"
        self.seen.append(MoeHeader.unpack(header).layer)
        self._unread.append(Frame(header, tuple(t.clone() for t in tensors)))

    def wait(self, *, deadline: Deadline) -> bool:
        seconds = deadline.remaining()
        self.before_wait(seconds)
        self.check()
        while self._unread and not self.frozen:
            self._answers.append((self._clock.now + self.takes_s, self._answer(self._unread.popleft())))
        if self._answers and not self.frozen and self._answers[0][0] <= self._clock.now + seconds:
            self._clock.now = max(self._clock.now, self._answers[0][0])
            return True
        if seconds:
            self._clock.now += seconds + 1e-3
        return False

    def recv(self, *, deadline: Deadline) -> Frame:
        assert self.wait(deadline=Deadline.after(0)), "recv without a frame would block"
        return self._answers.popleft()[1]

    def check(self) -> None:
        if self.closed:
            raise LinkError(self.peer, "was closed on this side")
        if self.dead:
            raise PeerDiedError(self.peer, "closed the connection")

    def close(self) -> None:
        self.closed = True

    def _answer(self, frame: Frame) -> Frame:
        header = MoeHeader.unpack(frame.header)
        if self.refuses:
            return Frame(header._replace(kind=Kind.FAILED, reason="out of memory").pack(), ())
        hidden_states, (rows, slots) = frame.tensors
        assert bool((slots.diff() >= 0).all()), "slots ascend"
        held = torch.tensor(self._table.slots[self.peer][header.layer - FIRST_LAYER])
        factors = (held[slots.long()] + 1).to(hidden_states.dtype)
        return Frame(header._replace(kind=Kind.DONE).pack(), (hidden_states[rows.long()] * factors[:, None],))


class ScriptedCluster:
    """A dispatch and its hosts.

    Args:
        held: for each host the experts it has, in every layer.
    """

    def __init__(self, *held: Sequence[int], reply_timeout_s: float = 10.0, warm: bool = True) -> None:
        self.clock = Clock()
        self.experts = max(map(max, held)) + 1
        self.table = self.place(1, *held)
        self.hosts = {host: ScriptedHost(host, self.table, self.clock) for host in self.table.slots}
        self.dispatch = ExpertDispatch(self.table, self.hosts, reply_timeout_s=reply_timeout_s, clock=self.clock)
        self._generator = torch.Generator().manual_seed(0)
        if warm:
            for _ in range(20):
                self.run()
            for host in self.hosts.values():
                host.seen.clear()

    def place(self, epoch: int, *held: Sequence[int]) -> PlacementTable:
        slots = {f"h{i}": (tuple(experts),) * LAYERS for i, experts in enumerate(held)}
        return PlacementTable(epoch, FIRST_LAYER, self.experts, slots)

    def __getitem__(self, host: int) -> ScriptedHost:
        return self.hosts[f"h{host}"]

    def step(self, tokens: int = 6, experts: Sequence[int] | None = None) -> tuple[torch.Tensor, ...]:
        """Inputs of one layer: hidden states, top-2 of `experts` (all, by default), weights."""
        among = torch.tensor(range(self.experts) if experts is None else experts)
        picked = [torch.randperm(len(among), generator=self._generator)[:2] for _ in range(tokens)]
        weights = torch.rand(tokens, 2, generator=self._generator)
        return torch.randn(tokens, HIDDEN, generator=self._generator), among[torch.stack(picked)], weights

    def run(self, layer: int = FIRST_LAYER, **options: object) -> float:
        """One layer, whose result must be right to the bit; the time it took."""
        began = self.clock.now
        hidden_states, topk_ids, weights = self.step(**options)  # type: ignore[arg-type]
        found = self.dispatch.finish(self.dispatch.start(layer, hidden_states, topk_ids, weights))
        outputs = hidden_states[:, None] * (topk_ids + 1).to(torch.float32)[:, :, None]
        assert torch.equal(found, combine(outputs, weights))
        return self.clock.now - began

    def relink(self, host: int) -> ScriptedHost:
        """A new link to a host, which has nothing wrong with it."""
        name = f"h{host}"
        self.hosts[name] = ScriptedHost(name, self.dispatch.table, self.clock)
        self.dispatch.set_link(name, self.hosts[name])
        return self.hosts[name]
