"""Constants of the kernels that large deployments on H800 and H100 are made of, each measured by itself by its authors.

None comes from the throughput of a deployment: so a prediction made of them can be held against one (`published.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ..planning.assumptions import Assumption
from .gpu_costs import Kernels

_DEEP_GEMM = (
    "fitted to DeepGEMM's table of 28 FP8 products on H800 (its README of May 2025): root mean square error 13%"
)

HOPPER = Kernels(
    memory=Assumption("share of the bandwidth, FP8 products", 0.85, "", _DEEP_GEMM),
    arithmetic=Assumption("share of the peak, FP8 products", 0.60, "", _DEEP_GEMM),
    product_s=Assumption("of each product beyond its bounds", 2e-6, "s", _DEEP_GEMM),
    other_s=Assumption(
        "of each other kernel beyond the bytes it moves",
        2e-6,
        "s",
        "taken to be that of products; norms, roundings and rotations of 128 tokens take 2 to 8 us in all in DeepSeek's "
        "decode profile (zdszero.github.io, deepseek profile)",
    ),
    start_s=Assumption("kernels that wait to be started", 0.0, "s", "CUDA graphs, or enough work in flight"),
    attention_memory=Assumption(
        "share of the bandwidth, attention over latents", 0.896, "", "FlashMLA's README: 3000 of 3350 GB/s on H800"
    ),
    attention_arithmetic=Assumption(
        "share of the peak, attention over latents",
        0.586,
        "",
        "FlashMLA as released in February 2025: 580 of 989 TFLOPS on H800 (660 since April 2025)",
    ),
    expanded_arithmetic=Assumption("share of the peak, attention over keys and values", 0.585, "", "see `hopper`"),
    step_s=Assumption(
        "a rank between two steps",
        1.5e-3,
        "s",
        "RTP-LLM's report on DeepSeek-V3: about 1.5 ms on the host between two steps",
    ),
)
"""Kernels on H800 and H100."""

_PROMPTS = (512, 1024, 2048, 4096, 8192, 16384)
_FLASH_ATTENTION_3 = (292, 423, 521, 579, 602, 616)
"""TFLOPS of 989, forward, causal, heads of 128, by length: FlashAttention-3 (arXiv:2407.08608), figure 5."""


def hopper(prompt: int) -> Kernels:
    """Those for prompts of so many tokens: short ones are attended to less efficiently."""
    rate = float(np.interp(np.log2(prompt), np.log2(_PROMPTS), _FLASH_ATTENTION_3))
    share = Assumption(
        f"share of the peak, attention over keys and values of {prompt} tokens",
        round(rate / 989, 3),
        "",
        f"FlashAttention-3 (arXiv:2407.08608, figure 5): {rate:.0f} of 989 TFLOPS on H100, causal, heads of 128",
    )
    return replace(HOPPER, expanded_arithmetic=share)


_RANKS = (8, 16, 32, 64, 128, 256)
_DISPATCH_US = (77, 118, 155, 173, 192, 194)
_COMBINE_US = (114, 195, 273, 314, 369, 360)
_LOW_LATENCY = "DeepEP's table of low-latency kernels: H800, 400 Gb/s a GPU, 128 tokens of 7168, top-8 (docs/legacy.md)"
_LOW_LATENCY_SENT = 128 * 8 * 7168
_LOW_LATENCY_RECEIVED = 128 * 8 * 7168 * 2

_NORMAL_GB_S = {16: (43.0, 43.0), 32: (58.0, 57.0), 64: (51.0, 50.0)}
_NORMAL = "DeepEP's table of normal kernels: H800, bottleneck bandwidth, 4096 tokens of 7168, top-8 (docs/legacy.md)"

_SENDING = Assumption(
    "of a GPU's computing for sending and receiving, for each token",
    118.6e-6 / 128,
    "s",
    "DeepEP pull 425: send and receive kernels take 36.7 + 32.0 us (dispatch) and 39.7 + 10.2 us (combine) for 128 tokens",
)
_TAKEN = Assumption(
    "share of multiprocessors that send and receive",
    24 / 132,
    "",
    "DeepEP's documentation: `Buffer.set_num_sms(24)`, of 132",
)


@dataclass(frozen=True)
class DeepEp:
    """DeepEP's kernels between GPUs that are router and host: an `Exchange`.

    Attributes:
        ranks: how many GPUs take part.
        kind: "low_latency" for decode: one message for each (token, expert) pair, no multiprocessor is busy while it is on its
            way; "normal" for prefill: each token once to each node, some multiprocessors are busy with it.
    """

    ranks: int
    kind: Literal["low_latency", "normal"]

    @cached_property
    def rates(self) -> tuple[Assumption, Assumption]:
        """Bytes a second of dispatch and combine, with what these count as bytes."""
        if self.kind == "normal":
            dispatch, combine = (rate * 1e9 for rate in _NORMAL_GB_S[self.ranks])
            source = _NORMAL
        else:
            at, known = np.log2(self.ranks), np.log2(_RANKS)
            dispatch = _LOW_LATENCY_SENT / (float(np.interp(at, known, _DISPATCH_US)) * 1e-6)
            combine = _LOW_LATENCY_RECEIVED / (float(np.interp(at, known, _COMBINE_US)) * 1e-6)
            source = (
                _LOW_LATENCY if self.ranks in _RANKS else f"{_LOW_LATENCY}, between those of the next numbers of ranks"
            )
        return (
            Assumption(f"{self.kind} dispatch between {self.ranks} GPUs", dispatch, "bytes/s", source),
            Assumption(f"{self.kind} combine between {self.ranks} GPUs", combine, "bytes/s", source),
        )

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """See `Exchange`."""
        return (*self.rates, _TAKEN if self.kind == "normal" else _SENDING)

    def seconds(self, sent: int, received: int) -> float:
        """See `Exchange`."""
        dispatch, combine = self.rates
        return sent / dispatch.value + received / combine.value

    def computing(self, tokens: int) -> float:
        """See `Exchange`."""
        return 0.0 if self.kind == "normal" else tokens * _SENDING.value

    @property
    def computing_share(self) -> float:
        """See `Exchange`."""
        return _TAKEN.value if self.kind == "normal" else 0.0
