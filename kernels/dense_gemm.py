"""Linear layers with weights in a compute dtype: the LM head, the gate, the absorbed up-projections of attention.

The weights are the M operand, as in `block_gemm.py` and for its reason. Sums are fp32; fp32 operands are multiplied in fp32,
not rounded to tf32, because the gate's choice of experts hangs on them. A row's bits depend on nothing but the row and the
weight: every launch configuration adds the same products in the same order, and only the number of tokens a program takes
differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from .block_gemm import token_tile
from .cases import Case, Work
from .launch import ARCHITECTURES, Config, kernel, launch, uses_triton
from .padding import pad_rows, padded_rows

if TYPE_CHECKING:
    import triton.language as tl


def dense_gemm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, both bf16, fp16 or fp32, giving [T, N] in that dtype; row-invariant."""
    if not uses_triton(x, weight):
        return dense_gemm_reference(x, weight)
    return _launch(x[:, None], weight[None], by_column=False)[:, 0]


def dense_gemm_by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, heads, K] times weight [heads, K, N], both bf16, fp16 or fp32, giving [T, heads, N]; row-invariant."""
    if not uses_triton(x, weight):
        return dense_gemm_by_head_reference(x, weight)
    return _launch(x, weight, by_column=True)


def dense_gemm_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`dense_gemm` in plain torch."""
    return functional.linear(pad_rows(x), weight)[: x.shape[0]]


