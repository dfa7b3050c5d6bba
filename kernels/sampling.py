"""Choosing the next token: temperature, top-k, top-p, min-p, and noise that is a pure function of (seed, position).

Sampling adds Gumbel noise to the log-probabilities and takes the largest (the Gumbel-max trick; Maddison et al., 2014,
arXiv:1411.0030), with the noise hashed from (seed, position, token). No generator state exists, so an answer can be
continued on another router, after a preemption or beside other requests, and come out the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row of logits is sampled; the fields are those of `SamplingParams`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int


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


def gumbel_noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [vocab_size] in fp64 for the token at `position` of a request with this 64-bit seed."""
    key = _mix(position & _MASK)
    key = _mix(key ^ (seed & _MASK))
    key = _mix(key ^ ((seed >> 32) & _MASK))
    bits = _mix_tensor(_mix_tensor(torch.arange(vocab_size, dtype=torch.int64)) ^ key)
    uniform = (bits.double() + 0.5) / 2.0**32
    return -(-uniform.log()).log()


def filtered_logits(logits: torch.Tensor, row: RowSampling) -> torch.Tensor:
    """Logits [V] (fp32) over temperature, with every token that a filter removes at -inf.

    The filters apply in the order top-k, top-p, min-p, each to the distribution the one before left. Ties at the border
    of top-k and min-p are kept; of equals at the border of top-p the lowest ids are, as far as the sum needs them. At
    least the most likely token always stays.
    """
    scaled = logits.double() / row.temperature
    order = scaled.argsort(descending=True, stable=True)
    ranked = scaled[order]
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if row.top_k:
        keep = ranked >= ranked[min(row.top_k, ranked.shape[0]) - 1]
    if row.top_p < 1.0:
        probabilities = ranked.masked_fill(~keep, float("-inf")).softmax(-1)
        # A token stays while the mass of the tokens before it has not reached top_p.
        keep &= probabilities.cumsum(-1) - probabilities < row.top_p
    if row.min_p > 0.0:
        probabilities = ranked.masked_fill(~keep, float("-inf")).softmax(-1)
        keep &= probabilities >= row.min_p * probabilities[0]
    keep[0] = True
    return torch.full_like(scaled, float("-inf")).scatter_(0, order[keep], ranked[keep])


def sample(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    """The next token of each row of logits [B, V] (fp32); a row's choice does not depend on the other rows."""
    chosen: list[int] = logits.argmax(-1).tolist()
    for i, row in enumerate(rows):
        if row.temperature > 0.0:
            noise = gumbel_noise(row.seed, row.position, logits.shape[1])
            chosen[i] = int((filtered_logits(logits[i].cpu(), row) + noise).argmax())
    return chosen
