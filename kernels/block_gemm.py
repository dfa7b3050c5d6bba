"""FP8 linear layers: quantised rows times a block-quantised weight (W8A8, as DeepSeek-V3 was trained: arXiv:2412.19437, 3.3).

Three decisions shape the kernel:

* The weights are the M operand, `dot(weights [BN, 128], trans(tokens [BT, 128]))`. Tensor cores of Hopper and Blackwell
  take FP8 only for 64 or more rows of M; with the tokens there, a decode batch would be multiplied in 16 bits instead.
* Every 128 of K a partial product leaves the tensor core and is added, with both scales, to an fp32 accumulator in
  registers: scales change every 128, and the accumulators of FP8 tensor cores keep some 14 bits only (DeepGEMM issue 37).
* GPUs without FP8 (sm_80, sm_86) read the codes as float8e4b15, the same bits with another exponent bias, which becomes
  fp16 in a few integer instructions: a code of value v is v * 2**-8 there, subnormals included. fp16 holds that exactly, so
  the numbers are those of the other generations up to the order in which one product is summed.

A row's bits depend on nothing but the row and the weight: the K loop is the same in every launch configuration, nothing is
split along K, and only the number of tokens a program takes differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from .cases import Case, Work
from .fp8 import BLOCK, BlockWeight, QuantizedRows, decode_e4m3, scale_shape
from .launch import Config, architecture, kernel, launch, uses_triton
from .padding import pad_rows

if TYPE_CHECKING:
    import triton.language as tl

FP8_ARCHITECTURE = 89
"""The first generation that has e4m3 as a type and in its tensor cores: older ones read and write its bits as others."""

WEIGHT_TILE = 64
"""Weight rows of one program: the fewest that Hopper's FP8 instruction takes. More would leave multiprocessors idle in
decode, where the grid has no other axis: a layer of 7168 outputs gives 112 programs."""


def block_gemm(x: QuantizedRows, weight: BlockWeight, dtype: torch.dtype) -> torch.Tensor:
    """Multiply quantised rows with a weight transposed.

    Args:
        x: [T, K], any T. A row with a NaN scale gives a row of NaN.
        weight: [N, K] on the same device; N and K need not be multiples of 128.
        dtype: of the result: bf16, fp16 or fp32; rounded once from fp32.

    Returns:
        [T, N]; row-invariant.
    """
    if not uses_triton(x.codes, x.scales, weight.codes, weight.scale_inv):
        return block_gemm_reference(x, weight, dtype)
    tokens, width = x.codes.shape
    rows = weight.codes.shape[0]
    assert weight.codes.shape[1] == width, (x.codes.shape, weight.codes.shape)
    assert all(tensor.is_contiguous() for tensor in (x.codes, x.scales, weight.codes, weight.scale_inv))
    generation = architecture(x.codes.device)
    out = torch.empty(tokens, rows, dtype=dtype, device=x.codes.device)
    config = _config(generation, tokens)
    launch(
        _block_gemm,
        (-(-tokens // config.tiles["BT"]), -(-rows // WEIGHT_TILE)),
        as_operand(x.codes, generation),
        x.scales,
        as_operand(weight.codes, generation),
        weight.scale_inv,
        out,
        tokens,
        rows,
        width,
        FP8=generation >= FP8_ARCHITECTURE,
        EVEN_K=width % BLOCK == 0,
        config=config,
    )
    return out


def block_gemm_reference(x: QuantizedRows, weight: BlockWeight, dtype: torch.dtype) -> torch.Tensor:
    """`block_gemm` in plain torch: fp32 partial products of 128 columns, scaled and added in order."""
    tokens, width = x.codes.shape
    rows = weight.codes.shape[0]
    codes = pad_rows(decode_e4m3(x.codes))
    scales = pad_rows(x.scales)
    total = torch.zeros(codes.shape[0], rows, dtype=torch.float32, device=codes.device)
    for block in range(weight.scale_inv.shape[1]):
        columns = slice(block * BLOCK, min((block + 1) * BLOCK, width))
        partial = functional.linear(codes[:, columns].contiguous(), decode_e4m3(weight.codes[:, columns]))
        weight_scales = weight.scale_inv[:, block].repeat_interleave(BLOCK)[:rows]
        total += partial * (scales[:, block, None] * weight_scales)
    return total[:tokens].to(dtype)


def as_operand(codes: torch.Tensor, generation: int) -> torch.Tensor:
    """e4m3 codes as `fp8_product` wants them on a generation: themselves, or as bytes where Triton has no such type."""
    return codes if generation >= FP8_ARCHITECTURE else codes.view(torch.uint8)


@kernel
def fp8_product(weights: tl.tensor, tokens: tl.tensor, FP8: tl.constexpr) -> tl.tensor:
    """weights [BN, 128] times tokens [BT, 128] transposed, both e4m3 (bytes unless FP8), as [BN, BT] in fp32."""
    if FP8:
        return tl.dot(weights, tl.trans(tokens))
    else:  # noqa: RET505  # Triton has no early return from one side of a constexpr branch
        half_weights = weights.to(tl.float8e4b15, bitcast=True).to(tl.float16)
        half_tokens = tokens.to(tl.float8e4b15, bitcast=True).to(tl.float16)
        return tl.dot(half_weights, tl.trans(half_tokens)) * 65536.0  # 2**-8 in each operand


@kernel
def _block_gemm(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    T: tl.int32,
    N: tl.int32,
    K: tl.int32,
    FP8: tl.constexpr,
    EVEN_K: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    # Programs that run together share weights: those are read from memory once, and the tokens stay in the L2 cache.
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    # Past the last token or row the last one is computed again and dropped: cheaper than masks in the loop.
    token_read = tl.minimum(token, T - 1).to(tl.int64)
    row_read = tl.minimum(row, N - 1).to(tl.int64)
    column = tl.arange(0, 128)
    groups = tl.cdiv(K, 128)
    x_tile = x_ptr + token_read[:, None] * K + column[None, :]
    weight_tile = weight_ptr + row_read[:, None] * K + column[None, :]
    x_scale = x_scale_ptr + token_read * groups
    weight_scale = weight_scale_ptr + (tl.program_id(1) * BN // 128) * groups  # BN divides 128: one scale for the tile
    total = tl.zeros((BN, BT), dtype=tl.float32)
    next_x_scale, next_weight_scale = tl.load(x_scale), tl.load(weight_scale)
    for group in range(groups):
        # Triton's pipeliner moves ahead only what a dot reads, so the scales of the next group are asked for by hand.
        scale = next_x_scale * next_weight_scale
        ahead = tl.minimum(group + 1, groups - 1)
        next_x_scale, next_weight_scale = tl.load(x_scale + ahead), tl.load(weight_scale + ahead)
        if EVEN_K:
            weights = tl.load(weight_tile)
            tokens = tl.load(x_tile)
        else:
            inside = column[None, :] < K - group * 128
            weights = tl.load(weight_tile, mask=inside, other=0.0)
            tokens = tl.load(x_tile, mask=inside, other=0.0)
        # An explicit fma: whether a * b + c is contracted must not be up to the compiler, configuration by configuration.
        total = tl.fma(fp8_product(weights, tokens, FP8), scale[None, :], total)
        weight_tile += 128
        x_tile += 128
    out = out_ptr + token.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row[:, None] < N) & (token[None, :] < T))


def token_tile(tokens: int) -> int:
    """Tokens of one program: the smallest of 16, 32, 64 and 128 that holds them all, or 128."""
    return max(16, min(128, 1 << max(tokens - 1, 0).bit_length()))


def _config(generation: int, tokens: int) -> Config:
    tile = token_tile(tokens)
    return Config(
        num_warps=4,
        num_stages=_DECODE_STAGES[generation] if tile <= 32 else 4 if tile <= 64 else 3,
        tiles={"BT": tile, "BN": WEIGHT_TILE},
        source="decode: enough loads in flight for memory's bandwidth at a latency of 0.8 us with 112 programs of 8 KiB a "
        "load; prefill: one program on the smallest multiprocessor, two on the large ones; 4 warps issue a quarter less than 8",
    )


_DECODE_STAGES = {80: 4, 86: 4, 89: 4, 90: 6, 100: 8, 120: 4}


def cases(architecture: int) -> Iterator[Case]:
    """Layers of DeepSeek-R1's attention and shared expert; o_proj for 16 of its 128 heads."""
    fp8 = architecture >= FP8_ARCHITECTURE
    code = "*fp8e4nv" if fp8 else "*u8"
    for name, tile, N, K in (
        ("o_proj/8 7168x2048 decode", 16, 7168, 2048),
        ("q_b 24576x1536 decode 32", 32, 24576, 1536),
        ("shared gate_up 4096x7168 prefill", 128, 4096, 7168),
    ):

        def work(tokens: int, tile: int = tile, N: int = N, K: int = K) -> Work | None:
            if token_tile(tokens) != tile:
                return None
            return Work(
                bytes=N * K + 4 * math.prod(scale_shape(N, K)) + tokens * (K + 4 * K / BLOCK + 2 * N),
                flops=2.0 * tokens * N * K,
                programs=-(-tokens // tile) * -(-N // WEIGHT_TILE),
                iterations=-(-K // BLOCK),
            )

        yield Case(
            name=f"block_gemm {name}",
            kernel=_block_gemm,
            architecture=architecture,
            arguments={
                "x_ptr": code,
                "x_scale_ptr": "*fp32",
                "weight_ptr": code,
                "weight_scale_ptr": "*fp32",
                "out_ptr": "*bf16",
                **dict.fromkeys(("T", "N", "K"), "i32"),
            },
            unaligned=frozenset({"T"}),
            constants={"FP8": fp8, "EVEN_K": True},
            config=_config(architecture, tile),
            tensor_core=_TENSOR_CORE[architecture],
            max_loop_instructions=_MAX_LOOP[architecture][tile],
            arithmetic="fp8",
            work=work,
        )


_TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
_MAX_LOOP = {
    80: {16: 530, 32: 760, 128: 1600},
    86: {16: 530, 32: 760, 128: 1600},
    89: {16: 140, 32: 185, 128: 405},
    90: {16: 155, 32: 200, 128: 275},
    100: {16: 210, 32: 280, 128: 280},
    120: {16: 125, 32: 160, 128: 345},
}
