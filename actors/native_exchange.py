"""One layer of a step over shm links without the interpreter: its frames to all hosts, and the sum of what they answer.

It does what is ordinary: every host owes nothing, has room for its frame, and answers it. Whatever else comes up is left to
`ExpertDispatch`, which goes on from there as if it had sent the frames itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import Array, addressof, byref

import numpy as np
import torch

from ..configs.errors import LinkError
from ..kernels.cpu.library import native
from .host_line import HostLine
from .links.base import Link
from .native_library import ActorsLibrary, Asked, Exchange, NativeRoutes, Outcome, actors_library
from .pending_experts import PendingExperts, Share

_WAIT_US = 5000
"""A wait for replies goes on in Python after so long: a host may be late or lost, which is judged there."""


class NativeExchange:
    """Asks hosts for one layer and collects their answers; one layer at a time. For the router's thread.

    Args:
        library: the frames; combine: address of the kernels' sum.

    Attributes:
        claim: what has been asked for here, and neither collected nor handed over.
        all_asked: whether the last call of `ask` asked for every pair.
        layers: how many layers have been asked for and summed natively.
        structure: `moray_exchange`, for native code that asks and collects by itself.
    """

    def __init__(self, library: ActorsLibrary, combine: int | None) -> None:
        self.claim: PendingExperts | None = None
        self.all_asked = False
        self.layers = 0
        self._library = library
        self.structure = Exchange(spin_next_rest=1, combine=combine)
        self._reference = byref(self.structure)
        self._asked: Array[Asked] = (Asked * 0)()
        self._lines: Sequence[HostLine | None] = ()
        self._lent: list[Link] = []
        self._sent_at = 0.0
        self._make_room(64, 512)

    @property
    def patience_s(self) -> float:
        """How long `collect` waits."""
        return _WAIT_US / 1e6

    def ask(
        self,
        claim: PendingExperts,
        lines: Sequence[HostLine | None],
        routes: NativeRoutes,
        *,
        sequence: int,
        now: float,
    ) -> int:
        """Ask for all pairs of a claim, while no host owes anything; `claim` is set if any has been asked for.

        Args:
            lines: of each host of the routes; None where there is no link.
            sequence: of the last frame before.
            now: on the lines' clock.

        Returns:
            The sequence of the last frame, as many more as hosts were asked, or should have been.
        """
        self.describe(
            claim.hidden_states,
            claim.topk_ids,
            claim.topk_weights,
            lines,
            epoch=claim.epoch,
            sequence=sequence,
        )
        x = self.structure
        x.layer, x.routes = claim.layer, routes
        self.all_asked = False
        if self.lend():
            try:
                self.all_asked = self._library.ask_experts(self._reference) == Outcome.DONE
            finally:
                self.take_back()
            if self.all_asked or self.sent_any:
                self.outstanding(claim, now)
        return self.sequence

    def describe(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        lines: Sequence[HostLine | None],
        *,
        epoch: int,
        sequence: int,
    ) -> None:
        """Put into `structure` what is to be asked, all but the layer and its routes; see `ask`."""
        x, (tokens, top_k) = self.structure, topk_weights.shape
        if len(self._row_of_token) < tokens or len(self._sorted) < tokens * top_k:
            self._make_room(2 * tokens, 2 * tokens * top_k)
        if len(self._asked) != len(lines):
            self._asked = (Asked * len(lines))()
            x.asked = self._asked
        x.hidden_states, x.experts, x.weights = hidden_states.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr()
        x.tokens, x.hidden, x.top_k = tokens, hidden_states.shape[1], top_k
        x.epoch, x.sequence = epoch, sequence
        self._lines = lines

    @property
    def sequence(self) -> int:
        """Of the last frame."""
        return int(self.structure.sequence)

    def collect(self, load: int) -> torch.Tensor | None:
        """Wait for the answers to what was asked for, and sum them.

        Args:
            load: address of int64 [E], where every pair is counted.

        Returns:
            [T, H] in fp32; None if something else has come, or nothing in time: then the claim is to be handed over.
        """
        claim = self.claim
        assert claim is not None, "something was asked for"
        for line in self._lines:
            if line is not None:
                line.keep_what_is_lent()
        out = torch.empty(claim.hidden_states.shape, dtype=torch.float32)
        if not self.lend():
            return None
        try:
            outcome = self._library.collect_experts(self._reference, _WAIT_US, out.data_ptr(), load)
        finally:
            self.take_back()
        if outcome != Outcome.DONE:
            return None
        self.claim = None
        claim.close()
        self.layers += 1
        return out

    def answers(self) -> Iterator[tuple[HostLine, int, float]]:
        """Of what was collected last: each host's line, the pairs it answered, and how long that took from the sending on."""
        for line, asked in zip(self._lines, self._asked, strict=True):
            if line is not None and asked.sent:
                yield line, asked.end - asked.begin, asked.answer_ns / 1e9

    def outstanding(self, claim: PendingExperts, sent_at: float) -> None:
        """Native code has asked for a claim by itself, at least in part, and has not collected it."""
        self.claim, claim.asked, self._sent_at = claim, True, sent_at

    @property
    def sent_any(self) -> bool:
        """Whether any host has been sent a frame of what was asked for last."""
        return any(asked.sent for asked in self._asked)

    def hand_over(self) -> list[tuple[HostLine, Share]]:
        """Have the hosts' lines wait for what was asked for here, as if they had sent it.

        Returns:
            What was to be sent as well, but no socket took it: for the lines to send.
        """
        claim, self.claim = self.claim, None
        unsent: list[tuple[HostLine, Share]] = []
        if claim is None:
            return unsent
        for number, (line, asked) in enumerate(zip(self._lines, self._asked, strict=True)):
            if line is None or asked.begin == asked.end:
                continue
            keys, pairs = np.divmod(self._sorted[asked.begin : asked.end].astype(np.int64), 1 << 32)
            share = Share(line.host, claim, pairs, keys - number * self.structure.routes.width, asked.sequence)
            if asked.sent:
                line.was_sent(share, self._sent_at)
            else:
                unsent.append((line, share))
        return unsent

    def lend(self) -> bool:
        """Have native code use the links that it can; False if there is none, or one is broken, and then none is lent."""
        lent = False
        try:
            for line, asked in zip(self._lines, self._asked, strict=True):
                state = None if line is None else line.link.lend()
                if line is None or state is None:
                    asked.link = None
                else:
                    self._lent.append(line.link)
                    asked.link = addressof(state)
            lent = bool(self._lent)
        except LinkError:
            pass  # who uses it next will find that as well, and does something about it
        finally:
            if not lent:
                self.take_back()
                for asked in self._asked:
                    asked.link = None
        return lent

    def take_back(self) -> None:
        """End what `lend` has begun."""
        for link in self._lent:
            link.take_back()
        self._lent.clear()

    def _make_room(self, tokens: int, pairs: int) -> None:
        x = self.structure
        self._row_of_token, self._replicas = np.empty(tokens, dtype=np.int32), np.empty(pairs, dtype=np.int32)
        self._sorted, self._outputs = np.empty((2, pairs), dtype=np.uint64)
        x.row_of_token, x.sorted = self._row_of_token.ctypes.data, self._sorted.ctypes.data
        x.outputs, x.replicas = self._outputs.ctypes.data, self._replicas.ctypes.data


def native_exchange() -> NativeExchange | None:
    """One, where both native libraries are there."""
    library, kernels = actors_library(), native()
    return None if library is None or kernels is None else NativeExchange(library, kernels.combine_address)
