"""The gate: which experts a token goes to, and with what weight (DeepSeek-V3 report, section 2.1.2, arXiv:2412.19437)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .cases import Case, Work
from .launch import Config, kernel, launch, uses_triton
from .linear import sigmoid
from .permute import sort_by_slot

if TYPE_CHECKING:
    import triton.language as tl

_NOT_THERE = -(2**63) + 1  # a rank below all others


def select_experts(
    logits: torch.Tensor,
    *,
    top_k: int,
    scoring: str,
    correction_bias: torch.Tensor | None,
    groups: int,
    kept_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick `top_k` experts a token.

    The correction bias only selects; the weights come from the unbiased scores. A group's score is the sum of its best two
    biased scores, or its best score where there is no bias. Of equal experts, and of equal groups, the lower number wins.
    A NaN is better than any number: the token then has a NaN among its weights, or in all of them if they are normalised,
    its ids are different experts all the same, and other tokens are not affected.

    Args:
        logits: [T, E] in fp32.
        top_k: experts a token, K.
        scoring: "sigmoid" or "softmax".
        correction_bias: [E] in fp32, or None for gates without one.
        groups: E is split into this many equal groups; 1 means no grouping.
        kept_groups: experts outside the best `kept_groups` groups cannot be picked before all others are.
        normalise: divide the weights by their sum.
        scale: multiply the weights by this.

    Returns:
        topk_ids [T, K] in int64, best first, and topk_weights [T, K] in fp32.
    """
    experts = logits.shape[-1]
    assert experts % groups == 0, (experts, groups)
    assert top_k <= experts, (top_k, experts)
    assert scoring in ("sigmoid", "softmax"), scoring
    assert groups == 1 or correction_bias is None or experts >= 2 * groups, "groups of one expert have no best two"
    if not uses_triton(logits, *([] if correction_bias is None else [correction_bias])):
        return select_experts_reference(
            logits,
            top_k=top_k,
            scoring=scoring,
            correction_bias=correction_bias,
            groups=groups,
            kept_groups=kept_groups,
            normalise=normalise,
            scale=scale,
        )
    assert logits.dtype == torch.float32, logits.dtype
    tokens = logits.shape[0]
    topk_ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    topk_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    launch(
        _select_experts,
        (tokens,),
        logits.contiguous(),
        logits if correction_bias is None else correction_bias,
        topk_ids,
        topk_weights,
        experts,
        experts // groups,
        scale,
        TOP_K=top_k,
        KEPT=kept_groups if groups > 1 else 0,
        SIGMOID=scoring == "sigmoid",
        BIASED=correction_bias is not None,
        NORMALISE=normalise,
        NOT_THERE=_NOT_THERE,
        config=_config(experts, groups, top_k),
    )
    return topk_ids, topk_weights


