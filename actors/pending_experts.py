"""One layer of one step on its way through the expert hosts: what is asked, of whom, and what has come back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..configs.errors import LinkError
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
        self.experts: IntArray = topk_ids.flatten().numpy()
        self.load: IntArray = np.bincount(self.experts, minlength=all_experts)
        self.is_open: npt.NDArray[np.bool_] = np.ones(len(self.experts), dtype=np.bool_)
        self.left = len(self.experts)
        self.asked = False
        self.refused: dict[str, str] = {}
        self._hidden_states = hidden_states
        self._outputs = hidden_states.new_empty((len(self.experts), hidden_states.shape[1]))

    @property
    def outputs(self) -> torch.Tensor:
        """[T, K, H], complete once no pair is left."""
        return self._outputs.view(*self.topk_weights.shape, -1)

    def wants(self, share: Share) -> bool:
        """Whether any pair of the share is open still."""
        return self.left > 0 and bool(self.is_open[share.pairs].any())

    def close(self) -> None:
        """Want nothing more: all is there, or the step was given up."""
        self.is_open[:] = False
        self.left = 0

    def frame(self, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors that ask for a share: hidden states of its tokens, and its pairs as rows of those and slots."""
        rows, row_of_pair = np.unique(share.pairs // self.topk_weights.shape[1], return_inverse=True)
        hidden_states = self._hidden_states[torch.from_numpy(rows).to(self._hidden_states.device)]
        return hidden_states, torch.from_numpy(np.stack((row_of_pair, share.slots)).astype(np.int32))

    def take(self, share: Share, tensors: tuple[torch.Tensor, ...]) -> None:
        """Take the answer to a share of this layer; pairs that others have answered meanwhile keep those bits.

        Raises:
            LinkError: it is not what the share's pairs must give.
        """
        expected = self._outputs
        shape = (len(share.pairs), expected.shape[1])
        if len(tensors) != 1 or tensors[0].shape != shape or tensors[0].dtype != expected.dtype:
            found = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors) or "nothing"
            raise LinkError(share.host, f"answered {found} instead of {list(shape)} {expected.dtype}")
        wanted = self.is_open[share.pairs]
        if not wanted.any():
            return
        pairs, answer = torch.from_numpy(share.pairs), tensors[0]
        if not wanted.all():
            some = torch.from_numpy(np.flatnonzero(wanted))
            pairs, answer = pairs[some], answer[some.to(answer.device)]
        expected[pairs.to(expected.device)] = answer.to(expected.device)
        self.is_open[share.pairs] = False
        self.left -= len(pairs)


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
    slots: IntArray
    sequence: int
    sent_at: float = math.inf
