"""Which experts a host holds, by placement epoch: what is served, and what becomes of loads while that changes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..configs.errors import ClusterError
from ..kernels.experts import ExpertWeights, MlpWeights
from .expert_queue import Key
from .expert_table import ExpertTable
from .placement_table import EMPTY
from .weight_copy import resident_bytes

logger = logging.getLogger("moray.expert_host")

_SAY_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What one placement epoch has here: MLPs by (layer, logical expert), and the same by layer and slot."""

    experts: Mapping[Key, MlpWeights]
    layers: Mapping[int, ExpertWeights]


class Loading:
    """One load, from the call that asked for it until it has been added or has failed."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.ended_by = ""

    def check(self) -> None:
        """Go on.

        Raises:
            ClusterError: nobody wants its epoch any more.
        """
        if self.ended_by:
            raise ClusterError(f"loading epoch {self.epoch} was given up: {self.ended_by}")


class HeldExperts:
    """The epochs a host serves. Any thread may read or change them; what a reader has got does not change under it."""

    def __init__(self) -> None:
        self._epochs: dict[int, _Epoch] = {}  # replaced as a whole, never changed in place
        self._table = ExpertTable({})  # of the epochs above
        self._resident_bytes = 0
        self._loads: list[Loading] = []  # the one that runs and those that wait for their turn, in this order
        self._changed = threading.Condition()  # guards all above; readers of `_epochs` and `_table` do without

    @property
    def epochs(self) -> tuple[int, ...]:
        """Served now, the oldest first."""
        return tuple(sorted(self._epochs))

    @property
    def resident_bytes(self) -> int:
        """Of the experts of all epochs; one that several share counts once."""
        return self._resident_bytes

    @property
    def table(self) -> ExpertTable:
        """All of it for native code. Whoever has it keeps what is retired in memory: see `ExpertTable`."""
        return self._table

    def renew_table(self) -> None:
        """Have native code that works with the table return to Python soon, for something that only Python looks at."""
        with self._changed:
            self._replace(self._epochs)

    def layer(self, epoch: int, layer: int) -> ExpertWeights:
        """The experts in the slots of one layer.

        Raises:
            ValueError: the epoch is not served.
            KeyError: the layer has no routed experts.
        """
        epochs = self._epochs
        if epoch not in epochs:
            raise ValueError(f"placement epoch {epoch} is not served here; {sorted(epochs)} are")
        return epochs[epoch].layers[layer]

    def find(self, layer: int, expert: int) -> MlpWeights | None:
        """One expert, from any epoch."""
        return next(
            (held.experts[layer, expert] for held in self._epochs.values() if (layer, expert) in held.experts), None
        )

    def all(self) -> dict[Key, MlpWeights]:
        """Every expert of every epoch."""
        return {key: weights for held in self._epochs.values() for key, weights in held.experts.items()}

    @contextmanager
    def loading(self, epoch: int) -> Iterator[Loading]:
        """The turn of a load for `epoch`: loads run one after the other, so that the second uses what the first has read.

        Raises:
            ClusterError: the epoch was given up while the load waited.
        """
        load = Loading(epoch)
        with self._changed:
            self._loads.append(load)
        try:
            self._await_turn(load)
            yield load
        finally:
            with self._changed:
                load.ended_by = (
                    load.ended_by or "its caller is gone"
                )  # which matters if it was interrupted while others work
                self._loads.remove(load)
                self._changed.notify_all()

    def add(
        self, load: Loading, layers: Sequence[int], slots: Sequence[Sequence[int]], experts: Mapping[Key, MlpWeights]
    ) -> None:
        """Serve what was loaded: for each of `layers` the expert in each slot, or `EMPTY`, out of `experts`.

        Raises:
            ClusterError: the epoch was given up; nothing has changed.
        """
        of_layers = list(zip(layers, slots, strict=True))
        wanted = {
            (layer, expert): experts[layer, expert] for layer, held in of_layers for expert in held if expert != EMPTY
        }
        placed = {
            layer: ExpertWeights({s: wanted[layer, expert] for s, expert in enumerate(held) if expert != EMPTY})
            for layer, held in of_layers
        }
        with self._changed:
            load.check()
            self._replace({**self._epochs, load.epoch: _Epoch(wanted, placed)})

    def retire(self, epoch: int) -> None:
        """Serve `epoch` alone: the others are dropped, and loads for earlier ones given up. Loads for later ones go on."""
        with self._changed:
            self._replace({served: held for served, held in self._epochs.items() if served == epoch})
            self._end_loads(
                {load.epoch for load in self._loads if load.epoch < epoch}, f"epoch {epoch} is served alone"
            )

    def abandon(self, epoch: int) -> None:
        """Drop `epoch`, and give up loads for it."""
        with self._changed:
            self._replace({served: held for served, held in self._epochs.items() if served != epoch})
            self._end_loads({epoch}, "it was abandoned")

    def end_loads(self, reason: str) -> None:
        """Give up every load that runs or waits."""
        with self._changed:
            self._end_loads({load.epoch for load in self._loads}, reason)

    def _replace(self, epochs: dict[int, _Epoch]) -> None:
        superseded = self._table
        self._epochs = epochs
        self._table = ExpertTable({epoch: held.layers for epoch, held in epochs.items()})
        superseded.supersede()
        unique = {id(weights): weights for held in epochs.values() for weights in held.experts.values()}
        self._resident_bytes = sum(map(resident_bytes, unique.values()))

    def _end_loads(self, epochs: set[int], reason: str) -> None:
        for load in self._loads:
            if load.epoch in epochs:
                load.ended_by = load.ended_by or reason
        self._changed.notify_all()

    def _await_turn(self, load: Loading) -> None:
        started = time.monotonic()
        with self._changed:
            while self._loads[0] is not load:
                load.check()
                if not self._changed.wait(_SAY_EVERY_S):
                    logger.info(
                        "event=load_waits epoch=%d for_epoch=%d duration_s=%.1f",
                        load.epoch,
                        self._loads[0].epoch,
                        time.monotonic() - started,
                    )
            load.check()
