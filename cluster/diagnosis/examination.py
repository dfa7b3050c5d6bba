"""Examines nodes together: asks each for its facts, measures the links between them, and judges all of it.

Knows nodes by handles that answer in their own time. Every answer has a deadline; a node that misses one is reported, and
asked nothing more.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ...configs.errors import ClusterError
from .cluster_checks import RayNode, check_clocks, check_cluster, check_ray_counts
from .collect import Wish
from .facts import NodeFacts
from .findings import Finding, at, fail
from .link_checks import R1_NEEDS, LinkFailure, TokenNeeds, check_links, clock_offsets
from .link_meter import WARM_UP_S, LinkSpeed
from .node_checks import check_node
from .rounds import rounds

logger = logging.getLogger("moray.doctor")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for answers.

    Attributes:
        collect_s: for a node's facts: Ray starts a process there, which imports torch, asks the driver, reads the disk.
        listen_s: for it to listen.
        link_s: for one link, beside the time it is measured for; more than all waits in `link_meter.py` together, so that
            it is the measuring node that says what is wrong.
    """

    collect_s: float = 90.0
    listen_s: float = 10.0
    link_s: float = 45.0


class NodeHandle(Protocol):
    """A node that can be asked."""

    @property
    def node(self) -> str:
        """Its name in the report."""

    @property
    def ray(self) -> RayNode:
        """What Ray says of it."""

    def ask(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of its `NodeProbe`; the future has its answer, or whatever error came instead."""


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that was found.

    Attributes:
        nodes: facts of those that answered.
        findings: of nodes and of the cluster.
        links, failures: between nodes; empty for one node.
    """

    nodes: tuple[NodeFacts, ...]
    findings: tuple[Finding, ...]
    links: tuple[LinkSpeed, ...] = ()
    failures: tuple[LinkFailure, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether anything must be mended."""
        return any(finding.level == "fail" for finding in self.findings)

    def plus(self, findings: Sequence[Finding]) -> Examination:
        """With further findings."""
        return replace(self, findings=(*self.findings, *findings))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "failed": self.failed,
            "findings": [asdict(finding) for finding in self.findings],
            "nodes": [facts.to_dict() for facts in self.nodes],
            "links": [asdict(link) for link in self.links],
            "link_failures": [asdict(failure) for failure in self.failures],
        }


def examine_cluster(
    handles: Sequence[NodeHandle],
    wish: Wish,
    *,
    link_seconds: float,
    needs: TokenNeeds = R1_NEEDS,
    patience: Patience | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Examination:
    """Examine nodes that are to serve together.

    Args:
        handles: the nodes; clocks are compared with the first one's.
        wish: what to look at on each; its names and addresses are filled in.
        link_seconds: for each link; 0 measures round trips alone.
        needs: of a token of the model that is to be served.
        progress: told what is being done.
    """
    return _Run(handles, wish, link_seconds, needs, patience or Patience(), progress).run()


class _Run:
    """One examination."""

    def __init__(
        self,
        handles: Sequence[NodeHandle],
        wish: Wish,
        link_seconds: float,
        needs: TokenNeeds,
        patience: Patience,
        progress: Callable[[str], None],
    ) -> None:
        self._handles = {handle.node: handle for handle in handles}
        self._wish, self._link_seconds, self._needs = wish, link_seconds, needs
        self._patience, self._progress = patience, progress
        self._secret = secrets.token_bytes(32)
        self._findings: list[Finding] = []
        self._links: list[LinkSpeed] = []
        self._failures: list[LinkFailure] = []

    def run(self) -> Examination:
        begin = time.monotonic()
        facts = self._collect()
        self._findings += check_cluster(facts)
        self._findings += check_ray_counts({node: handle.ray for node, handle in self._handles.items()}, facts)
        if len(facts) > 1:
            self._measure([found.node for found in facts])
            self._findings += check_links(self._links, self._failures, self._needs)
            self._findings += check_clocks(facts[0].node, clock_offsets(facts[0].node, self._links))
        logger.info(
            "event=examined nodes=%d answered=%d links=%d findings=%d duration_s=%.3f",
            len(self._handles),
            len(facts),
            len(self._links),
            len(self._findings),
            time.monotonic() - begin,
        )
        return Examination(tuple(facts), tuple(self._findings), tuple(self._links), tuple(self._failures))

    def _collect(self) -> list[NodeFacts]:
        self._progress(f"looking at {len(self._handles)} nodes")
        asked = {
            node: handle.ask("collect", asdict(replace(self._wish, node=node, address=handle.ray.address)))
            for node, handle in self._handles.items()
        }
        found = []
        for node, answer in self._answers(asked, self._patience.collect_s, "its facts").items():
            try:
                facts = NodeFacts.from_dict(answer)
            except ClusterError as error:
                self._lost(node, str(error))
                continue
            found.append(facts)
            self._findings += check_node(facts)
        return found

    def _measure(self, nodes: Sequence[str]) -> None:
        asked = {node: self._ask_to_listen(node) for node in nodes}
        endpoints = self._answers(asked, self._patience.listen_s, "a port for measuring links")
        plan = rounds([node for node in nodes if node in endpoints])
        for number, pairs in enumerate(plan, start=1):
            self._progress(f"measuring links, round {number} of {len(plan)}")
            for there in (True, False):  # one direction at a time: each is to have the way for itself
                ways = [(a, b) if there else (b, a) for a, b in pairs]
                self._measure_at_once([way for way in ways if set(way) <= set(endpoints)], endpoints)

    def _ask_to_listen(self, node: str) -> Future[Any]:
        handle = self._handles[node]
        return handle.ask("listen", handle.ray.address, node, self._secret)

    def _measure_at_once(self, ways: Sequence[tuple[str, str]], endpoints: dict[str, str]) -> None:
        targets = dict(ways)
        asked = {
            source: self._handles[source].ask(
                "measure", endpoints[target], source, target, self._secret, self._link_seconds
            )
            for source, target in ways
        }
        seconds = self._patience.link_s + (WARM_UP_S + self._link_seconds if self._link_seconds else 0.0)
        answers = self._answers(asked, seconds, "a measured link")
        for source, target in targets.items():
            answer = answers.get(source)
            if answer is None:
                endpoints.pop(source, None)
            elif "problem" in answer:
                self._failures.append(LinkFailure(source, target, answer["problem"]))
            else:
                self._take(source, answer)

    def _take(self, source: str, answer: Mapping[str, Any]) -> None:
        try:
            self._links.append(LinkSpeed(**answer))
        except TypeError as error:
            self._lost(source, f"its figures have another form ({error}): another version of Moray")

    def _answers(self, asked: Mapping[str, Future[Any]], seconds: float, what: str) -> dict[str, Any]:
        """Node -> answer, of those that gave one in time, in the order asked; the others are reported."""
        wait(asked.values(), timeout=seconds)
        found = {}
        for node, future in asked.items():
            if not future.done():
                self._lost(node, f"did not answer within {seconds:.0f} s when asked for {what}")
            elif (error := future.exception()) is not None:
                self._lost(node, f"failed when asked for {what}: {_reason(error)}")
            else:
                found[node] = future.result()
        return found

    def _lost(self, node: str, what: str) -> None:
        self._findings += at(
            node,
            [
                fail(
                    "answers",
                    what,
                    "see whether the node is up, Moray is installed there, and Ray's log there (`ray logs`) says why",
                )
            ],
        )


def _reason(error: BaseException) -> str:
    """The last line that says something: Ray's errors begin with where they passed through."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
