"""Choosing the next token: temperature, top-k, top-p, min-p, and noise that is a pure function of (seed, position).

Sampling adds Gumbel noise to the log-probabilities and takes the largest (the Gumbel-max trick; Maddison et al., 2014,
arXiv:1411.0030), with the noise hashed from (seed, position, token). No generator state exists, so an answer can be
continued on another router, after a preemption or beside other requests, and come out the same.

"The same" must hold between a CPU and a GPU, so nothing here is left to a library's last bit or to the order of a sum:

* exp and log are those of `exact_math.py`, whose bits are the same everywhere;
* probability masses are summed as integers, in units of 2**-45 of the most likely token's: exact in any order. Rounding
  to them moves the mass at top-p's border by less than 2e-9; the probabilities of the tokens that stay are not rounded.

This file is the definition, in torch on CPU tensors. `cpu/sampling.py` and, on the device, `sampling_kernels.py` choose the
same tokens; torch does where there is no native library.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import sampling_kernels
from .cpu import sampling as cpu_sampling
from .cpu.library import native
from .exact_math import exp_of_negative, log
from .launch import uses_triton
from .sampling_kernels import MASS_BITS, MAX_VOCABULARY

_MASK = 0xFFFFFFFF

_COLDEST, _HOTTEST = 1e-100, 1e100
"""Temperatures beyond these act like them: already greedy or uniform, and no quotient over- or underflows in between."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row of logits is sampled; the fields are those of `SamplingParams`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int


GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0)
"""The same wherever a greedy row stands."""

NOT_FINITE = -1
"""In place of a token: the row's logits give no choice."""


def sample(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    """The next token of each row of logits [B, V] (fp32); a row's choice does not depend on the other rows.

    On a GPU, fetching the result is the only wait for the device.

    Returns:
        Token ids; `NOT_FINITE` for a row without a finite largest logit (a NaN, +inf, or nothing but -inf).

    Raises:
        ValueError: sizes do not fit.
    """
    if logits.shape[0] != len(rows) or logits.dtype != torch.float32 or not 0 < logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"{len(rows)} rows to sample from logits {list(logits.shape)} in {logits.dtype}")
    if uses_triton(logits):
        return _sample_on_device(logits, rows)
    if (library := native()) is not None:
        table = array("q")
        for row in rows:
            table.extend(_packed(row))
        return cpu_sampling.choose(library, logits, table)
    return _sample_reference(logits, rows)


def _sample_on_device(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    sampled = [row for row in rows if row.temperature > 0.0]
    chosen = sampling_kernels.choose(
        logits,
        torch.tensor([_packed(row) for row in rows], dtype=torch.int64).reshape(-1, len(sampling_kernels.FIELDS)),
        sampled=bool(sampled),
        by_count=any(row.top_k for row in sampled),
        by_mass=any(row.top_p < 1.0 for row in sampled),
    )
    tokens: list[int] = chosen.tolist()
    return tokens


_GREEDILY = (0,) * len(sampling_kernels.FIELDS)


def _packed(row: RowSampling) -> Sequence[int]:
    """A row's line of the table that goes to a kernel, in the order of `sampling_kernels.FIELDS`."""
    if row.temperature <= 0.0:
        return _GREEDILY
    numbers = struct.pack("<3d", _bounded(row.temperature), row.top_p, row.min_p)
    temperature, top_p, min_p = struct.unpack("<3q", numbers)
    return [temperature, min(row.top_k, MAX_VOCABULARY), top_p, min_p, noise_key(row.seed, row.position)]


def _sample_reference(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    chosen: list[int] = torch.where(logits.amax(-1).isfinite(), logits.argmax(-1), -1).tolist()
    for i, row in enumerate(rows):
        if row.temperature > 0.0 and chosen[i] >= 0:
            below = _below_peak(logits[i], row)
            noise = gumbel_noise(row.seed, row.position, logits.shape[1])
            chosen[i] = int((below + noise).masked_fill(~kept_tokens(logits[i], row), -math.inf).argmax())
    return chosen


def kept_tokens(logits: torch.Tensor, row: RowSampling) -> torch.Tensor:
    """Which tokens [V] (bool) the filters leave of logits [V] (fp32) with a finite maximum.

    The filters apply in the order top-k, top-p, min-p, each to the distribution the one before left. Ties at the border
    of top-k and min-p are kept; of equals at the border of top-p the lowest ids are, as far as the sum needs them. At
    least the most likely token always stays.
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < row.top_k < logits.shape[0]:
        kept = logits >= logits.topk(row.top_k).values[-1]
    if not (row.top_p < 1.0 or row.min_p > 0.0):
        return kept
    weights = exp_of_negative(_below_peak(logits, row))
    if row.top_p < 1.0:
        masses = (weights * 2.0**MASS_BITS + 0.5).floor().to(torch.int64).masked_fill(~kept, 0)
        order = logits.argsort(descending=True, stable=True)
        ranked = masses[order]
        # A token stays while the mass of the tokens before it has not reached top_p of the total.
        total = int(ranked.sum())
        wanted = min(max(math.ceil(row.top_p * float(total)), 1), total)
        kept &= torch.empty_like(kept).scatter_(0, order, ranked.cumsum(-1) - ranked < wanted)
    if row.min_p > 0.0:
        kept &= weights >= row.min_p  # the most likely token's weight is 1
    return kept


def filtered_logits(logits: torch.Tensor, row: RowSampling) -> torch.Tensor:
    """Logits [V] (fp32) over temperature in fp64, with every token that a filter removes at -inf."""
    return (logits.double() / _bounded(row.temperature)).masked_fill(~kept_tokens(logits, row), -math.inf)


def _below_peak(logits: torch.Tensor, row: RowSampling) -> torch.Tensor:
    """How far each logit [V] lies below the largest one, over temperature: [V] in fp64, at most 0."""
    wide = logits.double()
    return (wide - wide.max()) / _bounded(row.temperature)


def _bounded(temperature: float) -> float:
    return min(max(temperature, _COLDEST), _HOTTEST)


def noise_key(seed: int, position: int) -> int:
    """32 bits that stand for a 64-bit seed and a position."""
    key = _mix(position & _MASK)
    key = _mix(key ^ (seed & _MASK))
    return _mix(key ^ ((seed >> 32) & _MASK))


def gumbel_noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [vocab_size] in fp64 for the token at `position` of a request with this 64-bit seed."""
    bits = _mix_tensor(_mix_tensor(torch.arange(vocab_size, dtype=torch.int64)) ^ noise_key(seed, position))
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -log(-log(uniform))


def _mix(x: int) -> int:
    """A 32-bit integer hash with good avalanche ("lowbias32", Wellons, 2018), on a Python integer."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _multiply(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor mod 2**32 for int64 x below 2**32, in halves: the whole product would overflow a signed 64-bit integer."""
    return ((x & 0xFFFF) * factor + (((x >> 16) * (factor & 0xFFFF)) << 16)) & _MASK


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`_mix` on an int64 tensor of values below 2**32."""
    x = _multiply(x ^ (x >> 16), 0x7FEB352D)
    x = _multiply(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)
