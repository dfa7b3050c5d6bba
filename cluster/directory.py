"""Where the routers are: what a front asks the controller for. Apart from what only the controller needs, torch above all."""

from __future__ import annotations

from dataclasses import dataclass, field

LOAD_TIMEOUT_S = 1800.0
"""For a process that loads to get on by a single byte. How long all of it takes nobody can say: 689 GB take ten minutes over a
10 GbE network that is fetched over, and two hours over 1 GbE."""


@dataclass(frozen=True, slots=True)
class Directory:
    """What a front needs to reach the routers: their addresses by id, and the cluster's secret (not shown in a repr)."""

    routers: dict[str, str]
    secret: bytes = field(repr=False)
