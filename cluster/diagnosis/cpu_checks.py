"""Judges the CPUs of nodes that are to serve together: with different instructions they round in different ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...configs.deployment import Deployment
from ..mixed_cpus import KNOWN, grouped, lowest, told_apart
from .facts import NodeFacts
from .findings import Finding, fail, ok, warn


def check_instructions(nodes: Sequence[NodeFacts], deployment: Deployment | None) -> list[Finding]:
    """What nodes compute with on CPUs, as far as they do.

    Args:
        deployment: whose `cpu_instructions` they are to have; None for none.
    """
    everywhere = deployment is not None and deployment.device == "cpu"
    computing = [facts for facts in nodes if everywhere or not facts.gpus]
    if deployment is not None and deployment.cpu_instructions != "auto":
        return [_as_asked(computing, deployment.cpu_instructions)] if computing else []
    return list(_alike(computing, by_torch=deployment is not None and deployment.dtype == "float32"))


def _as_asked(nodes: Sequence[NodeFacts], asked: str) -> Finding:
    best = {facts.node: facts.cpu.kernels or "no kernels" for facts in nodes}
    short = {node: one for node, one in best.items() if one not in KNOWN[KNOWN.index(asked) :]}
    if not short:
        return ok("cpus", f"all have {asked}, as cpu_instructions asks for")
    there = [one for one in best.values() if one in KNOWN]
    instead = f"set cpu_instructions: {lowest(there)}, or " if there else ""
    return fail(
        "cpus",
        f"cpu_instructions = {asked!r}, and the best is "
        + ", ".join(f"{one} on {', '.join(names)}" for one, names in grouped(short).items()),
        f"{instead}have no processes there (`resources` of each kind)",
    )


def _alike(nodes: Sequence[NodeFacts], *, by_torch: bool) -> Iterator[Finding]:
    kernels = grouped({facts.node: facts.cpu.kernels for facts in nodes})
    torch = grouped({facts.node: facts.cpu.instructions for facts in nodes})
    differ = (
        "fine for serving; last bits of an answer may then depend on which node computed what: where that matters, "
    )
    if len(kernels) > 1 and not by_torch:
        known = [one for one in kernels if one in KNOWN]
        same = f"set cpu_instructions: {lowest(known)}" if known else "keep processes on nodes of one kind"
        yield warn("cpus", f"several kinds: {told_apart(kernels, 'nodes')}", differ + same)
    elif len(torch) > 1:
        yield warn(
            "cpus",
            f"several kinds, by which torch computes: {told_apart(torch, 'nodes')}",
            f"{differ}keep processes on nodes of one kind",
        )
