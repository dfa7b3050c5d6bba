"""Compares nodes that are to serve together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from ..mixed_cpus import grouped, told_apart
from .facts import NodeFacts
from .findings import Finding, fail, ok, warn
from .text import duration

_MUST_BE_EQUAL: Final = {
    "python": "Ray refuses nodes with another Python",
    "ray": "Ray refuses nodes with another version",
    "moray": "processes of two versions do not understand each other",
    "moray's code": "processes of two versions do not understand each other",
    "torch": "another torch computes other bits",
    "triton": "another compiler computes other bits",
    "NCCL": "NCCL links only ends of one version",
}
"""Version -> why it must be the same on every node that has it."""

_SHOULD_BE_EQUAL: Final = {"driver": "one of them may lack what the CUDA of this torch needs"}

CLOCK_WARN_S: Final = 0.1
"""Nodes that keep time over a network are within a few milliseconds; beyond this the order of events in logs is lost."""

CLOCK_FAIL_S: Final = 300.0
"""Kerberos refuses tickets from here on, object stores requests a little later."""


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """How far a node's clock is ahead of the reference's, and by how much that may be wrong: half a round trip."""

    node: str
    offset_s: float
    bound_s: float


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node as Ray lists it, with what Ray may hand out there."""

    address: str
    resources: Mapping[str, float]

    @property
    def cpus(self) -> float:
        """Logical ones."""
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        """Of whatever kind."""
        return self.resources.get("GPU", 0.0)


def check_cluster(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """What must, or should, be the same on all nodes."""
    if len(nodes) < 2:
        return []
    checks = (same_versions, same_gpus, same_mtu, same_model)
    return [finding for check in checks for finding in check(nodes)]


def same_versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Versions of everything that takes part."""
    equal = True
    for table, judge in ((_MUST_BE_EQUAL, fail), (_SHOULD_BE_EQUAL, warn)):
        for name, why in table.items():
            found = _groups(nodes, partial(_version, name))
            if len(found) > 1:
                equal = False
                yield judge(
                    "versions",
                    f"{name} differs: {told_apart(found, 'nodes')}: {why}",
                    "install the same version on every node",
                )
    if equal:
        yield ok("versions", f"equal on {len(nodes)} nodes")


def same_gpus(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """GPUs of one kind: others round elsewhere. Of CPUs see `cpu_checks.py`."""
    gpus = _groups(nodes, lambda facts: ", ".join(sorted({gpu.name for gpu in facts.gpus})))
    if len(gpus) > 1:
        yield warn(
            "gpus",
            f"several kinds: {told_apart(gpus, 'nodes')}",
            "fine for serving; last bits of an answer may then depend on which kind computed an expert, and the slowest "
            "sets the pace of a layer",
        )


def same_mtu(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """One MTU; with two, large packets to the smaller end are dropped wherever ICMP is."""
    found = _groups(nodes, lambda facts: str(facts.network.mtu) if facts.network.mtu else "")
    if len(found) > 1:
        yield warn(
            "network",
            f"MTUs differ: {told_apart(found, 'nodes')}",
            "set one MTU on every node's interface: where packets are dropped for their size, links hang under load",
        )


def same_model(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """The same checkpoint everywhere: equal configuration, and files of equal names and sizes."""
    seen = [facts for facts in nodes if facts.model is not None and not facts.model.problem]
    if len(seen) < 2:
        return
    ways: tuple[tuple[str, Callable[[NodeFacts], str]], ...] = (
        ("config.json", lambda facts: facts.model.config_digest[:12] if facts.model else ""),
        ("names or sizes of its files", lambda facts: facts.model.listing_digest[:12] if facts.model else ""),
    )
    equal = True
    for what, key in ways:
        found = _groups(seen, key)
        if len(found) > 1:
            equal = False
            yield fail(
                "model",
                f"{what} differ: {told_apart(found, 'nodes')}",
                "copy the checkpoint anew where it differs; a copy may still be under way",
            )
    if equal:
        yield ok("model", f"equal on {len(seen)} nodes, by its configuration and the names and sizes of its files")


def check_clocks(reference: str, offsets: Sequence[ClockOffset]) -> list[Finding]:
    """Clocks against that of the reference node; an offset counts as far as it is beyond doubt."""
    if not offsets:
        return []
    findings = []
    for found in offsets:
        certain = abs(found.offset_s) - found.bound_s
        if certain > CLOCK_WARN_S:
            judge = fail if certain > CLOCK_FAIL_S else warn
            way = "ahead of" if found.offset_s > 0 else "behind"
            findings.append(
                judge(
                    "clock",
                    f"{found.node} is {duration(found.offset_s)} {way} {reference} (+-{duration(found.bound_s)})",
                    "have every node keep time over the network (chrony, systemd-timesyncd)",
                )
            )
    if not findings:
        worst = max(offsets, key=lambda found: abs(found.offset_s))
        findings.append(
            ok(
                "clock",
                f"all within {duration(worst.offset_s)} of {reference}'s "
                f"(+-{duration(max(found.bound_s for found in offsets))})",
            )
        )
    return findings


def check_ray_counts(ray: Mapping[str, RayNode], nodes: Sequence[NodeFacts]) -> list[Finding]:
    """What Ray may hand out on each node against what is there."""
    findings = []
    for facts in nodes:
        listed = ray.get(facts.node)
        if listed is None:
            continue
        if int(listed.gpus) != len(facts.gpus):
            findings.append(
                warn(
                    "ray",
                    f"{facts.node}: Ray hands out {listed.gpus:g} GPUs, the node has {len(facts.gpus)}",
                    "start Ray there again, without --num-gpus and with CUDA_VISIBLE_DEVICES unset",
                )
            )
        if listed.cpus > facts.cpu.count:
            findings.append(
                warn(
                    "ray",
                    f"{facts.node}: Ray hands out {listed.cpus:g} CPUs, the node has {facts.cpu.count}",
                    f"start Ray there with --num-cpus {facts.cpu.count}, or expect processes to share them",
                )
            )
    return findings


def check_access(auth_mode: str) -> Finding:
    """Whether Ray asks who it is that has it run something; `auth_mode` as in RAY_AUTH_MODE."""
    if auth_mode == "token":
        return ok("access", "Ray asks for a token")
    return warn(
        "access",
        "Ray asks for no token: whoever reaches its ports runs what they like on every node",
        "close all ports but the front's to the world, or start every node with RAY_AUTH_MODE=token and one token "
        "(`ray get-auth-token --generate`)",
    )


def _version(name: str, facts: NodeFacts) -> str:
    return facts.versions.get(name, "")


def _groups(nodes: Sequence[NodeFacts], key: Callable[[NodeFacts], str]) -> dict[str, list[str]]:
    """Value -> the nodes that have it. What is missing although it is needed, the node's own check says."""
    return grouped({facts.node: key(facts) for facts in nodes})
