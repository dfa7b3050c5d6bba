"""What routers and expert hosts tell the controller when it asks: once a second or so, never per step.

Counters only ever grow, from 0 at the process's start: whoever asks takes differences, and a smaller number than before
means another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .messages import RouterStats


@dataclass(frozen=True, slots=True)
class HostView:
    """One expert host as one router sees it.

    Attributes:
        linked: there is a link to it.
        overdue_s: how long ago it should have answered work that it has not answered yet; 0 if it owes nothing.
        latency_s: median of its recent replies, from the send on; 0 before the first.
        pairs: (token, expert) pairs it has answered.
    """

    linked: bool
    overdue_s: float = 0.0
    latency_s: float = 0.0
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class RouterReport:
    """One router's account.

    Attributes:
        epoch: of the placement table it works with.
        expert_tokens: [L, E] int64: tokens routed to each expert, for each layer with routed experts.
        hosts: by id, every host of the table.
        silent_fronts: ids of the fronts that have stopped reading or answering.
        instructions: of the CPU, that it computes with; see `instructions_used`.
    """

    stats: RouterStats
    epoch: int
    expert_tokens: npt.NDArray[np.int64] = field(repr=False)
    hosts: Mapping[str, HostView]
    silent_fronts: tuple[str, ...] = ()
    instructions: str = ""


@dataclass(frozen=True, slots=True)
class HostReport:
    """One expert host's account.

    Attributes:
        epochs: placement epochs it serves.
        busy_s: seconds it has computed.
        pairs: (token, expert) pairs it has computed.
        resident_bytes: of the experts it holds.
        instructions: of the CPU, that it computes with; see `instructions_used`.
    """

    epochs: tuple[int, ...]
    busy_s: float
    pairs: int
    resident_bytes: int
    instructions: str = ""
