"""What comes back from expert hosts, and when it is late: replies taken in turn, silence judged."""

from __future__ import annotations

import logging

from ..configs.errors import LinkError, PeerTimeoutError
from .dispatch_hosts import DispatchHosts
from .host_line import HostLine
from .moe_frames import Kind
from .native_claims import NativeClaims
from .pending_experts import PendingExperts

logger = logging.getLogger("moray.router")

_LOOK_ROUND_S = 0.005
"""A wait for one host is broken off so often, to look at all of them: a lost or late one must not hide behind another."""

_SLOW_S = 0.05
_SLOW = 5.0
"""A reply that takes longer than both, the second times what is usual for the fastest host, has others asked first."""


class Receiver:
    """Takes the hosts' replies. For the router's thread.

    Args:
        native: what was asked for there and not collected is received here, once somebody looks.
    """

    def __init__(self, hosts: DispatchHosts, native: NativeClaims | None) -> None:
        self._hosts = hosts
        self._native = native
        self._clock = hosts.clock

    def attend(self) -> None:
        """Take what has arrived from hosts that owe something, and judge those that go on to owe it. Never waits."""
        if self._native is not None:
            self._native.settle()
        lines = self._hosts.lines
        for line in list(lines.values()):
            while line.owed and self._receive(line, 0.0):
                pass
            if line.owed and self._clock() > line.due and lines.get(line.host) is line:
                self._overdue(line)

    def collect(self, claim: PendingExperts) -> bool:
        """Take a reply of each host that is asked for open pairs; False as soon as one is not what it should be.

        In the order in which they are due: then each one's time is its own, and none is held to be late for another.
        """
        lines = [line for line in self._hosts.lines.values() if line.is_wanted_by(claim)]
        lines.sort(key=_late_and_due)
        return bool(lines) and all(self._receive(line, _LOOK_ROUND_S) for line in lines)

    def _receive(self, line: HostLine, wait_s: float) -> bool:
        """Wait for a host's next reply and take it; False if there was none, or it was not what the host was asked for."""
        began = self._clock()
        try:
            reply = line.receive(wait_s)
            self._hosts.excuse(self._clock() - began - wait_s)
            if reply is None:
                return False
            share, header, tensors = reply
            if header.kind is Kind.FAILED:
                self._hosts.has_refused(line, share.claim, header.reason)
            else:
                share.claim.take(share, tensors)
                line.lent_to = share.claim
                self._hosts.has_done(line, len(share.pairs))
            if line.last_s > _SLOW_S:
                self._compare(line)
            line.send_queued()
        except LinkError as error:
            self._hosts.drop(line, error)
            return False
        return header.kind is not Kind.FAILED

    def _overdue(self, line: HostLine) -> None:
        if not line.late:
            line.late = True
            logger.info("event=late host=%s silent_s=%.3f", line.host, line.silent_s)
        if line.silent_s > line.silence_limit_s:
            self._hosts.drop(
                line, PeerTimeoutError(line.host, f"was silent for {line.silent_s:.2f} s with work in hand")
            )

    def _compare(self, line: HostLine) -> None:
        """Have a host spared whose replies take far longer than those of the others: no deadline of its own tells."""
        others = [other.latency.median_s for other in self._hosts.lines.values() if other is not line]
        known = [seconds for seconds in others if seconds > 0]
        if known and line.last_s > _SLOW * min(known):
            line.spare()


def _late_and_due(line: HostLine) -> tuple[bool, float]:
    return line.late, line.due