def select_experts_reference(
    logits: torch.Tensor,
    *,
    top_k: int,
    scoring: str,
    correction_bias: torch.Tensor | None,
    groups: int,
    kept_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_experts` in plain torch."""
    scores = sigmoid(logits) if scoring == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if correction_bias is None else scores + correction_bias
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.amax(-1) if correction_bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, _best(best, kept_groups), True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    topk_ids = _best(choice, top_k)
    topk_weights = scores.gather(-1, topk_ids)
    if normalise:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids, topk_weights * scale


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values [T, N], best first; unlike torch's topk, the lower of two equal ones comes first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def count_tokens(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens each expert got: [E] int32 for topk_ids [T, K]; for load statistics."""
    return sort_by_slot(topk_ids.flatten(), num_experts)[1]


@kernel
def _select_experts(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts: tl.int32,
    group_size: tl.int32,
    weight_scale: tl.float32,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PICKED: tl.constexpr,
    NOT_THERE: tl.constexpr,
) -> None:
    # One warp a token; scores in a tile [groups, experts of a group], so that everything is a reduction along one axis.
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, GROUP)
    expert = group[:, None] * group_size + member[None, :]
    exists = (member[None, :] < group_size) & (expert < experts)
    logits = tl.load(logits_ptr + token * experts + expert, mask=exists, other=float("-inf"))
    largest, total = 0.0, 1.0
    if not SIGMOID:
        largest = _value(tl.max(tl.max(_ranks(logits, expert), axis=1), axis=0))
        total = tl.sum(tl.sum(tl.exp(logits - largest), axis=1), axis=0)
    choice = _scores(logits, largest, total, SIGMOID)
    if BIASED:
        choice += tl.load(bias_ptr + expert, mask=exists, other=0.0)
    ranks = tl.where(exists, _ranks(choice, expert), NOT_THERE)
    if KEPT > 0:
        best = tl.max(ranks, axis=1)
        group_score = _value(best)
        if BIASED:
            group_score += _value(tl.max(tl.where(ranks == best[:, None], NOT_THERE, ranks), axis=1))
        group_ranks = tl.where(group * group_size < experts, _ranks(group_score, group), NOT_THERE)
        kept = group < 0
        for _ in tl.static_range(KEPT):
            winner = group_ranks == tl.max(group_ranks, axis=0)
            kept = kept | winner
            group_ranks = tl.where(winner, NOT_THERE, group_ranks)
        choice = tl.where(kept[:, None], choice, float("-inf"))
        ranks = tl.where(exists, _ranks(choice, expert), NOT_THERE)

    place = tl.arange(0, PICKED)
    ids = tl.zeros([PICKED], tl.int64)
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(ranks, axis=1), axis=0)
        ids = tl.where(place == k, _number(best), ids)
        ranks = tl.where(ranks == best, NOT_THERE, ranks)
    picked = tl.load(logits_ptr + token * experts + ids)  # again, from the cache: cheaper than to find them in the tile
    weights = _scores(picked, largest, total, SIGMOID)
    if NORMALISE:
        weights = tl.div_rn(weights, tl.sum(tl.where(place < TOP_K, weights, 0.0), axis=0) + 1e-20)
    tl.store(ids_ptr + token * TOP_K + place, ids, mask=place < TOP_K)
    tl.store(weights_ptr + token * TOP_K + place, weights * weight_scale, mask=place < TOP_K)


@kernel
def _scores(logits: tl.tensor, largest: tl.tensor, total: tl.tensor, SIGMOID: tl.constexpr) -> tl.tensor:
    """Scores from logits; for a softmax, from the largest logit and the sum of all exponentials."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-logits)) if SIGMOID else tl.div_rn(tl.exp(logits - largest), total)


@kernel
def _ranks(values: tl.tensor, numbers: tl.tensor) -> tl.tensor:
    """int64 in the order of fp32 values, NaN above all; of equal values, the one with the lower number ranks higher.

    Ranks are distinct, so that every maximum picks exactly one; and unlike a maximum of floats it does not pass over NaN.
    """
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # -0 equals 0
    key = tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (key.to(tl.int64) << 32) + (0x7FFFFFFF - numbers)


@kernel
def _value(ranks: tl.tensor) -> tl.tensor:
    """The fp32 values that were given to `_ranks`."""
    key = (ranks >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@kernel
def _number(ranks: tl.tensor) -> tl.tensor:
    """The numbers that were given to `_ranks`."""
    return 0x7FFFFFFF - (ranks & 0xFFFFFFFF)


def _config(experts: int, groups: int, top_k: int) -> Config:
    tiles = {"GROUPS": groups, "GROUP": experts // groups, "PICKED": top_k}
    return Config(
        num_warps=1,
        num_stages=1,
        tiles={name: 1 << (size - 1).bit_length() for name, size in tiles.items()},
        source="256 scores are 8 a lane; one warp needs no barrier, and tokens are many",
    )


def cases(architecture: int) -> Iterator[Case]:
    """DeepSeek-R1's gate, after its logits have been computed."""
    experts, groups, kept, top_k = 256, 8, 4, 8

    def work(tokens: int) -> Work:
        moved = tokens * (experts * 4 + top_k * 12) + experts * 4
        return Work(bytes=moved, flops=tokens * experts * 4.0, programs=tokens, iterations=1)

    yield Case(
        name="select_experts 8 of 256",
        kernel=_select_experts,
        architecture=architecture,
        arguments={
            "logits_ptr": "*fp32",
            "bias_ptr": "*fp32",
            "ids_ptr": "*i64",
            "weights_ptr": "*fp32",
            "experts": "i32",
            "group_size": "i32",
            "weight_scale": "fp32",
        },
        constants={
            "TOP_K": top_k,
            "KEPT": kept,
            "SIGMOID": True,
            "BIASED": True,
            "NORMALISE": True,
            "NOT_THERE": _NOT_THERE,
        },
        config=_config(experts, groups, top_k),
        max_loop_instructions=1550 if architecture == 120 else 2450,
        work=work,
    )
