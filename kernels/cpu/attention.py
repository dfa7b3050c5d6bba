"""The attention half of a layer over packed weights and a paged cache in bf16, with the norm and the gate that follow it.

One call does everything from the residual to the choice of experts, in as many threads as the library has: what a step costs
beside its arithmetic is paid once a layer. `model/attention.py` and `model/moe.py` have the same step by step.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..attention_plan import Segment
from ..packed import TILE, PackedWeight
from .library import Batch, Layer, Matrix, loaded
from .matrix import described


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes and constants of a layer; see `model.config.ModelConfig` for what they mean.

    Attributes:
        scale: of the attention scores.
    """

    hidden: int
    heads: int
    nope: int
    rope: int
    value: int
    kv_rank: int
    eps: float
    scale: float


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """One layer's attention, packed.

    Attributes:
        q_a, q_a_norm: [q_rank, H] and its norm [q_rank] bf16; None where queries are not compressed.
        q_b: [heads * (nope + rope), q_rank or H]; kv_a: [kv_rank + rope, H]; kv_a_norm: [kv_rank] bf16; o: [H, heads * value].
        key_up: of each head, [kv_rank, nope]: absorbed into the query; value_up: [value, kv_rank].
    """

    q_a: PackedWeight | None
    q_a_norm: torch.Tensor | None
    q_b: PackedWeight
    kv_a: PackedWeight
    kv_a_norm: torch.Tensor
    key_up: tuple[PackedWeight, ...]
    value_up: tuple[PackedWeight, ...]
    o: PackedWeight


@dataclass(frozen=True, slots=True)
class PackedGate:
    """The gate: weight [E, H] in bf16 or fp32, the selection bias [E] in fp32 or None, and the rule of `kernels/gate.py`."""

    weight: PackedWeight
    correction_bias: torch.Tensor | None
    top_k: int
    softmax: bool
    groups: int
    kept_groups: int
    normalise: bool
    scale: float