def dense_gemm_by_head_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`dense_gemm_by_head` in plain torch."""
    tokens = x.shape[0]
    by_head = functional.pad(x, (0, 0, 0, 0, 0, padded_rows(tokens) - tokens)).transpose(0, 1).contiguous()
    return torch.bmm(by_head, weight).transpose(0, 1)[:tokens].contiguous()


@kernel
def _dense_gemm(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    T: tl.int32,
    N: tl.int32,
    K: tl.int32,
    x_token_stride: tl.int64,
    x_head_stride: tl.int64,
    weight_stride: tl.int64,
    weight_head_stride: tl.int64,
    BY_COLUMN: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    head = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    # Past the last token or row the last one is computed again and dropped: cheaper than masks in the loop. Only where a
    # load runs along the rows a mask is better: it leaves the compiler loads of 16 bytes.
    token_read = tl.minimum(token, T - 1).to(tl.int64)
    row_read = tl.minimum(row, N - 1).to(tl.int64)
    column = tl.arange(0, BK)
    x_tile = x_ptr + head * x_head_stride + token_read[:, None] * x_token_stride + column[None, :]
    weight_tile = weight_ptr + head * weight_head_stride
    if BY_COLUMN:
        weight_tile += row[:, None] + column[None, :].to(tl.int64) * weight_stride
    else:
        weight_tile += row_read[:, None] * weight_stride + column[None, :]
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for start in range(0, K, BK):
        inside = column < K - start
        tokens = tl.load(x_tile) if EVEN_K else tl.load(x_tile, mask=inside[None, :], other=0.0)
        if BY_COLUMN:
            weights = tl.load(weight_tile, mask=inside[None, :] & (row < N)[:, None], other=0.0)
            weight_tile += BK * weight_stride
        else:
            weights = tl.load(weight_tile) if EVEN_K else tl.load(weight_tile, mask=inside[None, :], other=0.0)
            weight_tile += BK
        x_tile += BK
        total = tl.dot(weights, tl.trans(tokens), total, input_precision="ieee")
    heads = tl.num_programs(2)
    out = out_ptr + (token.to(tl.int64)[None, :] * heads + head) * N + row[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < N) & (token[None, :] < T))


def _launch(x: torch.Tensor, weight: torch.Tensor, *, by_column: bool) -> torch.Tensor:
    """x [T, heads, K] and weight [heads, K, N] if by_column else [heads, N, K]."""
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    tokens, heads, width = x.shape
    rows = weight.shape[2 if by_column else 1]
    assert weight.shape == ((heads, width, rows) if by_column else (heads, rows, width)), (x.shape, weight.shape)
    out = torch.empty(tokens, heads, rows, dtype=x.dtype, device=x.device)
    config = _config(tokens, x.dtype)
    launch(
        _dense_gemm,
        (-(-tokens // config.tiles["BT"]), -(-rows // config.tiles["BN"]), heads),
        x,
        weight,
        out,
        tokens,
        rows,
        width,
        x.stride(0),
        x.stride(1),
        weight.stride(1),
        weight.stride(0),
        BY_COLUMN=by_column,
        EVEN_K=width % config.tiles["BK"] == 0,
        config=config,
    )
    return out


def _config(tokens: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return _FP32_DECODE if tokens <= _FP32_DECODE_TOKENS else _FP32_PREFILL
    tile = token_tile(tokens)
    return Config(
        num_warps=4,
        num_stages=_STAGES[tile],
        tiles={"BT": tile, "BN": 64, "BK": 128},
        source="64 weight rows: the fewest of a Hopper instruction, and two programs for each head's 128 outputs; stages: "
        "what the 99 KiB of an RTX 4090 hold, three at most",
    )


_STAGES = {16: 3, 32: 3, 64: 3, 128: 2}

_FP32_DECODE = Config(
    num_warps=2,
    num_stages=8,
    tiles={"BT": 16, "BN": 4, "BK": 128},
    source="64 programs for the gate's 256 rows, each with 14 KiB of weights in flight; of the nine compiled for sm_80 and "
    "sm_90 the one with the fewest instructions to issue up to 256 tokens",
)
_FP32_PREFILL = Config(
    num_warps=4,
    num_stages=2,
    tiles={"BT": 64, "BN": 32, "BK": 128},
    source="of the same nine the one with the fewest instructions to issue for 4096 tokens",
)
_FP32_DECODE_TOKENS = 512  # beyond, the gate has 72 programs or more with the larger tiles


def cases(architecture: int) -> Iterator[Case]:
    """DeepSeek-R1's LM head (an eighth of the vocabulary), its gate, and the absorption of the queries of 16 of 128 heads."""
    strides = dict.fromkeys(("x_token_stride", "x_head_stride", "weight_stride", "weight_head_stride"), "i64")
    for name, kind, tokens, N, K, heads, bounds in (
        ("lm_head/8 16160x7168 decode", "bf16", 16, 129280 // 8, 7168, 1, (165, 165, 165, 150, 195, 125)),
        ("gate 256x7168", "fp32", 16, 256, 7168, 1, (370, 370, 370, 370, 370, 345)),
        ("head_linear/8 16x128x512 decode", "bf16", 16, 512, 128, 16, (185, 185, 185, 210, 250, 170)),
    ):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        config = _config(tokens, dtype)

        def work(
            tokens: int,
            N: int = N,
            K: int = K,
            heads: int = heads,
            dtype: torch.dtype = dtype,
            tiles: Mapping[str, int] = config.tiles,
        ) -> Work | None:
            if _config(tokens, dtype).tiles != tiles:
                return None
            size = dtype.itemsize
            return Work(
                bytes=size * heads * (tokens * K + N * K + tokens * N),
                flops=2.0 * heads * tokens * N * K,
                programs=-(-tokens // tiles["BT"]) * -(-N // tiles["BN"]) * heads,
                iterations=-(-K // tiles["BK"]),
            )

        yield Case(
            name=name,
            kernel=_dense_gemm,
            architecture=architecture,
            arguments={
                **dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{kind}"),
                **dict.fromkeys(("T", "N", "K"), "i32"),
                **strides,
            },
            unaligned=frozenset({"T"}),
            constants={"BY_COLUMN": heads > 1, "EVEN_K": True},
            config=config,
            max_loop_instructions=bounds[ARCHITECTURES.index(architecture)],
            tensor_core=None if kind == "fp32" else _TENSOR_CORE.get(architecture, "HMMA"),
            arithmetic="fp32" if kind == "fp32" else "fp16",
            work=work,
        )


_TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}
