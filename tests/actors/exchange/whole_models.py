"""Models whose layers are run natively, and the same ones layer by layer, over shm links to hosts of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.expert_host import ExpertHost
from moray.actors.layer_run import LayerRun
from moray.actors.links import Link
from moray.actors.pending_experts import PendingExperts
from moray.actors.placement_table import PlacementTable
from moray.actors.testing import EngineParts
from moray.kernels.attention_plan import Segment
from moray.kernels.cpu.attention import BatchTables
from moray.model.cpu_block import CpuLayer
from moray.model.transformer import ForwardBatch, Transformer

from .played_hosts import Clock, lent, new_exchange, wait_until
from .real_hosts import run, step

PAGE, PAGES_OF_ONE = 8, 12
"""Each sequence has pages of its own."""


def batch(*segments: tuple[int, int, int], seed: int = 0) -> ForwardBatch:
    """Of (sequence, position of the first token, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    made, tokens = [], 0
    for sequence, position, length in segments:
        pages = range(PAGES_OF_ONE * sequence, PAGES_OF_ONE * (sequence + 1))
        made.append(Segment(tokens, length, position, tuple(pages)))
        tokens += length
    ids: list[int] = torch.randint(0, 272, (tokens,), generator=generator).tolist()
    return ForwardBatch(ids, made, [segment.start + segment.length - 1 for segment in made])


def batches() -> list[ForwardBatch]:
    """Prompts and single tokens, alone and together, smaller after larger and the reverse; each after those before it."""
    return [
        batch((0, 0, 1)),
        batch((0, 1, 5), seed=1),
        batch((0, 6, 1), seed=2),
        batch((1, 0, 40), seed=3),
        batch((0, 7, 1), (1, 40, 1), (2, 0, 17), (3, 0, 2), seed=4),
        batch((0, 8, 1), (1, 41, 1), (2, 17, 1), (3, 2, 1), seed=5),
        batch((3, 3, 1), seed=6),
    ]


class Model:
    """A model with a dispatch of its own to some hosts.

    Args:
        native: whether there is an exchange; whole: whether it takes all layers at once.

    Attributes:
        ran: of every batch whether its layers were run.
    """

    def __init__(
        self,
        parts: EngineParts,
        table: PlacementTable,
        links: Mapping[str, Link],
        *,
        native: bool = True,
        whole: bool = True,
        **settings: Any,
    ) -> None:
        self.clock = Clock()
        self.exchange = new_exchange() if native else None
        self.dispatch = ExpertDispatch(table, links, reply_timeout_s=20.0, exchange=self.exchange, clock=self.clock)
        self.ran: list[bool] = []
        self.transformer = Transformer(
            parts.config,
            parts.weights,
            self.dispatch,
            pages=4 * PAGES_OF_ONE,
            page_size=PAGE,
            max_context=96,
            compute=parts.compute,
            run_layers=self._run if whole else None,
            **settings,
        )
        self.routed = len(parts.config.moe_layers)

    def _run(self, layers: Sequence[CpuLayer], numbers: range, hidden_states: torch.Tensor, batch: BatchTables) -> bool:
        ran = self.dispatch.run_layers(layers, numbers, hidden_states, batch)
        self.ran.append(ran)
        return ran

    @property
    def layers(self) -> int:
        """How many were asked for and summed natively."""
        return self.exchange.layers if self.exchange else 0

    def warm(self) -> None:
        """Have both ends of all links make arenas for 40 tokens and more: from here on what is ordinary needs no Python."""
        hidden_states, _, weights = step(128)
        first = self.dispatch.table.first_layer
        for _ in range(10):  # of which enough is known of each host to tell when it is late
            run(self.dispatch, (hidden_states, torch.arange(256).remainder(8).view(128, 2), weights), first)

    def assert_settled(self) -> None:
        """Nothing is owed, and no link is in use."""
        assert lent(self.dispatch) == []
        wait_until(self._settled)

    def _settled(self) -> bool:
        self.dispatch.check()
        return self.dispatch._hosts.idle


def outputs(model: Model, some: Sequence[ForwardBatch]) -> list[torch.Tensor]:
    """Of each batch the hidden states and logits, and at last the whole cache."""
    found = []
    for one in some:
        found.append(model.transformer.hidden_states(one).clone())
        found.append(model.transformer.forward(one))
    return [*found, model.transformer.cache.clone()]


def assert_equal(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    """To the bit."""
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), f"output {number}"


class Models:
    """Hosts, and models that use them.

    Args:
        parts: with a packed model.
    """

    def __init__(
        self, parts: EngineParts, hosts: int, *, replicas: int = 1, table: PlacementTable | None = None
    ) -> None:
        self.parts = parts
        self.table = table or parts.table(hosts, replicas=replicas)
        self.hosts = [parts.host(host, self.table) for host in self.table.slots]
        self.made: list[Model] = []

    def model(self, **options: Any) -> Model:
        """One that is warm."""
        links = {host.host_id: self.parts.link(host, "shm") for host in self.hosts}
        self.made.append(Model(self.parts, self.table, links, **options))
        self.made[-1].warm()
        return self.made[-1]

    def close(self) -> None:
        """Close the links."""
        for model in self.made:
            model.dispatch.close()


def run_of(dispatch: ExpertDispatch) -> LayerRun:
    """What takes batches through all layers."""
    assert dispatch._driver is not None, "a dispatch with an exchange"
    return dispatch._driver.run


def after_layer(model: Model, number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something between this layer and the next, once: the layer is asked for by Python, the others natively."""
    run, dispatch, left = run_of(model.dispatch), model.dispatch, [action]
    describe, finish = run.describe, dispatch.finish
    own: list[tuple[Any, int]] = []

    def leave_one(*arguments: Any) -> None:
        describe(*arguments)
        for described in run._described:
            if described.number == number and left and described.routes.keys:
                own.append((described.routes, described.routes.keys))
                described.routes.keys = None

    def finish_and_act(claim: PendingExperts) -> torch.Tensor:
        found = finish(claim)
        if claim.layer == number and left:
            for routes, keys in own:
                routes.keys = keys
            left.pop()()
        return found

    monkeypatch.setattr(run, "describe", leave_one)
    monkeypatch.setattr(dispatch, "finish", finish_and_act)
    run._layers = ()  # as if they had not been described


class Stuck:
    """A host computes nothing from `begin` to `end`, whichever threads call them."""

    def __init__(self, host: ExpertHost) -> None:
        self._turn = host._one_at_a_time
        self._thread = ThreadPoolExecutor(1)  # whose turn it is then
        self._held = False

    def begin(self) -> None:
        """Once it has computed what it was about to."""
        self._thread.submit(self._turn.__enter__).result(20)
        self._held = True

    def end(self) -> None:
        """Idempotent."""
        if self._held:
            self._held = False
            self._thread.submit(self._turn.__exit__, None, None, None).result(20)

    def close(self) -> None:
        """As `end`, and for good."""
        self.end()
        self._thread.shutdown()
