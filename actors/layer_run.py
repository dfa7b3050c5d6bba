"""A step through all layers of a packed model without the interpreter: attention, shared experts, frames to hosts, sums.

Between two native calls Python takes tens of microseconds, since a layer's weights have left nothing of it in the caches: five
calls a layer were a seventh of a step of one token. What one layer cannot do natively, `ExpertDispatch` does, and the layers
after it go on here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import Array, byref, pointer

import numpy as np
import torch

from ..kernels.cpu.attention import BatchTables
from ..kernels.cpu.library import NativeLibrary, native
from ..model.cpu_block import CpuLayer
from .host_line import HostLine
from .native_exchange import NativeExchange
from .native_library import ActorsLibrary, Outcome, Run, RunLayer, Stage, actors_library
from .routes import IntArray, LayerRoutes

_WAIT_US = 50_000
"""A wait for a layer's replies goes on in Python after so long. No host is late before (`HostLatency.limits_s`)."""


class LayerRun:
    """One batch at a time on its way through the layers. For the router's thread.

    Args:
        exchange: for the frames of these layers, and of those that are asked for one by one.
    """

    def __init__(self, library: ActorsLibrary, kernels: NativeLibrary, exchange: NativeExchange) -> None:
        self.exchange = exchange
        self._library = library
        self._run = Run(
            attention=kernels.attention_address,
            swiglu=kernels.swiglu_address,
            add=kernels.add_address,
            exchange=pointer(exchange.structure),
            wait_us=_WAIT_US,
        )
        self._reference = byref(self._run)
        self._layers: Sequence[CpuLayer] = ()
        self._routes: Mapping[int, LayerRoutes] = {}
        self._described: Array[RunLayer] = (RunLayer * 0)()
        self._lines: Sequence[HostLine | None] = ()
        self._answered: IntArray = np.zeros((0, 0, 2), dtype=np.int64)
        self._top_k = self._tokens = self._epoch = self._from = 0
        self._room: tuple[torch.Tensor, ...] = ()

    def describe(
        self, layers: Sequence[CpuLayer], routes: Mapping[int, LayerRoutes], load: Callable[[int], int]
    ) -> None:
        """Say what the layers are, and for those with experts where to ask for them, and where pairs are counted.

        Args:
            routes: by layer, not empty; the same object as before for as long as it says the same.
            load: address of int64 [E] for each layer.
        """
        if layers is self._layers and routes is self._routes:
            return
        self._layers, self._routes = layers, routes
        self._top_k = max((layer.top_k for layer in layers), default=0)
        self._described = (RunLayer * len(layers))()
        for described, layer in zip(self._described, layers, strict=True):
            described.attention, described.cache, described.mlp = layer.attention, layer.cache, layer.mlp
            described.number = layer.number
            if layer.top_k:
                native_routes = routes[layer.number].native
                assert native_routes is not None, "as whoever calls has seen"
                described.routed, described.routes = 1, native_routes
                described.load = load(layer.number)
        self._run.layers = self._described

    def begin(self, numbers: range, hidden_states: torch.Tensor, batch: BatchTables, *, hosts: int, epoch: int) -> None:
        """Begin with hidden_states [T, H], contiguous bf16, which change on the way; both must live until the end.

        Args:
            numbers: of the layers to go through, which follow each other.
            hosts: of the routes.
            epoch: of the placement.
        """
        run, (tokens, hidden) = self._run, hidden_states.shape
        self._make_room(tokens, hidden)
        if self._answered.shape[:2] != (len(self._layers), hosts):
            self._answered = np.zeros((len(self._layers), hosts, 2), dtype=np.int64)
            run.answered = self._answered.ctypes.data
        self._answered.fill(0)
        self._epoch, self._tokens = epoch, tokens
        run.layer, run.count = numbers.start, numbers.stop
        run.stage = run.asked = run.last_wait_ns = run.leave_asking = 0
        run.batch, run.hidden = batch.address, hidden_states.data_ptr()

    def go(self, lines: Sequence[HostLine | None], sequence: int) -> bool:
        """Go on as far as possible; whether that is to the end of the last of them.

        Args:
            lines: of the hosts of the routes; None where there is no link.
            sequence: of the last frame before.
        """
        exchange, self._lines, self._from = self.exchange, lines, self._run.layer
        self._run.waited_ns = 0
        normed, ids, weights = self._rows(3)
        exchange.describe(normed, ids, weights, self._lines, epoch=self._epoch, sequence=sequence)
        exchange.lend()
        try:
            return bool(self._library.run_layers(self._reference) == Outcome.DONE)
        finally:
            exchange.take_back()

    # ---- where `go` has left a layer --------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """What is to be done: ASK, or COLLECT."""
        return Stage(self._run.stage)

    @property
    def asked_natively(self) -> bool:
        """Whether experts of the layer have been asked for by `go`, at least of one host, and not been handed over."""
        return bool(self._run.asked)

    @property
    def last_wait_s(self) -> float:
        """How long the layer has been waited for."""
        return float(self._run.last_wait_ns) / 1e9

    @property
    def patience_s(self) -> float:
        """How long a wait is at most."""
        return _WAIT_US / 1e6

    def work(self) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The layer's number, and what its experts are to be asked for: hidden states [T, H], topk_ids, topk_weights [T, K]."""
        return (self._layers[self._run.layer].number, *self._rows(3))

    def has_asked(self) -> None:
        """The layer's experts have been asked for elsewhere."""
        self._run.stage = int(Stage.COLLECT)

    def hand_over(self) -> None:
        """What was asked for natively is collected elsewhere."""
        self._run.asked = 0

    def has_collected(self, routed: torch.Tensor) -> None:
        """Here is their sum [T, H] in fp32."""
        self._rows(5)[4].copy_(routed)
        self._run.stage = int(Stage.ADD)

    @property
    def leaves_asking(self) -> bool:
        """Whether `go` asks for nothing: experts are asked for elsewhere, layer by layer."""
        return bool(self._run.leave_asking)

    @leaves_asking.setter
    def leaves_asking(self, leaves: bool) -> None:
        self._run.leave_asking = leaves

    # ---- what has come of the last `go` ------------------------------------------------------------------------------

    @property
    def waited_s(self) -> float:
        """How long all its waits have been."""
        return float(self._run.waited_ns) / 1e9

    def answers(self) -> Iterator[tuple[HostLine, int, float]]:
        """Of what was collected natively: a host's line, the pairs that it has answered at once, and how long that took."""
        for layer in self._collected.tolist():
            for line, (pairs, nanoseconds) in zip(self._lines, layer, strict=True):
                if line is not None and pairs:
                    yield line, pairs, nanoseconds / 1e9

    @property
    def collected(self) -> int:
        """How many layers were collected natively."""
        return int(np.count_nonzero(self._collected[:, :, 0].any(axis=1)))

    @property
    def _collected(self) -> IntArray:
        return self._answered[self._from : self._run.layer]

    def _rows(self, count: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[: self._tokens] for tensor in self._room[:count])

    def _make_room(self, tokens: int, hidden: int) -> None:
        """Normed states, ids, weights, what shared experts give and what routed ones give: of so many tokens and more."""
        if self._room and self._room[0].shape[0] >= tokens and self._room[1].shape[1] == self._top_k:
            return
        rows, run = max(64, 2 * tokens), self._run
        with torch.inference_mode(False):
            self._room = (
                torch.empty((rows, hidden), dtype=torch.bfloat16),
                torch.empty((rows, self._top_k), dtype=torch.int64),
                torch.empty((rows, self._top_k), dtype=torch.float32),
                torch.empty((rows, hidden), dtype=torch.float32),
                torch.empty((rows, hidden), dtype=torch.float32),
            )
        run.normed, run.experts, run.weights, run.shared, run.routed = (tensor.data_ptr() for tensor in self._room)


def layer_run(exchange: NativeExchange) -> LayerRun:
    """One over the frames of `exchange`, with whose libraries it comes."""
    library, kernels = actors_library(), native()
    assert library is not None, "as there is an exchange"
    assert kernels is not None, "as there is an exchange"
    return LayerRun(library, kernels, exchange)
