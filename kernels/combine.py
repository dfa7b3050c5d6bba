"""The exact combine: expert outputs summed with the gate's weights in an order that is part of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .cases import Case, Work
from .cpu.combine import combine_rows
from .cpu.library import native
from .launch import Config, kernel, launch, uses_triton

if TYPE_CHECKING:
    import triton.language as tl


_AT_ONCE = 1 << 18
"""Elements whose products are computed at once: 1 MB of them, measured. Larger tensors come from the system anew each time."""


def combine(pair_outputs: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Sum expert outputs [T, K, H] with weights [T, K] (fp32) in fp32 and in top-k order, giving [T, H] in fp32.

    The order is part of the contract: the bits do not depend on where the experts ran or who answered first. Every product
    and every sum is rounded, so they are the same bits on every GPU and on the CPU. NaN and infinities give what the
    formula gives.
    """
    if not uses_triton(pair_outputs, topk_weights):
        return _combine_on_cpu(pair_outputs, topk_weights)
    assert topk_weights.dtype == torch.float32, topk_weights.dtype
    tokens, top_k, width = pair_outputs.shape
    out = torch.empty((tokens, width), dtype=torch.float32, device=pair_outputs.device)
    launch(
        _combine,
        (tokens, -(-width // _CONFIG.tiles["BLOCK"])),
        pair_outputs.contiguous(),
        topk_weights.contiguous(),
        out,
        width,
        TOP_K=top_k,
        config=_CONFIG,
    )
    return out


def combine_parts(
    parts: Sequence[tuple[npt.NDArray[np.int64], torch.Tensor]], topk_weights: torch.Tensor, *, like: torch.Tensor
) -> torch.Tensor:
    """`combine` of outputs that lie in several places.

    Args:
        parts: of each the positions [P] in the flattened [T * K], and the outputs [P, H]; together each position once.
        topk_weights: [T, K] in fp32.
        like: any tensor [*, H] of the outputs' dtype, on the device to combine on.
    """
    tokens, top_k = topk_weights.shape
    if like.dtype == torch.bfloat16 and like.device.type == "cpu" and not uses_triton(like):
        library = native()
        if library is not None and all(rows.device.type == "cpu" for _, rows in parts):
            return combine_rows(library, parts, topk_weights.contiguous(), like.shape[1])
    outputs = like.new_empty((tokens * top_k, like.shape[1]))
    if outputs.is_cpu:
        # At the speed of memory, which torch's own ways to do this are several times below.
        place = outputs.view(torch.uint8).numpy()
        for pairs, rows in parts:
            place[pairs] = rows.cpu().view(torch.uint8).numpy()
    else:
        for pairs, rows in parts:
            outputs[torch.from_numpy(pairs).to(outputs.device)] = rows.to(outputs.device)
    return combine(outputs.view(tokens, top_k, like.shape[1]), topk_weights)


def _combine_on_cpu(pair_outputs: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The bits of `combine_reference` in fewer operations: most of them cost more than what a few tokens take."""
    if pair_outputs.numel() > _AT_ONCE:
        outputs, weights = pair_outputs.unbind(1), topk_weights.unsqueeze(-1).unbind(1)
        total = outputs[0].float() * weights[0]
        for output, weight in zip(outputs[1:], weights[1:], strict=True):
            total += output.float() * weight
        return total
    first, *others = (pair_outputs.float() * topk_weights.unsqueeze(-1)).unbind(1)
    total = first + others[0] if others else first.clone()
    for other in others[1:]:
        total += other
    return total


def combine_reference(pair_outputs: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """`combine` in plain torch."""
    total = pair_outputs[:, 0].float() * topk_weights[:, 0, None]
    for k in range(1, pair_outputs.shape[1]):
        total = total + pair_outputs[:, k].float() * topk_weights[:, k, None]
    return total


@kernel
def _combine(
    outputs_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.int32,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(outputs_ptr + token * TOP_K * width + column, mask=inside, other=0.0).to(tl.float32)
    total = first * tl.load(weights_ptr + token * TOP_K)
    for k in tl.static_range(1, TOP_K):
        output = tl.load(outputs_ptr + (token * TOP_K + k) * width + column, mask=inside, other=0.0).to(tl.float32)
        total = total + output * tl.load(weights_ptr + token * TOP_K + k)
    tl.store(out_ptr + token * width + column, total, mask=inside)


_CONFIG = Config(
    num_warps=4,
    num_stages=1,
    tiles={"BLOCK": 1024},
    fp_fusion=False,  # a fused multiply-add rounds once where torch rounds twice
    source="8 elements a thread: one 16-byte load of bf16 for each of the K experts",
)


def cases(architecture: int) -> Iterator[Case]:
    """DeepSeek-R1's routed experts: 8 outputs a token."""
    top_k, width = 8, 7168

    def work(tokens: int) -> Work:
        return Work(
            bytes=tokens * width * (2 * top_k + 4),
            flops=2.0 * tokens * top_k * width,
            programs=tokens * width / _CONFIG.tiles["BLOCK"],
            iterations=1,
        )

    yield Case(
        name="combine 8x7168",
        kernel=_combine,
        architecture=architecture,
        arguments={"outputs_ptr": "*bf16", "weights_ptr": "*fp32", "out_ptr": "*fp32", "width": "i32"},
        constants={"TOP_K": top_k},
        config=_CONFIG,
        max_loop_instructions=440,
        work=work,
    )
