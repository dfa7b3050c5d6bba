"""A whole measurement: every level of every server, A B A B, and all that is needed to do it again."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ... import __version__
from .figures import COMPARED, Figures, Ratio, figures, ratio
from .load import Extent, Measured, Show, measure
from .stream import Answer
from .target import Server
from .workload import Level, Workload

SCHEMA = "moray-bench/1"
"""Of the JSON; another number when a field means something else than before."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        servers: one, or two that are compared.
        workload: what they are asked.
        levels: how hard, one after the other.
        rounds: how often all of it, each server in turn.
        extent: of each level.
        settings: the command's options, for whoever measures again.
    """

    servers: tuple[Server, ...]
    workload: Workload
    levels: tuple[Level, ...]
    rounds: int
    extent: Extent
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """One level of one server in one round."""

    server: int
    level: Level
    round: int
    figures: Figures
    measured: Measured


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was measured, in the order it was.

    Attributes:
        began: when, as time in seconds since 1970.
    """

    plan: Plan
    began: float
    parts: tuple[Part, ...]

    def figures_of(self, server: int, level: Level) -> list[Figures]:
        """Of each round."""
        return [part.figures for part in self.parts if (part.server, part.level) == (server, level)]

    def ratios(self, level: Level) -> dict[str, Ratio | None]:
        """The first server's figures over the second's, by their names."""
        first, second = (self.figures_of(server, level) for server in (0, 1))
        return {name: ratio(first, second, path) for name, path in COMPARED}

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        plan, workload = self.plan, self.plan.workload
        trace = None if workload.trace is None else len(workload.trace)
        return {
            "schema": SCHEMA,
            "moray": __version__,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "settings": dict(plan.settings),
            "client": {"python": platform.python_version(), "system": platform.platform()},
            "servers": [_server(server) for server in plan.servers],
            "workload": {
                "prompt_tokens": str(workload.prompt),
                "output_tokens": str(workload.output),
                "trace_exchanges": trace,
                "shared_prefix": workload.shared_prefix,
                "vocab_size": workload.vocab_size,
                "seed": workload.seed,
            },
            "extent": asdict(plan.extent),
            "rounds": plan.rounds,
            "parts": [
                {
                    "server": part.server,
                    "level": asdict(part.level),
                    "round": part.round,
                    **asdict(part.figures),
                    "answers": [_answer(answer, part.measured.began) for answer in part.measured.answers],
                }
                for part in self.parts
            ],
            "ratios": [
                {"level": asdict(level), **{name: None if r is None else asdict(r) for name, r in found.items()}}
                for level in plan.levels
                if len(plan.servers) > 1 and (found := self.ratios(level))
            ],
        }


def _server(server: Server) -> dict[str, Any]:
    """Without its key."""
    return {
        "name": server.name,
        "url": str(server.address),
        "model": server.model,
        "endpoint": "chat" if server.chat else "completions",
        "temperature": server.temperature,
        "fields": list(server.fields),
        "prompts": server.form,
        "characters_per_token": server.characters_per_token,
    }


def _answer(answer: Answer, began: float) -> dict[str, Any]:
    """One request, its times in seconds from the first one's."""
    return {
        "sent": round(answer.sent - began, 6),
        "first": round(answer.times[0] - began, 6) if answer.times else None,
        "ended": round(answer.ended - began, 6),
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "outcome": answer.outcome,
    }


Watch = Callable[[str, Extent], Show]
"""Called before each part with its name and extent; gives what is called as it goes on."""


def run(plan: Plan, *, watch: Watch = lambda *_: lambda _: None) -> Result:
    """Measure everything. Warm-up comes before every part, so that each finds the server as the others did."""
    began = time.time()
    parts = []
    for round_ in range(plan.rounds):
        for level in plan.levels:
            for index, server in enumerate(plan.servers):
                extent = extent_of(level, plan.extent, plan.workload)
                workload = replace(plan.workload, characters_per_token=server.characters_per_token)
                # A server that is compared with itself must not find in its cache what it was just asked.
                again = sum(other.address == server.address for other in plan.servers[:index])
                name = f"round {round_} {level}" + (" again" if again else "")
                show = watch(_title(plan, index, level, round_), extent)
                measured = asyncio.run(measure(server, workload, level, extent, name, show=show))
                parts.append(Part(index, level, round_, figures(measured), measured))
    return Result(plan, began, tuple(parts))


REQUESTS_PER_CLIENT = 4
"""Where neither requests nor seconds are given."""

REQUESTS_AT_A_RATE = 100


def extent_of(level: Level, extent: Extent, workload: Workload) -> Extent:
    """With a number of requests where neither that nor a time was given, and no more than a trace has times for."""
    if level.kind == "trace":
        assert workload.trace is not None
        return replace(extent, requests=min(extent.requests or len(workload.trace), len(workload.trace)))
    if extent.requests is not None or extent.duration_s is not None:
        return extent
    some = max(8, REQUESTS_PER_CLIENT * int(level.value)) if level.kind == "concurrency" else REQUESTS_AT_A_RATE
    return replace(extent, requests=some)


def _title(plan: Plan, server: int, level: Level, round_: int) -> str:
    name = f"{plan.servers[server].name}, " if len(plan.servers) > 1 else ""
    of = f", round {round_ + 1} of {plan.rounds}" if plan.rounds > 1 else ""
    return f"{name}{level}{of}"
