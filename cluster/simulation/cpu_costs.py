"""What the parts of a step cost on the cores of one machine: linear functions whose constants were measured there.

Every process that serves shares the cores, so what counts is CPU time: of a router, of its hosts, and of all that a token
passes on its way to the client. `calibration.py` measures the constants.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...configs.errors import ConfigError
from ..planning.assumptions import Assumption

ALONE = 2
"""Processes of the smallest server, a router and a host: what its parts cost is what others' cost is more than."""


@dataclass(frozen=True, slots=True)
class CpuConstants:
    """Seconds of CPU time, as processes take them that share cores and caches with others.

    Attributes:
        step, step_token, step_row: a router's step outside its layers; for each token of it; for each row that is sampled.
        admission: a router, for each request: taking it in, finding its pages, ending it.
        layer, layer_token, layer_position, layer_row, layer_page: a layer of it; for each token; for each position that a token
            attends to; for each cached row that is read, once a sequence; for each page of the longest sequence, as attention
            goes through pages one by one, for all sequences together.
        shared, shared_token: the shared experts of a layer; for each token.
        exchange, frame, frame_byte: a router, for sending out, or taking in, the tokens of a layer; for each frame; for each
            byte of it.
        choice: a router, for a layer whose experts have replicas to choose among.
        host, host_expert, host_pair: a host, for each request; for each distinct expert in it; for each pair.
        front, front_token: front, proxy and client, for what a step produced; for each token of it.
        request, request_token: they again, for each request; for each token of its prompt.
        wake: until a process that slept goes on with what it was handed; time on the clock, and nobody's work.
        background: cores that are busy whatever is asked: Ray, supervision, the system.
        router_process, host_process: by which share the work of routers, or of hosts, takes longer for each process (router or
            host) beyond two: they take turns in the same caches.
        cores: of the machine.
        crowded: how many cores' worth of work it gets done while more processes have something to do than there are cores; at
            most `cores`.
    """

    step: float
    step_token: float
    step_row: float
    admission: float
    layer: float
    layer_token: float
    layer_position: float
    layer_row: float
    layer_page: float
    shared: float
    shared_token: float
    exchange: float
    frame: float
    frame_byte: float
    choice: float
    host: float
    host_expert: float
    host_pair: float
    front: float
    front_token: float
    request: float
    request_token: float
    wake: float
    background: float
    router_process: float
    host_process: float
    cores: float
    crowded: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Where constants were measured, and with what; for people."""

    cpu: str
    cores: int
    python: str
    torch: str
    model: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured constants and where they come from.

    Attributes:
        residuals: name of a fit -> root mean square of what it misses, relative.
    """

    constants: CpuConstants
    machine: Machine
    residuals: dict[str, float] = field(default_factory=dict)

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """The constants, as a plan lists those it takes for granted."""
        source = f"measured on {self.machine.cores} cores of {self.machine.cpu} with {self.machine.model}"
        units = {"background": "cores", "cores": "cores", "crowded": "cores", "router_process": "", "host_process": ""}
        return tuple(
            Assumption(name.replace("_", " "), value, units.get(name, "s"), source)
            for name, value in asdict(self.constants).items()
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is not there, or is none.
        """
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            return cls(CpuConstants(**found["constants"]), Machine(**found["machine"]), dict(found["residuals"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: cannot be used as a calibration ({error}); make one with calibration.py"
            ) from error


class CpuCosts:
    """`CostModel` of one machine's cores.

    Args:
        constants: measured there.
        page_size: positions in a router's KV page.
        processes: routers and hosts on them.
        replicas: whether experts have any, so that a router chooses.

    Attributes:
        cores, crowded: what is left for serving beside the background; see `CostModel`.
        wake_s: see `CostModel`.
    """

    overlap = False

    def __init__(
        self, constants: CpuConstants, *, page_size: int, processes: int = ALONE, replicas: bool = False
    ) -> None:
        self._c = c = constants
        self._page_size = page_size
        self._choice = c.choice if replicas else 0.0
        self._router = 1.0 + c.router_process * max(0, processes - ALONE)
        self._host = 1.0 + c.host_process * max(0, processes - ALONE)
        self.cores: float | None = c.cores - c.background
        self.crowded = min(c.crowded, c.cores) - c.background
        self.wake_s = c.wake

    def router_step(self, tokens: int, decoding: int, sampled: int, kv_positions: int) -> float:  # noqa: ARG002
        """See `CostModel`."""
        c = self._c
        begun = max(0, sampled - decoding)  # requests whose prompt is through
        return self._router * (c.step + c.step_token * tokens + c.step_row * sampled + c.admission * begun)

    def router_layer(self, tokens: int, kv_positions: int, kv_rows: int, longest: int) -> float:
        """See `CostModel`."""
        c = self._c
        reading = c.layer_position * kv_positions + c.layer_row * kv_rows
        rounds = pages(kv_positions, kv_rows, longest, self._page_size)
        return self._router * (c.layer + c.layer_token * tokens + reading + c.layer_page * rounds)

    def shared_experts(self, tokens: int) -> float:
        """See `CostModel`."""
        return self._router * (self._c.shared + self._c.shared_token * tokens)

    def host_layer(self, rows: int, experts: int) -> float:
        """See `CostModel`."""
        c = self._c
        return self._host * (c.host + c.host_expert * experts + c.host_pair * rows) if rows else 0.0

    def exchange(self, sent: int, received: int, hosts: int) -> float:
        """See `CostModel`."""
        c = self._c
        ways = (sent > 0) + (received > 0)
        frames = ways * (c.exchange + c.frame * hosts) + c.frame_byte * (sent + received)
        return self._router * (frames + (self._choice if sent else 0.0))

    def front(self, tokens: int) -> float:
        """See `CostModel`."""
        return self._c.front + self._c.front_token * tokens

    def request(self, prompt: int) -> float:
        """See `CostModel`."""
        return self._c.request + self._c.request_token * prompt


def pages(kv_positions: int, kv_rows: int, longest: int, page_size: int) -> int:
    """Pages that attention of a step goes through: single tokens together, then chunks of prompts together.

    Where tokens attend to as many positions as rows are read, each is the only one of its sequence.
    """
    rounds = 1 if kv_positions <= kv_rows else 2 if kv_rows > longest else 1
    return rounds * -(-longest // page_size)
