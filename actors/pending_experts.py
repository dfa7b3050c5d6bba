"""One layer of one step on its way through the expert hosts: what is asked, of whom, and what has come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from ..configs.errors import LinkError
from ..kernels.combine import combine_parts
from .deadline import Deadline
from .links.base import Link
from .placement_table import PlacementTable
from .routes import IntArray


class PendingExperts:
    """Expert outputs on their way: made by `ExpertDispatch.start`, redeemed once by `finish`.

    A pair is one of a token's experts; its position is that in the flattened [T * K]. A pair stays open until somebody has
    answered it. It may be asked of several hosts: they give the same bits, and the first to answer is taken.

    Args:
        table: the placement that it is asked by.
        hidden_states: [T, H]; topk_ids: [T, K], on the CPU; topk_weights: [T, K].

    Attributes:
        hidden_states, topk_ids, topk_weights: as given, contiguous.
        left: pairs that are open.
        asked: whether the pairs have been sent out once.
        hedged: whether some were asked of a second host before the first had answered.
        refused: host -> what it said; it is not asked for this layer again.
    """

    def __init__(
        self,
        table: PlacementTable,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> None:
        self.layer = layer
        self.epoch = table.epoch
        self.hidden_states = hidden_states.contiguous()
        self.topk_ids, self.topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
        self._tokens, self._top_k = topk_ids.shape
        self.left = self._tokens * self._top_k
        self.asked = self.hedged = False
        self.refused: dict[str, str] = {}
        self._width = hidden_states.shape[1]
        self._all_experts = table.experts
        self._answers: list[tuple[IntArray, torch.Tensor]] = []

    # What a claim needs only where Python asks or answers is made then: each call of torch or numpy costs ten microseconds and
    # more in the middle of a layer, whose tensors have left nothing of Python in the caches.

    @cached_property
    def experts(self) -> IntArray:
        """[T * K] expert of each pair."""
        experts: IntArray = self.topk_ids.numpy().ravel()
        return experts

    @cached_property
    def load(self) -> IntArray:
        """[E] pairs of each expert."""
        return np.bincount(self.experts, minlength=self._all_experts)

    @cached_property
    def is_open(self) -> npt.NDArray[np.bool_]:
        """[T * K] whether nobody has answered the pair."""
        return np.ones(self._tokens * self._top_k, dtype=np.bool_)

    def result(self) -> torch.Tensor:
        """The sum over K in top-k order: [T, H] in fp32. Once no pair is left."""
        assert not self.left, f"{self.left} pairs are open"
        return combine_parts(self._answers, self.topk_weights, like=self.hidden_states)

    def keep(self) -> None:
        """Have the answers so far in memory of their own: a link is about to receive the next frame where they lie."""
        self._answers = [(pairs, outputs.clone()) for pairs, outputs in self._answers]

    def wants(self, share: Share) -> bool:
        """Whether any pair of the share is open still; of one that was asked for and not answered."""
        return self.left > 0 and (not self.hedged or bool(self.is_open[share.pairs].any()))

    def close(self) -> None:
        """Want nothing more: the layer is done, or the step was given up."""
        self.left = 0
        self._answers = []

    def frame(self, share: Share, link: Link, *, deadline: Deadline) -> tuple[torch.Tensor, ...]:
        """The tensors that ask for a share: hidden states of its tokens, and its pairs as rows of those and slots.

        They are in memory of the link's, where it has any: hidden states are copied once on their way.

        Raises:
            LinkError: see `Link.prepare`.
        """
        hidden, count = self.hidden_states, len(share.pairs)
        rows, row_of_pair = _rows(share.pairs, self._tokens, self._top_k)
        room = None
        if hidden.is_cpu:
            tokens = self._tokens if rows is None else len(rows)
            forms = (hidden.dtype, (tokens, self._width)), (torch.int32, (2, count))
            room = link.prepare(forms, deadline=deadline)
        if room is None:
            if rows is not None:
                hidden = hidden[torch.from_numpy(rows).to(hidden.device)]
            pairs = np.empty((2, count), dtype=np.int32)
            pairs[0], pairs[1] = row_of_pair, share.slots
            return hidden, torch.from_numpy(pairs)
        if rows is None:
            room[0].copy_(hidden)
        else:
            torch.index_select(hidden, 0, torch.from_numpy(rows), out=room[0])
        pairs = room[1].numpy()
        pairs[0], pairs[1] = row_of_pair, share.slots
        return room

    def take(self, share: Share, tensors: tuple[torch.Tensor, ...]) -> None:
        """Take the answer to a share of this layer; pairs that others have answered meanwhile keep those bits.

        The answer stays where it lies: see `keep`.

        Raises:
            LinkError: it is not what the share's pairs must give.
        """
        pairs, dtype = share.pairs, self.hidden_states.dtype
        shape = (len(pairs), self._width)
        if len(tensors) != 1 or tensors[0].shape != shape or tensors[0].dtype != dtype:
            found = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors) or "nothing"
            raise LinkError(share.host, f"answered {found} instead of {list(shape)} {dtype}")
        if not self.left:
            return
        answer = tensors[0]
        if self.hedged:
            wanted = self.is_open[pairs].nonzero()[0]
            if not len(wanted):
                return
            if len(wanted) < len(pairs):
                pairs, answer = pairs[wanted], answer[torch.from_numpy(wanted).to(answer.device)]
        self._answers.append((pairs, answer))
        self.is_open[pairs] = False
        self.left -= len(pairs)


def _rows(pairs: IntArray, tokens: int, top_k: int) -> tuple[IntArray | None, IntArray | int]:
    """Which of so many tokens the pairs are of, in order; None for all. And for each pair which of those its token is."""
    if tokens == 1:
        return None, 0
    token_of_pair = pairs // top_k
    present = np.zeros(tokens, dtype=np.bool_)
    present[token_of_pair] = True
    rows = present.nonzero()[0]
    if len(rows) == tokens:
        return None, token_of_pair
    return rows, (present.cumsum() - 1)[token_of_pair]


@dataclass(eq=False, slots=True)
class Share:
    """What one host is asked for at once.

    Attributes:
        pairs: [P] positions, in the order in which they are sent.
        slots: [P] where their experts are on the host; ascending.
        sequence: number of the frame that asks, which the reply repeats.
        sent_at: when it was sent, on the dispatch's clock; infinity before.
    """

    host: str
    claim: PendingExperts
    pairs: IntArray
    slots: npt.NDArray[np.integer]
    sequence: int
    sent_at: float = math.inf
