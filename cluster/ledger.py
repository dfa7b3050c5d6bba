"""What a controller must know to take over from one that died: kept where it outlives every process of ours.

Written before anything depends on it: a process as soon as it is started, a table before the first router uses it. So the
record may name what is not there any more, never miss what is; whoever reads it looks which of it still lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgpack

from ..actors.links import LinkAddress
from ..actors.placement_table import PlacementTable

Role = Literal["expert_host", "router"]


@dataclass(frozen=True, slots=True)
class KeptProcess:
    """One process of the cluster.

    Attributes:
        actor: name of its Ray actor, unique to this incarnation.
        addresses: where a host listens for links; empty before it does, and for routers.
        address: where a router's front channel is; empty before it serves, and for hosts.
    """

    name: str
    role: Role
    actor: str
    addresses: tuple[LinkAddress, ...] = ()
    address: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A cluster as its controller left it.

    Attributes:
        generation: of the controller that wrote it: one more with every takeover.
        deployment: the description it runs, as plain data.
        secret: of its links and channels; not shown in a repr.
        table: in force, or about to be: every host of it has loaded its slots.
        replicas: copies that were asked for, by (model layer, expert).
        wanted_hosts, wanted_cold: expert hosts there should be, without those of the cold tier, and of it; more than the
            table has where some could not be restored.
        processes: all that were started and not yet ended.
        standby: actor names of the warm processes.
    """

    generation: int
    deployment: dict[str, Any]
    secret: bytes = field(repr=False)
    table: PlacementTable
    replicas: dict[tuple[int, int], int]
    wanted_hosts: int
    wanted_cold: int
    processes: tuple[KeptProcess, ...]
    standby: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """As bytes."""
        packed: bytes = msgpack.packb(
            {
                "generation": self.generation,
                "deployment": self.deployment,
                "secret": self.secret,
                "table": self.table.to_dict(),
                "replicas": [[layer, expert, copies] for (layer, expert), copies in self.replicas.items()],
                "wanted_hosts": self.wanted_hosts,
                "wanted_cold": self.wanted_cold,
                "processes": [
                    [p.name, p.role, p.actor, [[a.kind, a.endpoint, a.machine] for a in p.addresses], p.address]
                    for p in self.processes
                ],
                "standby": list(self.standby),
            }
        )
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """The record in `data`, which `pack` made."""
        raw = msgpack.unpackb(data)
        table = raw["table"]
        return cls(
            generation=raw["generation"],
            deployment=raw["deployment"],
            secret=raw["secret"],
            table=PlacementTable(
                table["epoch"],
                table["first_layer"],
                table["experts"],
                {host: _slots(layers) for host, layers in table["slots"].items()},
            ),
            replicas={(layer, expert): copies for layer, expert, copies in raw["replicas"]},
            wanted_hosts=raw["wanted_hosts"],
            wanted_cold=raw["wanted_cold"],
            processes=tuple(
                KeptProcess(name, role, actor, tuple(LinkAddress(*parts) for parts in addresses), address)
                for name, role, actor, addresses, address in raw["processes"]
            ),
            standby=tuple(raw["standby"]),
        )


def _slots(layers: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(layer) for layer in layers)


class Ledger(Protocol):
    """Where the record is kept; the last one written is the one that is read."""

    def read(self) -> Record | None:
        """The record, or None if there is none."""

    def write(self, record: Record) -> None:
        """Keep this one from now on."""

    def forget(self) -> None:
        """Keep none: the cluster has ended."""


class MemoryLedger:
    """A ledger that lasts as long as this object."""

    def __init__(self) -> None:
        self._data: bytes | None = None

    def read(self) -> Record | None:
        """See `Ledger.read`."""
        return None if self._data is None else Record.unpack(self._data)

    def write(self, record: Record) -> None:
        """See `Ledger.write`."""
        self._data = record.pack()

    def forget(self) -> None:
        """See `Ledger.forget`."""
        self._data = None


class RayLedger:
    """A ledger in the key-value store of Ray's head, which lasts as long as the Ray cluster (where Serve keeps its own).

    Args:
        application: name of the Serve application, which is the key.
    """

    _NAMESPACE = b"moray"

    def __init__(self, application: str) -> None:
        self._key = f"cluster:{application}".encode()

    def read(self) -> Record | None:
        """See `Ledger.read`."""
        from ray.experimental.internal_kv import _internal_kv_get

        data = _internal_kv_get(self._key, namespace=self._NAMESPACE)
        return None if data is None else Record.unpack(data)

    def write(self, record: Record) -> None:
        """See `Ledger.write`."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key, record.pack(), overwrite=True, namespace=self._NAMESPACE)

    def forget(self) -> None:
        """See `Ledger.forget`."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self._key, namespace=self._NAMESPACE)
