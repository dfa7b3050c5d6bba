"""The gate against the published rules, written down slowly in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from moray.kernels.gate import count_tokens, select_experts


@dataclass(frozen=True)
class Rules:
    experts: int
    top_k: int
    scoring: str = "sigmoid"
    bias: bool = True
    groups: int = 1
    kept: int = 1
    normalise: bool = True
    scale: float = 2.5


CASES = {
    "r1": Rules(256, 8, groups=8, kept=4),
    "kimi": Rules(384, 8, scale=2.827),
    "small": Rules(8, 2, groups=4, kept=2),
    "keep-all-groups": Rules(12, 6, groups=3, kept=3),
    "keep-one-group": Rules(16, 4, groups=4, kept=1),
    "all-experts": Rules(6, 6),
    "one-expert": Rules(5, 1),
    "not-normalised": Rules(16, 4, groups=4, kept=2, normalise=False, scale=1.0),
    "v2-greedy": Rules(64, 6, "softmax", bias=False, normalise=False, scale=1.0),
    "v2-group-limited": Rules(160, 6, "softmax", bias=False, groups=8, kept=3, normalise=False, scale=16.0),
    "softmax-normalised": Rules(16, 3, "softmax", bias=False, groups=4, kept=2),
    "sigmoid-without-bias": Rules(16, 3, bias=False, groups=4, kept=2),
}


def select(rules: Rules, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return select_experts(
        logits,
        top_k=rules.top_k,
        scoring=rules.scoring,
        correction_bias=bias,
        groups=rules.groups,
        kept_groups=rules.kept,
        normalise=rules.normalise,
        scale=rules.scale,
    )


def slowly(rules: Rules, logits: list[float], bias: list[float] | None) -> dict[int, float]:
    """Expert -> weight for one token; dictionaries keep the order, best first."""
    if rules.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    choice = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = rules.experts // rules.groups
    groups = [range(g * size, (g + 1) * size) for g in range(rules.groups)]

    def group_score(group: range) -> float:
        best = sorted((choice[e] for e in group), reverse=True)
        return best[0] if bias is None else sum(best[:2])

    kept = sorted(groups, key=group_score, reverse=True)[: rules.kept] if rules.groups > 1 else groups
    allowed = [e for group in kept for e in group]
    chosen = sorted(allowed, key=lambda e: choice[e], reverse=True)[: rules.top_k]
    norm = sum(scores[e] for e in chosen) if rules.normalise else 1.0
    return {e: scores[e] / norm * rules.scale for e in chosen}


@pytest.mark.parametrize("name", CASES)
def test_published_rules(name: str) -> None:
    rules = CASES[name]
    generator = torch.Generator().manual_seed(rules.experts + rules.top_k)
    logits = torch.randn(40, rules.experts, generator=generator) * 1.5
    bias = torch.randn(rules.experts, generator=generator) * 0.3 if rules.bias else None
    ids, weights = select(rules, logits, bias)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    for token in range(40):
        expected = slowly(rules, logits[token].tolist(), None if bias is None else bias.tolist())
        assert ids[token].tolist() == list(expected)
        assert weights[token].tolist() == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_bias_selects_but_does_not_weigh() -> None:
    rules = Rules(4, 2, normalise=False, scale=1.0)
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 100.0])
    ids, weights = select(rules, logits, bias)
    assert ids.tolist() == [[3, 0]]
    assert weights[0].tolist() == pytest.approx([0.26894142, 0.88079708]), "sigmoid(-1), sigmoid(2)"


def test_groups_are_scored_by_their_best_two() -> None:
    """One excellent expert loses to two good ones; without a bias it wins."""
    logits = torch.tensor([[5.0, -5.0, 2.0, 2.0]])
    assert select(Rules(4, 2, groups=2, kept=1), logits, torch.zeros(4))[0].tolist() in ([[2, 3]], [[3, 2]])
    without = Rules(4, 2, bias=False, groups=2, kept=1)
    assert select(without, logits, None)[0].tolist() == [[0, 1]]


def test_dropped_groups_stay_out_even_if_what_is_kept_has_negative_scores() -> None:
    """Zeroed scores of dropped groups would beat negative biased ones: they must be -inf."""
    ids, _ = select(Rules(4, 2, groups=2, kept=1), torch.zeros(1, 4), torch.tensor([-3.0, -3.0, -4.0, -4.0]))
    assert sorted(ids[0].tolist()) == [0, 1]


def test_weights_add_up_to_the_scale_even_where_scores_vanish() -> None:
    _, weights = select(Rules(8, 2), torch.full((1, 8), -30.0), torch.zeros(8))
    assert weights.sum() == pytest.approx(2.5, rel=1e-4)
    assert torch.isfinite(select(Rules(8, 2), torch.full((1, 8), -1000.0), torch.zeros(8))[1]).all()


@pytest.mark.parametrize("rules", [Rules(256, 8, groups=8, kept=4), Rules(64, 6, "softmax", bias=False)], ids=str)
def test_of_equal_experts_the_lower_number_wins(rules: Rules) -> None:
    bias = torch.zeros(rules.experts) if rules.bias else None
    logits = torch.zeros(2, rules.experts)
    logits[1, ::2] = 1.0
    ids, _ = select(rules, logits, bias)
    assert ids[0].tolist() == list(range(rules.top_k))
    assert ids[1].tolist() == list(range(0, 2 * rules.top_k, 2))


def test_a_token_with_nan_gets_experts_that_exist_and_disturbs_nobody() -> None:
    rules = Rules(16, 4, groups=4, kept=2)
    logits, bias = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(16)
    clean_ids, clean_weights = select(rules, logits, bias)
    logits[1, 9] = float("nan")
    ids, weights = select(rules, logits, bias)
    assert ids[1, 0] == 9
    assert len(set(ids[1].tolist())) == 4
    assert weights[1].isnan().all()
    assert torch.equal(ids[[0, 2]], clean_ids[[0, 2]])
    assert torch.equal(weights[[0, 2]], clean_weights[[0, 2]])


def test_tokens_are_counted_by_expert() -> None:
    counts = count_tokens(torch.tensor([[3, 0], [3, 1]]), 5)
    assert (counts.dtype, counts.tolist()) == (torch.int32, [1, 1, 0, 2, 0])
