"""What one MoE layer of a step sends, to the byte, and what its hosts must read: from the functions that do it.

Replicas are chosen by `actors/replica_choice.py` from `actors/routes.py`, and frames are laid out by `actors/links/wire.py`,
here on tensors without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from ...actors.links import wire
from ...actors.moe_frames import Kind, MoeHeader
from ...actors.placement_table import PlacementTable
from ...actors.replica_choice import choose_replicas
from ...actors.routes import YES, Routes
from ...model.config import ModelConfig
from ..replica_counts import Floats

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class FrameBytes:
    """One frame: its payload, and the control message that announces it."""

    payload: int
    control: int

    @property
    def total(self) -> int:
        """Both."""
        return self.payload + self.control


@dataclass(frozen=True, slots=True)
class HostShare:
    """What one layer of one step asks of one host.

    Attributes:
        rows: tokens sent, each once.
        pairs: (token, expert) pairs computed.
        experts: distinct experts read.
        dispatch, combine: the frame to it, and the one back.
    """

    rows: int
    pairs: int
    experts: int
    dispatch: FrameBytes
    combine: FrameBytes


@cache
def work_frame(rows: int, pairs: int, hidden_size: int, dtype: torch.dtype) -> FrameBytes:
    """The request for `pairs` pairs of `rows` tokens."""
    hidden_states = torch.empty((rows, hidden_size), dtype=dtype, device=_META)
    return _frame(Kind.WORK, hidden_states, torch.empty((2, pairs), dtype=torch.int32, device=_META))


@cache
def done_frame(pairs: int, hidden_size: int, dtype: torch.dtype) -> FrameBytes:
    """The answer to a request for `pairs` pairs."""
    return _frame(Kind.DONE, torch.empty((pairs, hidden_size), dtype=dtype, device=_META))


def _frame(kind: Kind, *tensors: torch.Tensor) -> FrameBytes:
    payload = wire.plan_payload(tensors)
    header = MoeHeader(kind, layer=0, epoch=0, sequence=0).pack()
    return FrameBytes(payload.nbytes, len(wire.encode(wire.MessageType.FRAME, 0, header, payload)))


class LayerTraffic:
    """Shares out the tokens of a layer over the hosts of one placement, as a router does.

    Args:
        table: the placement.
        hidden_size, dtype: of the hidden states.
    """

    def __init__(self, table: PlacementTable, *, hidden_size: int, dtype: torch.dtype) -> None:
        self._routes = Routes(table)
        self._askable = (YES,) * len(table.slots)
        self._hidden_size = hidden_size
        self._dtype = dtype

    def shares(self, layer: int, topk_ids: npt.NDArray[np.int64]) -> Mapping[str, HostShare]:
        """What tokens with these experts [T, K] ask of each host of a model layer; hosts without work are left out."""
        tokens, top_k = topk_ids.shape
        experts = topk_ids.flatten()
        routes = self._routes.of_layer(layer, self._askable)
        replica = choose_replicas(experts, routes.hosts, routes.count)
        host_of = routes.hosts[replica, experts]
        token_of = np.repeat(np.arange(tokens), top_k)
        found = {}
        for host in np.unique(host_of).tolist():
            mine = host_of == host
            rows, pairs = len(np.unique(token_of[mine])), int(mine.sum())
            found[self._routes.hosts[host]] = HostShare(
                rows,
                pairs,
                len(np.unique(experts[mine])),
                work_frame(rows, pairs, self._hidden_size, self._dtype),
                done_frame(pairs, self._hidden_size, self._dtype),
            )
        return found


def random_experts(
    config: ModelConfig, tokens: int, *, seed: int, popularity: Floats | None = None
) -> npt.NDArray[np.int64]:
    """Experts [T, K] that a gate would choose whose scores are random: the best of them, in the groups it keeps.

    Args:
        popularity: [E], above 0: with it a choice falls on an expert in proportion to this, as the largest of logarithms with
            Gumbel noise does (E. Gumbel, 1954); without, the gate has no favourites.
    """
    generator, shape = np.random.default_rng(seed), (tokens, config.n_routed_experts)
    if popularity is None:
        scores = generator.random(shape)
    else:
        noisy = np.log(popularity) + generator.gumbel(size=shape)
        scores = np.exp(noisy - noisy.max())  # above 0, as below; the order is the same
    if config.n_group > 1:
        grouped = scores.reshape(tokens, config.n_group, -1)
        # Grouped gates score a group by its best two, or by its best one; it makes no difference to what random scores give.
        best_two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        dropped = np.argsort(best_two, axis=1)[:, : config.n_group - config.topk_group]
        np.put_along_axis(grouped, dropped[:, :, None], -1.0, axis=1)
        scores = grouped.reshape(tokens, -1)
    chosen = np.argpartition(-scores, config.num_experts_per_tok - 1, axis=1)[:, : config.num_experts_per_tok]
    return np.asarray(chosen, dtype=np.int64)
