"""The placement table as arrays: for one layer, the replicas of every expert among the hosts that can be asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from .native_library import NativeRoutes
from .placement_table import EMPTY, PlacementTable

IntArray = npt.NDArray[np.int64]

NO, IF_NEED_BE, IF_NOT_ELSEWHERE, YES = range(4)
"""Whether a host can be asked, the better the higher: an expert is asked of the best hosts alone that have it."""


@dataclass(frozen=True, slots=True)
class LayerRoutes:
    """Where one layer's experts can be asked for.

    Attributes:
        hosts, slots: [R, E] index of the host of each replica, and its slot there; from `count` on they mean nothing.
        count: [E] replicas that can be asked; 0 for experts that nobody can be asked for.
        keys: [R, E] host * width + slot, so that sorting by it groups by host, then by slot.
        native: the same for native code, where keys are 16 bits; else None.
        first_keys: [hosts + 1] the least key of each host, and one more than the greatest of the last.
        width: slots that keys have room for, as many for every host.
        complete: whether every expert can be asked for.
        single: whether no expert has more than one replica, so that there is nothing to choose.
    """

    hosts: IntArray
    slots: IntArray
    count: IntArray
    keys: npt.NDArray[np.integer]
    native: NativeRoutes | None
    first_keys: npt.NDArray[np.integer]
    width: int
    complete: bool
    single: bool


class Routes:
    """Looks up replicas in `table`, whose Python form is too slow for every step.

    Attributes:
        hosts: ids of the table's hosts; their indices are used everywhere else.
    """

    def __init__(self, table: PlacementTable) -> None:
        self.hosts = tuple(table.slots)
        self._first_layer = table.first_layer
        shape = table.layers, table.experts
        # Every slot of the table as one row of four columns, in the order of hosts, layers and slots.
        held = [
            (len(experts), host, layer)
            for host, layers in enumerate(table.slots.values())
            for layer, experts in enumerate(layers)
        ]
        lengths, host_of, layer_of = np.array(held, dtype=np.int64).reshape(-1, 3).T
        slots = int(lengths.sum())
        expert = np.fromiter(chain.from_iterable(chain.from_iterable(table.slots.values())), np.int64, slots)
        slot = np.arange(slots) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        host, layer = np.repeat(host_of, lengths), np.repeat(layer_of, lengths)
        # Replicas of one expert side by side, in the order of hosts; `rank` numbers them.
        order = np.flatnonzero(expert != EMPTY)
        order = order[np.argsort(layer[order] * table.experts + expert[order], kind="stable")]
        layer, expert, host, slot = layer[order], expert[order], host[order], slot[order]
        replicas = np.bincount(layer * table.experts + expert, minlength=shape[0] * shape[1])
        rank = np.arange(len(expert)) - np.repeat(np.cumsum(replicas) - replicas, replicas)
        widest = int(replicas.max(initial=1))
        # Where an expert has fewer replicas than others, a host that does not exist and is never to be asked.
        self._hosts = np.full((shape[0], widest, shape[1]), len(self.hosts), dtype=np.int64)
        self._slots = np.zeros_like(self._hosts)
        self._hosts[layer, rank, expert] = host
        self._slots[layer, rank, expert] = slot
        self._width = int(self._slots.max(initial=0)) + 1
        first_keys = np.arange(len(self.hosts) + 1) * self._width
        # Sorting 16 bits is several times faster than 64; the last host is the one that does not exist.
        small = first_keys[-1] + self._width <= np.iinfo(np.uint16).max
        self._first_keys: npt.NDArray[np.integer] = first_keys.astype(np.uint16 if small else np.int64)
        self._made: dict[int, LayerRoutes] = {}
        self._chosen: dict[int, LayerRoutes] = {}
        self._made_for: tuple[int, ...] = ()

    def unreachable(self, reachable: Collection[str]) -> int:
        """(layer, expert) pairs with no replica on any of the `reachable` hosts. For any thread."""
        has = np.array([host in reachable for host in self.hosts] + [False])
        return int(np.count_nonzero(~has[self._hosts].any(axis=1)))

    def of_layer(self, layer: int, askable: tuple[int, ...]) -> LayerRoutes:
        """Where the experts of a model layer can be asked for, given `NO` to `YES` for each of the hosts.

        What was found is kept for as long as the same hosts are asked for: nearly always.
        """
        if askable != self._made_for:
            self._made.clear()
            self._chosen = {}
            self._made_for = askable
        found = self._made.get(layer)
        if found is None:
            found = self._made[layer] = self._find(layer - self._first_layer, askable)
        return found

    def of_layers(self, layers: Collection[int], askable: tuple[int, ...]) -> Mapping[int, LayerRoutes]:
        """`of_layer` for each of these: the same object for as long as nothing has changed."""
        if askable != self._made_for or self._chosen.keys() != set(layers):
            self._chosen = {layer: self.of_layer(layer, askable) for layer in layers}
        return self._chosen

    def _find(self, index: int, askable: tuple[int, ...]) -> LayerRoutes:
        hosts = self._hosts[index]
        level = np.array([*askable, NO], dtype=np.int64)[hosts]
        kept = (level == level.max(axis=0)) & (level > NO)
        first = np.argsort(~kept, axis=0, kind="stable")
        chosen, slots = np.take_along_axis(hosts, first, axis=0), np.take_along_axis(self._slots[index], first, axis=0)
        count = kept.sum(axis=0)
        keys = (chosen * self._width + slots).astype(self._first_keys.dtype)
        complete, single = bool(count.all()), bool(count.max(initial=0) <= 1)
        native = None
        if keys.dtype == np.uint16:
            most, experts = keys.shape
            most = 1 if single else most
            native = NativeRoutes(keys.ctypes.data, count.ctypes.data, most, experts, self._width, len(self.hosts))
        return LayerRoutes(chosen, slots, count, keys, native, self._first_keys, self._width, complete, single)
