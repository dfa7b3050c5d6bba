"""Copying experts from a host that holds them: what is asked for, what is given, and the check that it is what was meant.

The copier knows from the checkpoint's headers, and from what it computes in, which tensors an expert has when it is loaded. It
asks for rows of exactly those, a few MB at a time; a host that holds the expert in another form refuses. So every request is
answered by itself, no frame is large, and what arrives has the bits that reading would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..configs.errors import LinkError
from ..kernels.cpu.memory import weight_memory
from ..kernels.experts import MlpWeights
from ..kernels.fp8 import BLOCK, BlockWeight, Weight, scale_shape
from ..kernels.packed import TILE, PackedWeight, packed_rows
from ..model.compute import Compute
from ..model.loading import StoredMlp
from .deadline import Deadline
from .dialling import HostAddresses
from .links.base import FRAMES_IN_FLIGHT, Link
from .links.wire import MAX_TENSORS
from .moe_frames import Kind, MoeHeader

FRAME_BYTES = 4 << 20
"""About what one reply carries: a copy of 1 ms, so that neither end's other threads wait long for a core or a lock, and yet
ten times what a request costs."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A live host that experts can be copied from.

    Attributes:
        addresses: where it listens.
        experts: the (layer, expert) pairs it holds, in any of its epochs: the weights are the same in all of them.
    """

    addresses: HostAddresses
    experts: frozenset[tuple[int, int]]


Sources: TypeAlias = Mapping[str, WeightSource]
"""By host id."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of tensor number `tensor` of an expert."""

    expert: int
    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A tensor [rows, columns] without data.

    Not a meta tensor: torch's first operation with one imports sympy, in seconds in which a host would serve slowly.

    Attributes:
        packs: rows of the matrix whose tiles these are, where it is packed (see `PackedWeight`); else None.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    packs: int | None = None

    def empty(self, rows: int, device: torch.device) -> torch.Tensor:
        """A tensor with so many rows of this form."""
        if self.packs is not None and device.type == "cpu":
            return weight_memory.empty((rows, self.columns), self.dtype)
        return torch.empty((rows, self.columns), dtype=self.dtype, device=device)


Layout: TypeAlias = tuple[TensorForm, ...]
"""An expert's tensors, in the order of `tensors_of`."""


def tensors_of(weights: MlpWeights) -> tuple[torch.Tensor, ...]:
    """An expert's tensors [rows, columns], in the order in which pieces number them."""
    return (*_parts(weights.gate_up), *_parts(weights.down))


def mlp_layout(stored: StoredMlp, compute: Compute) -> Layout:
    """What `mlp_weights` makes of `stored`."""
    parts = (stored.gate_proj, stored.up_proj, stored.down_proj)
    intermediate, hidden = stored.gate_proj.weight.shape
    if compute.keep_fp8 and all(part.scale_inv is not None for part in parts):
        padded = intermediate + -intermediate % BLOCK
        layout = *_fp8_layout(2 * padded, hidden), *_fp8_layout(hidden, padded)
        return tuple(map(_packed_form, layout)) if compute.packed else layout
    if compute.packed:
        padded = intermediate + -intermediate % TILE
        forms = TensorForm(2 * padded, hidden, compute.dtype), TensorForm(hidden, padded, compute.dtype)
        return tuple(map(_packed_form, forms))
    return TensorForm(2 * intermediate, hidden, compute.dtype), TensorForm(hidden, intermediate, compute.dtype)


def resident_bytes(weights: MlpWeights) -> int:
    """Bytes an expert takes in memory."""
    return sum(tensor.nbytes for tensor in tensors_of(weights))


