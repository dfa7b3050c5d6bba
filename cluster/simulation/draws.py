"""What one MoE layer asks of the hosts, drawn from the skew and shared out over replicas by the routers' own function.

Drawing for each token of each layer of each step would take longer than the cluster itself, so there are three approximations:

* of the layers only some are drawn (`SAMPLED_LAYERS`, spread evenly, in turn), and a draw stands for several layers of a step;
* an expert's tokens are drawn from the multinomial distribution of its layer's shares, which forgets that the experts of one
  token differ (no expert gets more tokens than there are); from how many pairs a host gets follows how many distinct tokens
  it is sent, as if a token's experts were independent;
* draws are kept, `_KEPT` for each layer and number of tokens, and used again by chance; numbers of tokens above 32 are rounded
  to 32 classes for each power of two, by 1.1% at most.

None of the three numbers matters much: with 64 draws kept, all of R1's 58 layers and 512 classes, the throughput of 4 and of 8
routers on 16 hosts under a load like Zipf's law (0.8), without and with copies, was the same within 1.5%, the median time
between tokens within 2.5%, and its 99th percentile within 6%.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...actors.placement_table import PlacementTable
from ...actors.replica_choice import choose_replicas
from ...actors.routes import NO, YES, LayerRoutes, Routes
from ..planning.traffic import done_frame, work_frame
from ..replica_counts import Floats, Ints
from .costs import CostModel
from .skew import ExpertPopularity

SAMPLED_LAYERS = 8

_KEPT = 8
_EXACT_TOKENS = 32
_CLASSES = 32

ReplicaChoice = Literal["least_busy", "even"]
"""How an expert's tokens are shared out over its replicas: as Moray's routers do it, or equally, as others do."""


@dataclass(frozen=True, slots=True)
class Wire:
    """Bytes of the frames between a router and its hosts, as linear functions of what is in them.

    Attributes:
        sent_row: for each token that is sent to a host, once however many of its experts are there; sent_pair: for each
            (token, expert) pair; sent_frame: for each host.
        received_row, received_pair, received_frame: the same of the answers.
    """

    sent_row: float
    sent_pair: float
    sent_frame: float
    received_row: float
    received_pair: float
    received_frame: float

    @classmethod
    def of_moray(cls, hidden_size: int, dtype: object) -> Wire:
        """Moray's own, from the functions that lay its frames out."""
        import torch

        assert isinstance(dtype, torch.dtype)
        many = 1 << 14  # what frames are padded to does not show in so many

        def work(rows: int, pairs: int) -> int:
            return work_frame(rows, pairs, hidden_size, dtype).total

        def done(pairs: int) -> int:
            return done_frame(pairs, hidden_size, dtype).total

        row = (work(2 * many, many) - work(many, many)) / many
        pair = (work(many, 2 * many) - work(many, many)) / many
        answer = (done(2 * many) - done(many)) / many
        return cls(row, pair, work(1, 1) - row - pair, 0.0, answer, done(1) - answer)

    def sent(self, rows: float, pairs: float, frames: float) -> int:
        """Bytes of requests together."""
        return round(self.sent_row * rows + self.sent_pair * pairs + self.sent_frame * frames)

    def received(self, rows: float, pairs: float, frames: float) -> int:
        """Bytes of answers together."""
        return round(self.received_row * rows + self.received_pair * pairs + self.received_frame * frames)


@dataclass(frozen=True, slots=True)
class LayerDraw:
    """What one layer asks of the hosts.

    Attributes:
        hosts: [N] numbers of those that are asked.
        seconds: [N] that each computes.
        pairs: [N] (token, expert) pairs of each.
        dispatch_s, combine_s: of the links, there and back.
        balance: mean over maximum of the pairs of all hosts of the table.
    """

    hosts: Ints
    seconds: Floats
    pairs: Ints
    dispatch_s: float
    combine_s: float
    balance: float