class BatchTables:
    """Where the tokens of a step stand, for every layer.

    Attributes:
        tokens: T.
        cache_rows: [T] int64, page * page_size + offset of each token.
        rotation: [T, rope / 2, 2] fp32, of each token's position.
        address: of the `moray_batch`; valid for as long as the tables are there.
    """

    def __init__(
        self,
        lines: array[int],
        pages: array[int],
        cache_rows: torch.Tensor,
        rotation: torch.Tensor,
        *,
        page_size: int,
        row: int,
    ) -> None:
        """Lines and pages are those of `moray_batch`; see `of_segments` and `of_rows`."""
        self.tokens = cache_rows.shape[0]
        # The library keeps no reference: these live as long as this object.
        self.cache_rows, self.rotation, self._tables = cache_rows, rotation, (lines, pages)
        addresses = lines.buffer_info()[0], pages.buffer_info()[0], cache_rows.data_ptr(), rotation.data_ptr()
        self._batch = Batch(self.tokens, len(lines) // 4, page_size, row, *addresses)
        self.address = ctypes.addressof(self._batch)

    @classmethod
    def of_segments(
        cls, segments: Sequence[Segment], rotations: torch.Tensor, *, page_size: int, row: int
    ) -> BatchTables:
        """Of a batch.

        Args:
            segments: one after the other they cover its rows.
            rotations: [positions, rope / 2, 2] contiguous fp32.
            page_size: positions a page.
            row: elements of a cached row.

        Raises:
            IndexError: a segment has no pages, or there is no rotation, for its positions.
        """
        assert rotations.is_contiguous(), rotations.stride()
        lines, pages, tokens = array("i"), array("i"), 0
        for segment in segments:
            if segment.length:
                assert segment.start == tokens, (segment.start, tokens)
                lines.extend((tokens, segment.length, segment.position, len(pages)))
                found = segment.pages(page_size)
                if len(found) * page_size < segment.position + segment.length:
                    raise IndexError(f"{len(found)} pages of {page_size} positions for {segment}")
                pages.extend(found)
                tokens += segment.length
        cache_rows = torch.empty(tokens, dtype=torch.int64)
        rotation = torch.empty((tokens, *rotations.shape[1:]), dtype=torch.float32)
        if loaded().place(
            *(lines.buffer_info()[0], len(lines) // 4, pages.buffer_info()[0], page_size),
            *(rotations.data_ptr(), rotations.shape[0], rotations.stride(0)),
            *(cache_rows.data_ptr(), rotation.data_ptr()),
        ):
            raise IndexError(f"positions past the {rotations.shape[0]} that there are: {list(segments)}")
        return cls(lines, pages, cache_rows, rotation, page_size=page_size, row=row)

    @classmethod
    def of_rows(cls, cache_rows: torch.Tensor, rotation: torch.Tensor, *, page_size: int, row: int) -> BatchTables:
        """Of tokens that only write to the cache; see the attributes."""
        return cls(array("i"), array("i"), cache_rows.contiguous(), rotation.contiguous(), page_size=page_size, row=row)


class AttentionKernel:
    """One layer's attention, the norm after it, and its gate where it has one.

    Attributes:
        address: of its `moray_layer`; valid for as long as the kernel is there.
    """

    def __init__(
        self,
        shape: LayerShape,
        weights: PackedAttention,
        attention_norm: torch.Tensor,
        feed_forward_norm: torch.Tensor,
        gate: PackedGate | None,
    ) -> None:
        if shape.kv_rank % TILE or shape.rope % 2:
            raise ValueError(
                f"a latent of {shape.kv_rank} + {shape.rope}: the CPU kernels take multiples of {TILE} and of 2"
            )
        self.gate = gate
        self._kept = weights, attention_norm, feed_forward_norm  # the library keeps no reference
        self._key_up = (Matrix * shape.heads)(*map(described, weights.key_up))
        self._value_up = (Matrix * shape.heads)(*map(described, weights.value_up))
        empty = Matrix()
        bias = None if gate is None else gate.correction_bias
        self._layer = Layer(
            *(shape.hidden, shape.heads, shape.nope, shape.rope, shape.value),
            *(0 if weights.q_a is None else weights.q_a.rows, shape.kv_rank),
            *((0, 0, 1, 1, 0, 0) if gate is None else _rule(gate)),
            *(shape.eps, shape.scale, 1.0 if gate is None else gate.scale),
            attention_norm.data_ptr(),
            None if weights.q_a_norm is None else weights.q_a_norm.data_ptr(),
            weights.kv_a_norm.data_ptr(),
            feed_forward_norm.data_ptr(),
            empty if weights.q_a is None else described(weights.q_a),
            *(described(matrix) for matrix in (weights.q_b, weights.kv_a, weights.o)),
            empty if gate is None else described(gate.weight),
            None if bias is None else bias.data_ptr(),
            self._key_up,
            self._value_up,
        )
        self.address = ctypes.addressof(self._layer)

    def __call__(
        self, hidden_states: torch.Tensor, batch: BatchTables, cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Write the batch's rows to the cache, attend, add to the residual, norm, and choose experts.

        Args:
            hidden_states: [T, H] contiguous bf16; the sum with the attention's output afterwards.
            batch: of these tokens.
            cache: [P, page_size, kv_rank + rope] contiguous bf16.

        Returns:
            what the feed-forward part is to be given [T, H]; topk_ids [T, K] int64 and topk_weights [T, K] fp32, or None twice
            where there is no gate.
        """
        normed = torch.empty_like(hidden_states)
        ids = weights = None
        if self.gate is not None:
            ids = torch.empty((batch.tokens, self.gate.top_k), dtype=torch.int64)
            weights = torch.empty((batch.tokens, self.gate.top_k), dtype=torch.float32)
        loaded().attention(
            self.address,
            batch.address,
            hidden_states.data_ptr(),
            cache.data_ptr(),
            normed.data_ptr(),
            None if ids is None else ids.data_ptr(),
            None if weights is None else weights.data_ptr(),
        )
        return normed, ids, weights

    def fill(
        self, hidden_states: torch.Tensor, rotation: torch.Tensor, cache_rows: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """Only write the cache rows of hidden_states [T, H] contiguous bf16: with the bits that a call would give them.

        Args:
            rotation, cache_rows: of these tokens, see `BatchTables`.
            cache: [P, page_size, kv_rank + rope] contiguous bf16.
        """
        batch = BatchTables.of_rows(cache_rows, rotation, page_size=cache.shape[1], row=cache.shape[2])
        loaded().latents(self.address, batch.address, hidden_states.data_ptr(), cache.data_ptr())


def add(hidden_states: torch.Tensor, routed: torch.Tensor | None, shared: torch.Tensor | None) -> None:
    """hidden_states [T, H] bf16 += routed + shared, each fp32 [T, H], summed in fp32 and rounded to bf16 before it is added."""
    loaded().add(
        hidden_states.data_ptr(),
        None if routed is None else routed.data_ptr(),
        None if shared is None else shared.data_ptr(),
        hidden_states.numel(),
    )


def _rule(gate: PackedGate) -> tuple[int, ...]:
    return gate.weight.rows, gate.top_k, gate.groups, gate.kept_groups, int(gate.softmax), int(gate.normalise)
