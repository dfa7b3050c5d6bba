"""One expert host as a router's dispatch sees it: its link, the work it has been given and owes, and whether it is late."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain

import torch

from ..configs.errors import LinkError
from .deadline import Deadline
from .host_latency import HostLatency
from .links.base import FRAMES_IN_FLIGHT, Link
from .moe_frames import Kind, MoeHeader
from .pending_experts import PendingExperts, Share

_SPARE_AFTER_REFUSAL_S = 1.0
"""A host that refused its work is spared more of it for so long, where others have its experts: it may be short of memory,
or not serve this epoch any more, and asking it first would cost every layer a round trip."""

_SPARE_AFTER_LATE_S = (0.25, 8.0)
"""So it is with a host that was late, from its answer on: at first, and longest; twice as long as before if it is late again
within the longest. A hiccup costs little, and a host that is slow for good is tried now and then."""


class HostLine:
    """The work of one host, over one link. Nothing here waits for the host, but for `receive` as long as it is told to.

    Several shares may be on their way; replies come in the order of the shares. Only so many are sent as the link takes
    unread: the rest queues here, so that no send ever waits for a host that has stopped reading.

    Args:
        reply_timeout_s: bounds every single operation on the link.
        clock: in seconds; what `due` and `Share.sent_at` are measured on.

    Attributes:
        owed: shares that were sent and not answered, in order.
        due: when the first of them should have been answered; infinity if nothing is owed. For any thread.
        late: it was found to be past `due`; cleared by its next reply. For any thread.
        refused_until: it refused its last work: as if it is late, others should be asked until then, where there are any.
        slow_until: it was late lately, or slow: it answers, but others should be asked first until then.
        last_s: how long its last reply took.
        lent_to: whose answer may lie in the link's memory, where the next reply will.
    """

    def __init__(self, host: str, link: Link, *, reply_timeout_s: float, clock: Callable[[], float]) -> None:
        self.host = host
        self.link = link
        self.latency = HostLatency()
        self.owed: deque[Share] = deque()
        self.due = math.inf
        self.late = False
        self.last_s = 0.0
        self.lent_to: PendingExperts | None = None
        self._queued: deque[Share] = deque()
        self._reply_timeout_s = self._patience_s = reply_timeout_s
        self._clock = clock
        self._waiting_since = -math.inf  # silence counts from here: the first share's sending, or the reply before it
        self.refused_until = self.slow_until = -math.inf
        self._spared_s = 0.0  # the last time it was late

    def shares_of(self, claim: PendingExperts) -> Iterator[Share]:
        """What the host was asked for of one layer and has not answered."""
        return (share for share in chain(self.owed, self._queued) if share.claim is claim)

    def is_wanted_by(self, claim: PendingExperts) -> bool:
        """Whether the host was asked for pairs of one layer that are open still."""
        for share in self.owed:
            if share.claim is claim and claim.wants(share):
                return True
        return any(share.claim is claim and claim.wants(share) for share in self._queued)

    @property
    def needed(self) -> bool:
        """Whether a step waits for what the host owes."""
        return any(share.claim.wants(share) for share in chain(self.owed, self._queued))

    @property
    def silent_s(self) -> float:
        """For how long it has owed an answer and said nothing."""
        return self._clock() - self._waiting_since if self.owed else 0.0

    @property
    def silence_limit_s(self) -> float:
        """How long a silence may be before the host is given up: as long as it may last if a step waits for the host."""
        if self.needed:
            return self._reply_timeout_s
        return self._patience_s

    def post(self, share: Share) -> None:
        """Send a share, or queue it until the host has answered earlier ones.

        Raises:
            LinkError: the host is lost.
        """
        self._queued.append(share)
        self.send_queued()

    def send_queued(self) -> None:
        """Send what has queued, as far as the link takes it; what nobody waits for any more is left out.

        Raises:
            LinkError: the host is lost.
        """
        while self._queued and len(self.owed) < FRAMES_IN_FLIGHT:
            share = self._queued.popleft()
            if not share.claim.wants(share):
                continue
            claim, deadline = share.claim, Deadline.after(self._reply_timeout_s)
            header = MoeHeader(Kind.WORK, claim.layer, claim.epoch, share.sequence).pack()
            self.link.send(header, claim.frame(share, self.link, deadline=deadline), deadline=deadline)
            self.was_sent(share, self._clock())

    def was_sent(self, share: Share, at: float) -> None:
        """A share has been sent; by others, while nothing was queued here."""
        share.sent_at = at
        self.owed.append(share)
        if len(self.owed) == 1:
            self._wait_for_first(at)

    def answered(self, pairs: int, seconds: float) -> None:
        """A reply for so many pairs took so long, by itself."""
        self.last_s = seconds
        self.latency.record(pairs, seconds)

    @property
    def idle(self) -> bool:
        """Whether the host owes nothing, and nothing is to be sent to it."""
        return not self.owed and not self._queued

    def receive(self, wait_s: float) -> tuple[Share, MoeHeader, tuple[torch.Tensor, ...]] | None:
        """The next reply and the share it answers; None if it does not begin to arrive within `wait_s`.

        The tensors stay valid until the next call.

        Raises:
            LinkError: the host is lost, or said something that is no reply to its work.
        """
        share = self.owed[0]
        if not self.link.wait(deadline=Deadline.after(wait_s)):
            return None
        self.keep_what_is_lent()
        # The rest of a frame follows its beginning at once, unless the host stops right there; and not every link can give
        # up a frame half-way without being lost.
        frame = self.link.recv(deadline=Deadline.after(self._patience_s))
        try:
            header = MoeHeader.unpack(frame.header)
        except ValueError as error:
            raise LinkError(self.host, f"sent a reply that is none ({error})") from error
        if header.kind not in (Kind.DONE, Kind.FAILED) or header.sequence != share.sequence:
            raise LinkError(self.host, f"sent {header.kind.name} {header.sequence} as reply to {share.sequence}")
        now = self._clock()
        self.last_s = now - self._waiting_since
        if header.kind is Kind.DONE:  # refusing takes no time
            self.answered(len(share.pairs), self.last_s)
        self.owed.popleft()
        if self.late:
            self.late = False
            self.spare()
        self._wait_for_first(now)
        return share, header, frame.tensors

    def keep_what_is_lent(self) -> None:
        """Have nobody's answer lie in the link's memory any more: the next one may come."""
        if self.lent_to is not None:
            self.lent_to.keep()
            self.lent_to = None

    def spare(self) -> None:
        """It was late, or far slower than others: let those be asked first, for longer each time that it happens again."""
        now, (first, longest) = self._clock(), _SPARE_AFTER_LATE_S
        if now < self.slow_until:
            return
        again = now < self.slow_until + longest
        self._spared_s = min(longest, 2 * self._spared_s) if again else first
        self.slow_until = now + self._spared_s

    def refused(self) -> None:
        """The host has just refused its work: let others be asked for some time."""
        self.refused_until = self._clock() + _SPARE_AFTER_REFUSAL_S

    def excuse(self, seconds: float) -> None:
        """Do not count so much of the silence so far: this process was held up itself, and could not have heard anything."""
        self._waiting_since += seconds
        self.due += seconds

    def _wait_for_first(self, since: float) -> None:
        self._waiting_since = since
        if self.owed:
            allowed_s, fence_after_s = self.latency.limits_s(len(self.owed[0].pairs))
            self.due = since + min(self._reply_timeout_s, allowed_s)
            self._patience_s = min(self._reply_timeout_s, fence_after_s)
        else:
            self.due = math.inf