class ExpertDraws:
    """Draws layers for one placement after another.

    Args:
        table: the placement to start with.
        numbers: of hosts, as the machines know them; grown as hosts come.
        popularity: the experts' shares.
        costs, wire, choice, top_k: of the cluster.
        routers: that share a draw in lockstep: the exchange is that of one of them. 1: each router draws for itself.
        seed: of what is drawn.

    Attributes:
        table: the placement in force.
        unreachable: (layer, expert) pairs that no host can be asked for.
        version: grows whenever other hosts are to be asked than before.
    """

    def __init__(
        self,
        table: PlacementTable,
        numbers: dict[str, int],
        *,
        popularity: ExpertPopularity,
        costs: CostModel,
        wire: Wire,
        choice: ReplicaChoice,
        top_k: int,
        routers: int = 1,
        seed: int,
    ) -> None:
        self._numbers = numbers
        self._popularity = popularity
        self._costs, self._wire, self._choice, self._top_k, self._routers = costs, wire, choice, top_k, routers
        self._generator = np.random.default_rng([seed, 2])
        self._phase = 0
        self._turn = 0
        self._lost: set[str] = set()
        self.version = 0
        self.adopt(table)

    def adopt(self, table: PlacementTable) -> None:
        """Use another placement from now on."""
        self.table = table
        self._routes = Routes(table)
        for host in self._routes.hosts:
            self._numbers.setdefault(host, len(self._numbers))
        self._ids = np.array([self._numbers[host] for host in self._routes.hosts], dtype=np.int64)
        sampled = min(SAMPLED_LAYERS, table.layers)
        self._layers = [index * table.layers // sampled for index in range(sampled)]
        self.exclude(self._lost & set(table.slots))

    def exclude(self, lost: Collection[str]) -> None:
        """Ask all hosts but these from now on."""
        self._lost = set(lost)
        self.version += 1
        self._askable = tuple(NO if host in self._lost else YES for host in self._routes.hosts)
        self.unreachable = self._routes.unreachable([host for host in self._routes.hosts if host not in self._lost])
        self._bank: dict[tuple[int, int], list[LayerDraw]] = {}

    def draw(self, tokens: int, now: float) -> LayerDraw:
        """One layer for so many tokens; every expert must be reachable."""
        assert not self.unreachable, f"{self.unreachable} experts are nowhere"
        phase = self._popularity.phase(now)
        if phase != self._phase:
            self._phase = phase
            self._bank.clear()
        self._turn += 1
        layer = self._layers[self._turn % len(self._layers)]
        rounded = _rounded(tokens)
        kept = self._bank.setdefault((layer, rounded), [])
        number = int(self._generator.integers(_KEPT))
        if number < len(kept):
            return kept[number]
        kept.append(self._new(layer, rounded))
        return kept[-1]

    def expected(self, now: float) -> Floats:
        """[L, E] share of each layer's pairs that each expert gets."""
        return self._popularity.shares(self._popularity.phase(now))

    def _new(self, layer: int, tokens: int) -> LayerDraw:
        shares = self._popularity.shares(self._phase)[layer]
        counts = draw_counts(shares, tokens, self._top_k, self._generator)
        routes = self._routes.of_layer(layer + self.table.first_layer, self._askable)
        experts = np.repeat(np.arange(len(counts)), counts)
        if self._choice == "least_busy":
            replica = choose_replicas(experts, routes.hosts, routes.count, load=counts)
        else:
            replica = _dealt_evenly(counts, routes)
        hosts, number = routes.hosts[replica, experts], len(self._ids)
        pairs = np.bincount(hosts, minlength=number)
        touched = np.bincount(hosts * len(counts) + experts, minlength=number * len(counts)) > 0
        distinct = touched.reshape(number, -1).sum(axis=1)
        asked = np.flatnonzero(pairs)
        dispatch_s, combine_s, link = self._exchange(tokens, pairs[asked])
        seconds = [self._costs.host_layer(int(pairs[host]), int(distinct[host])) for host in asked]
        return LayerDraw(
            hosts=self._ids[asked],
            seconds=np.maximum(seconds, link),
            pairs=pairs[asked],
            dispatch_s=dispatch_s,
            combine_s=combine_s,
            balance=float(pairs.mean() / pairs.max()),
        )

    def _exchange(self, tokens: int, pairs: Ints) -> tuple[float, float, Floats | float]:
        """Seconds there, seconds back, and [N] seconds that the hosts' own links take of their time.

        Args:
            tokens: of all routers that share the draw.
            pairs: [N] of each host that is asked.
        """
        # Each router's tokens, and its pairs for each host, on average.
        own, asked = tokens / self._routers, pairs / self._routers
        rows = own * (1 - (1 - np.minimum(1.0, asked / (own * self._top_k))) ** self._top_k)
        rows = np.minimum(np.maximum(rows, np.minimum(1.0, asked)), asked)
        frames = np.minimum(1.0, asked)
        count, wire = max(1, round(float(frames.sum()))), self._wire
        sent = wire.sent(float(rows.sum()), float(asked.sum()), float(frames.sum()))
        received = wire.received(float(rows.sum()), float(asked.sum()), float(frames.sum()))
        there, back = self._costs.exchange(sent, 0, count), self._costs.exchange(0, received, count)
        if self._costs.cores is not None:
            return there, back, 0.0  # copies within one machine: nobody's link
        exchange = self._costs.exchange
        if self._routers > 1:
            # In lockstep all meet at the busiest host, which has as much to send as to receive from each.
            busiest = int(np.argmax(pairs))
            of_host = float(rows[busiest]), float(asked[busiest]), float(frames[busiest])
            most_in, most_out = (of(*(part * self._routers for part in of_host)) for of in (wire.sent, wire.received))
            return max(there, exchange(most_in, 0, count)), max(back, exchange(0, most_out, count)), 0.0
        least_in, least_out = exchange(1, 0, 1), exchange(0, 1, 1)
        busy = [
            max(
                exchange(wire.sent(row, pair, 1), 0, 1) - least_in,
                exchange(0, wire.received(row, pair, 1), 1) - least_out,
            )
            for row, pair in zip(rows.tolist(), asked.tolist(), strict=True)
        ]
        return there, back, np.array(busy)


def draw_counts(shares: Floats, tokens: int, top_k: int, generator: np.random.Generator) -> Ints:
    """[E] tokens of each expert: `tokens * top_k` in all, none with more than `tokens`."""
    counts = generator.multinomial(tokens * top_k, shares / shares.sum())
    while over := int(np.maximum(counts - tokens, 0).sum()):
        counts = np.minimum(counts, tokens)
        room = np.where(counts < tokens, shares, 0.0)
        if not room.any():
            room = (counts < tokens).astype(np.float64)
        counts = counts + generator.multinomial(over, room / room.sum())
    return np.asarray(counts, dtype=np.int64)


def _dealt_evenly(counts: Ints, routes: LayerRoutes) -> Ints:
    """Replica of each pair, experts ascending: each expert's pairs are dealt out to its replicas in turn."""
    begin = np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray((np.arange(int(counts.sum())) - begin) % np.repeat(routes.count, counts), dtype=np.int64)


def _rounded(tokens: int) -> int:
    """The number of tokens that stands for all of its class."""
    if tokens <= _EXACT_TOKENS:
        return tokens
    return round(2 ** (round(math.log2(tokens) * _CLASSES) / _CLASSES))
