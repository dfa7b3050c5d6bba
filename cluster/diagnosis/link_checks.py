"""Judges the links between nodes by what was measured, what a plan takes for granted, and what a token needs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..planning import assumptions
from .cluster_checks import ClockOffset
from .findings import Finding, fail, ok, warn
from .link_meter import LinkSpeed
from .text import duration, gbit

if TYPE_CHECKING:
    from ...model.config import ModelConfig

LINK_SLOW: Final = assumptions.NETWORK.value * assumptions.NETWORK_EFFICIENCY.value
"""Bytes a second: what a plan has payload get where it is told of no network."""

LINK_DEAD: Final = 1e9 / 8 * 0.9
"""Bytes a second: one Gbit/s less its headers carries fewer than twenty of R1's tokens a second."""

SLOWER_THAN_OTHERS: Final = 0.5
"""Of the median: links of one network differ less; one that does has a bad cable, port or route."""

ROUND_TRIP_SLOW_S: Final = 2 * assumptions.NETWORK_LATENCY.value
"""What a plan takes for granted, there and back; bare sockets within a rack take a fifth of it."""

ROUND_TRIP_DEAD_S: Final = 10e-3
"""More than half a second for each of R1's tokens: such nodes are not in one place."""

_SHOWN: Final = 5
"""Links that are named where many are slow."""


@dataclass(frozen=True, slots=True)
class TokenNeeds:
    """What one token asks of a router's network while all its experts are on other nodes.

    Attributes:
        model: its name.
        layers: round trips, one after the other.
        bytes_each_way: to the hosts, or back: the larger.
    """

    model: str
    layers: int
    bytes_each_way: int


@dataclass(frozen=True, slots=True)
class LinkFailure:
    """A link that could not be measured."""

    source: str
    target: str
    problem: str


R1_NEEDS: Final = TokenNeeds("R1", 58, 58 * 8 * 14432)
"""58 MoE layers, 8 experts; 7168 values in bfloat16 and what goes with them (`token_needs` of its config.json)."""


def token_needs(name: str, config: ModelConfig) -> TokenNeeds:
    """The needs of any model, with the frames that links really carry, in bfloat16."""
    import torch

    from ..planning.traffic import done_frame, work_frame

    there = work_frame(1, 1, config.hidden_size, torch.bfloat16).total
    back = done_frame(1, config.hidden_size, torch.bfloat16).total
    layers = len(config.moe_layers)
    return TokenNeeds(name, layers, layers * config.num_experts_per_tok * max(there, back))


def check_links(
    links: Sequence[LinkSpeed], failures: Sequence[LinkFailure], needs: TokenNeeds = R1_NEEDS
) -> list[Finding]:
    """One line for all that is well, one for each link that is not."""
    findings = [
        fail(
            "links",
            f"{failure.source} -> {failure.target}: {failure.problem}",
            "open all TCP ports between the nodes (and to nobody else): links listen on whichever is free",
        )
        for failure in failures
    ]
    if not links:
        return findings
    slow = [*_slow_rates(links), *_slow_trips(links)]
    if not any(finding.level == "fail" for finding in slow):
        findings.append(ok("links", _summary(links, needs)))
    return findings + slow


def clock_offsets(reference: str, links: Sequence[LinkSpeed]) -> list[ClockOffset]:
    """Every other node's clock against the reference's, from the links between them."""
    found: dict[str, ClockOffset] = {}
    for link in links:
        if reference in (link.source, link.target):
            forward = link.source == reference
            node = link.target if forward else link.source
            ahead = link.clock_ahead_s if forward else -link.clock_ahead_s
            offset = ClockOffset(node, ahead, link.least_round_trip_s / 2)
            if node not in found or offset.bound_s < found[node].bound_s:
                found[node] = offset
    return list(found.values())


def _slow_rates(links: Sequence[LinkSpeed]) -> list[Finding]:
    rates = [(link.bytes_per_s, link) for link in links if link.bytes_per_s is not None]
    if not rates:
        return []
    dead = [(rate, link) for rate, link in rates if rate < LINK_DEAD]
    usual = statistics.median(rate for rate, _ in rates)
    below = [(rate, link) for rate, link in rates if LINK_DEAD <= rate < LINK_SLOW]
    odd = [(rate, link) for rate, link in rates if LINK_SLOW <= rate < SLOWER_THAN_OTHERS * usual]
    findings = []
    if dead:
        findings.append(
            fail(
                "links",
                f"{_slowest(dead)}: too slow to carry experts' work",
                "put links on a faster interface (start Ray with --node-ip-address of that one)",
            )
        )
    if below:
        findings.append(
            warn(
                "links",
                f"{_slowest(below)}: a plan assumes {gbit(LINK_SLOW)} of payload where it is told nothing",
                f"plan with `--network {_nominal(min(rate for rate, _ in below)):.2g}`, or put links on a faster interface",
            )
        )
    if odd:
        findings.append(
            warn(
                "links",
                f"{_slowest(odd)}: half of the others reach more than {gbit(usual)}",
                "look at cable, port, MTU and route of these nodes: the slowest link sets the pace of a layer",
            )
        )
    return findings


def _nominal(bytes_per_s: float) -> float:
    """Gbit/s of the network of which a plan would have payload get so much."""
    return bytes_per_s * 8 / 1e9 / assumptions.NETWORK_EFFICIENCY.value


def _slow_trips(links: Sequence[LinkSpeed]) -> list[Finding]:
    slow = sorted((link for link in links if link.round_trip_s > ROUND_TRIP_SLOW_S), key=lambda x: -x.round_trip_s)
    if not slow:
        return []
    named = ", ".join(f"{link.source} -> {link.target} {duration(link.round_trip_s)}" for link in slow[:_SHOWN])
    more = f" and {len(slow) - _SHOWN} more" if len(slow) > _SHOWN else ""
    judge = fail if slow[0].round_trip_s > ROUND_TRIP_DEAD_S else warn
    return [
        judge(
            "round trips",
            f"{named}{more}: a plan assumes {duration(ROUND_TRIP_SLOW_S)}, and each MoE layer takes one",
            "keep nodes in one place, on one switch if possible; see whether CPUs are busy or interrupts are coalesced",
        )
    ]


def _summary(links: Sequence[LinkSpeed], needs: TokenNeeds) -> str:
    trips = [link.round_trip_s for link in links]
    rates = [link.bytes_per_s for link in links if link.bytes_per_s is not None]
    step = needs.layers * max(trips)
    what = (
        f"round trips {_range(duration(min(trips)), duration(max(trips)))}, {duration(step)} a token of {needs.model}"
    )
    if not rates:
        return what
    most = min(rates) / needs.bytes_each_way if needs.bytes_each_way else 0.0
    return (
        f"{_range(gbit(min(rates)), gbit(max(rates)))}, {what}, whose {needs.bytes_each_way / 1e6:.3g} MB each way let a "
        f"router send at most {most:.0f} a second over the slowest"
    )


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _slowest(found: Sequence[tuple[float, LinkSpeed]]) -> str:
    worst = sorted(found, key=lambda item: item[0])
    named = ", ".join(f"{link.source} -> {link.target} {gbit(rate)}" for rate, link in worst[:_SHOWN])
    return named + (f" and {len(worst) - _SHOWN} more" if len(worst) > _SHOWN else "")
