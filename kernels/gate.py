"""The gate: which experts a token goes to, and with what weight (DeepSeek-V3 report, section 2.1.2, arXiv:2412.19437)."""

from __future__ import annotations

import torch

from .linear import sigmoid


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
    biased scores, or its best score where there is no bias.

    Args:
        logits: [T, E] in fp32.
        top_k: experts a token, K.
        scoring: "sigmoid" or "softmax".
        correction_bias: [E] in fp32, or None for gates without one.
        groups: E is split into this many equal groups; 1 means no grouping.
        kept_groups: experts outside the best `kept_groups` groups cannot be picked.
        normalise: divide the weights by their sum.
        scale: multiply the weights by this.

    Returns:
        topk_ids [T, K] in int64, best first, and topk_weights [T, K] in fp32.
    """
    scores = sigmoid(logits) if scoring == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if correction_bias is None else scores + correction_bias
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.amax(-1) if correction_bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(kept_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    topk_ids = choice.topk(top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if normalise:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids, topk_weights * scale
