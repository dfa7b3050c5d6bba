"""One layer of one step on its way through the expert hosts: what is asked, of whom, and what has come back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..configs.errors import LinkError
from .deadline import Deadline
from .links.base import Link
from .routes import IntArray


class PendingExperts:
    """Expert outputs on their way: made by `ExpertDispatch.start`, redeemed once by `finish`.

    A pair is one of a token's experts; its position is that in the flattened [T * K]. A pair stays open until somebody has
    answered it. It may be asked of several hosts: they give the same bits, and the first to answer is taken.

    Args:
        hidden_states: [T, H]; topk_ids: [T, K], on the CPU; topk_weights: [T, K].
        all_experts: experts a layer.

    Attributes:
        experts: [T * K] expert of each pair.
        load: [E] pairs of each expert.
        left: pairs that are open.
        asked: whether the pairs have been sent out once.
        hedged: whether some were asked of a second host before the first had answered.
        refused: host -> what it said; it is not asked for this layer again.
    """

    def __init__(
        self,
        layer: int,
        epoch: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        all_experts: int,
    ) -> None:
        self.layer = layer
        self.epoch = epoch
        self.topk_weights = topk_weights
        self.experts: IntArray = topk_ids.numpy().ravel()
        self.load: IntArray = np.bincount(self.experts, minlength=all_experts)
        self.left = len(self.experts)
        self.is_open: npt.NDArray[np.bool_] = np.ones(self.left, dtype=np.bool_)
        self.asked = self.hedged = False
        self.refused: dict[str, str] = {}
        self._top_k = topk_ids.shape[1]
        self._hidden_states = hidden_states
        self._in_memory = hidden_states.device.type == "cpu"
        self._outputs = hidden_states.new_empty((self.left, hidden_states.shape[1]))

    @property
    def outputs(self) -> torch.Tensor:
        """[T, K, H], complete once no pair is left."""
        return self._outputs.view(*self.topk_weights.shape, -1)

    def wants(self, share: Share) -> bool:
        """Whether any pair of the share is open still; of one that was asked for and not answered."""
        return self.left > 0 and (not self.hedged or bool(self.is_open[share.pairs].any()))

    def close(self) -> None:
        """Want nothing more: all is there, or the step was given up."""
        self.is_open[:] = False
        self.left = 0

    def frame(self, share: Share, link: Link, *, deadline: Deadline) -> tuple[torch.Tensor, ...]:
        """The tensors that ask for a share: hidden states of its tokens, and its pairs as rows of those and slots.

        They are in memory of the link's, where it has any: hidden states are copied once on their way.

        Raises:
            LinkError: see `Link.prepare`.
        """
        tokens, hidden = len(self._hidden_states), self._hidden_states
        rows, row_of_pair = _rows(share.pairs // self._top_k, tokens)
        room = None
        if self._in_memory:
            count = tokens if rows is None else len(rows)
            forms = (hidden.dtype, (count, hidden.shape[1])), (torch.int32, (2, len(share.pairs)))
            room = link.prepare(forms, deadline=deadline)
        if room is None:
            if rows is not None:
                hidden = hidden[torch.from_numpy(rows).to(hidden.device)]
            return hidden, torch.from_numpy(np.stack((row_of_pair, share.slots)).astype(np.int32))
        if rows is None:
            room[0].copy_(hidden)
        else:
            torch.index_select(hidden, 0, torch.from_numpy(rows), out=room[0])
        pairs = room[1].numpy()
        pairs[0], pairs[1] = row_of_pair, share.slots
        return room

    def take(self, share: Share, tensors: tuple[torch.Tensor, ...]) -> None:
        """Take the answer to a share of this layer; pairs that others have answered meanwhile keep those bits.

        Raises:
            LinkError: it is not what the share's pairs must give.
        """
        expected, count = self._outputs, len(share.pairs)
        shape = (count, expected.shape[1])
        if len(tensors) != 1 or tensors[0].shape != shape or tensors[0].dtype != expected.dtype:
            found = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors) or "nothing"
            raise LinkError(share.host, f"answered {found} instead of {list(shape)} {expected.dtype}")
        if not self.left:
            return
        pairs, answer = share.pairs, tensors[0]
        if self.hedged:
            wanted = np.flatnonzero(self.is_open[share.pairs])
            if len(wanted) < count:
                count = len(wanted)
                pairs, answer = pairs[wanted], answer[torch.from_numpy(wanted).to(answer.device)]
        if self._in_memory and answer.device.type == "cpu":
            # At the speed of memory, which torch's own ways to do this are several times below.
            _bytes_of(expected)[pairs] = _bytes_of(answer)
        else:
            expected[torch.from_numpy(pairs).to(expected.device)] = answer.to(expected.device)
        self.is_open[share.pairs] = False
        self.left -= count


def _rows(token_of_pair: IntArray, tokens: int) -> tuple[IntArray | None, IntArray]:
    """Which of so many tokens have pairs, in order; None for all. And for each pair which of those its token is."""
    if tokens == 1:
        return None, token_of_pair
    present = np.zeros(tokens, dtype=np.bool_)
    present[token_of_pair] = True
    rows = present.nonzero()[0]
    if len(rows) == tokens:
        return None, token_of_pair
    return rows, (present.cumsum() - 1)[token_of_pair]


def _bytes_of(rows: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Contiguous rows [N, H] as bytes: numpy does not know every dtype."""
    array: npt.NDArray[np.uint8] = rows.view(torch.uint8).numpy()
    return array


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