def plan_frames(layout: Layout, experts: Sequence[int], limit: int) -> list[list[Piece]]:
    """Cut experts that all have `layout` into pieces, and those into frames of about `limit` bytes; no piece is empty."""
    frames: list[list[Piece]] = []
    room = 0
    for expert in experts:
        for number, form in enumerate(layout):
            rows, row_bytes = form.rows, form.columns * form.dtype.itemsize
            start = 0
            while start < rows:
                if not frames or room < row_bytes or len(frames[-1]) == MAX_TENSORS:
                    frames.append([])
                    room = max(limit, row_bytes)
                stop = min(rows, start + room // row_bytes)
                frames[-1].append(Piece(expert, number, start, stop))
                room -= (stop - start) * row_bytes
                start = stop
    return frames


def give(
    find: Callable[[int, int], MlpWeights | None], layer: int, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The pieces that a FETCH frame asks for, as views of the weights.

    Args:
        find: the weights of (layer, expert), or None where there are none.
        layer: of the frame's header.
        tensors: the frame's.

    Raises:
        ValueError: an expert is not here or not in the form that is asked for, a piece does not exist, or the frame is none.
    """
    if not tensors or tensors[0].dtype != torch.int64 or tensors[0].dim() != 2 or tensors[0].shape[1] != 4:
        raise ValueError("expected pieces [P, 4] torch.int64 and the forms of an expert's tensors")
    if len(tensors[0]) > MAX_TENSORS:
        raise ValueError(f"{len(tensors[0])} pieces; a reply carries at most {MAX_TENSORS}")
    pieces = [Piece(*row) for row in tensors[0].tolist()]
    wanted = _described(tensors[1:])
    given = []
    for piece in pieces:
        weights = find(layer, piece.expert)
        if weights is None:
            raise ValueError(f"expert {piece.expert} is not held here")
        held = tensors_of(weights)
        if _described(held) != wanted:
            raise ValueError(f"expert {piece.expert} is held as {_described(held)}, asked for as {wanted}: read it")
        if not 0 <= piece.tensor < len(held) or not 0 <= piece.start < piece.stop <= held[piece.tensor].shape[0]:
            raise ValueError(f"no such piece: {piece}")
        given.append(held[piece.tensor][piece.start : piece.stop])
    return given


class WeightCopier:
    """Copies experts over one link, which it alone uses.

    Args:
        link: to the host that holds them.
        epoch: for which they are loaded; the host names it in its log.
        device: where to put them.
        silence_s: a host from which nothing has come for so long, with requests to answer, is given up.
        frame_bytes: about what to ask for at a time.
    """

    def __init__(
        self, link: Link, *, epoch: int, device: torch.device, silence_s: float, frame_bytes: int = FRAME_BYTES
    ) -> None:
        self._link = link
        self._epoch = epoch
        self._device = device
        self._silence_s = silence_s
        self._frame_bytes = frame_bytes
        self._sequence = 0

    def copy(self, layer: int, experts: Sequence[int], layout: Layout) -> Iterator[tuple[int, MlpWeights]]:
        """(expert, its weights), one after the other as they are complete.

        Args:
            layer: of the experts.
            experts: without repetition.
            layout: what each of them must be.

        Raises:
            LinkError: the host is gone, silent, or gave something else. The link is of no use any more.
        """
        outlines = [form.empty(0, torch.device("cpu")) for form in layout]
        frames = plan_frames(layout, experts, self._frame_bytes)
        first = self._sequence + 1
        tensors: list[torch.Tensor] = []
        for number, pieces in enumerate(frames):
            while self._sequence < first + min(len(frames), number + FRAMES_IN_FLIGHT) - 1:
                self._ask(layer, frames[self._sequence + 1 - first], outlines)
            for piece, rows in zip(pieces, self._answer(first + number, pieces, layout), strict=True):
                if piece.tensor == piece.start == 0:
                    tensors = [form.empty(form.rows, self._device) for form in layout]
                tensors[piece.tensor][piece.start : piece.stop].copy_(rows)
                if piece.tensor == len(layout) - 1 and piece.stop == layout[-1].rows:
                    yield piece.expert, _mlp_of(tensors, layout)

    def _ask(self, layer: int, pieces: Sequence[Piece], outlines: Sequence[torch.Tensor]) -> None:
        self._sequence += 1
        rows = torch.tensor([[p.expert, p.tensor, p.start, p.stop] for p in pieces], dtype=torch.int64)
        header = MoeHeader(Kind.FETCH, layer, self._epoch, self._sequence).pack()
        self._link.send(header, [rows, *outlines], deadline=Deadline.after(self._silence_s))

    def _answer(self, sequence: int, pieces: Sequence[Piece], layout: Layout) -> tuple[torch.Tensor, ...]:
        peer = self._link.peer
        frame = self._link.recv(deadline=Deadline.after(self._silence_s))
        try:
            header = MoeHeader.unpack(frame.header)
        except ValueError as error:
            raise LinkError(peer, f"sent a reply that is none ({error})") from error
        if header.kind is Kind.FAILED:
            raise LinkError(peer, f"refused to give weights: {header.reason}")
        if (header.kind, header.sequence) != (Kind.WEIGHTS, sequence):
            raise LinkError(peer, f"sent {header.kind.name} {header.sequence} as reply to FETCH {sequence}")
        expected = [((p.stop - p.start, layout[p.tensor].columns), layout[p.tensor].dtype) for p in pieces]
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in frame.tensors]
        if found != expected:
            raise LinkError(peer, f"sent {found} instead of {expected}")
        return frame.tensors


def _parts(weight: Weight) -> tuple[torch.Tensor, ...]:
    if isinstance(weight, PackedWeight):
        return (weight.tiles,) if weight.scale_inv is None else (weight.tiles, weight.scale_inv)
    return (weight.codes, weight.scale_inv) if isinstance(weight, BlockWeight) else (weight,)


def _fp8_layout(rows: int, columns: int) -> Layout:
    return TensorForm(rows, columns, torch.float8_e4m3fn), TensorForm(*scale_shape(rows, columns), torch.float32)


def _packed_form(form: TensorForm) -> TensorForm:
    """The same when it is packed; scales are not."""
    if form.dtype == torch.float32:
        return form
    return TensorForm(packed_rows(form.rows), TILE * form.columns, form.dtype, packs=form.rows)


def _described(tensors: Sequence[torch.Tensor]) -> str:
    """What must agree: in which dtype each tensor is, and how wide."""
    return ", ".join(f"[*, {', '.join(map(str, tensor.shape[1:]))}] {tensor.dtype}" for tensor in tensors)


def _mlp_of(tensors: Sequence[torch.Tensor], layout: Layout) -> MlpWeights:
    """The expert with these tensors: the inverse of `tensors_of`."""
    half = len(tensors) // 2  # a matrix, and its scales where it has some
    return MlpWeights(*(_weight_of(tensors[i : i + half], layout[i].packs) for i in (0, half)))


def _weight_of(parts: Sequence[torch.Tensor], packs: int | None) -> Weight:
    """The inverse of `_parts`."""
    if packs is not None:
        return PackedWeight(parts[0], parts[1] if len(parts) > 1 else None, packs)
    return BlockWeight(*parts) if len(parts) > 1 else parts[0]
