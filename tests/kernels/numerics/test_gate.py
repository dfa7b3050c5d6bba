"""The Triton gate against the plain one; what the rules are is held by tests/kernels/test_gate.py."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from moray.kernels.gate import count_tokens, select_experts, select_experts_reference

NAN, INF = float("nan"), float("inf")


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

    def select(
        self, logits: torch.Tensor, bias: torch.Tensor | None, *, reference: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (select_experts_reference if reference else select_experts)(
            logits,
            top_k=self.top_k,
            scoring=self.scoring,
            correction_bias=bias,
            groups=self.groups,
            kept_groups=self.kept,
            normalise=self.normalise,
            scale=self.scale,
        )

    def inputs(self, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(self.experts * 1009 + tokens)
        logits = torch.randn(tokens, self.experts, generator=generator) * 1.5
        bias = torch.randn(self.experts, generator=generator) * 0.3
        return logits.to(device), bias.to(device) if self.bias else None


R1 = Rules(256, 8, groups=8, kept=4)
CASES = {
    "r1": R1,
    "kimi": Rules(384, 8, scale=2.827),
    "tiny": Rules(8, 2, groups=4, kept=2),
    "three-groups-of-four": Rules(12, 6, groups=3, kept=3),
    "keep-one-group": Rules(16, 4, groups=4, kept=1),
    "all-experts": Rules(6, 6),
    "one-expert": Rules(5, 1),
    "more-than-the-kept-groups-have": Rules(8, 6, groups=4, kept=2),
    "not-normalised": Rules(16, 4, groups=4, kept=2, normalise=False, scale=1.0),
    "v2-greedy": Rules(64, 6, "softmax", bias=False, normalise=False, scale=1.0),
    "v2-group-limited": Rules(160, 6, "softmax", bias=False, groups=8, kept=3, normalise=False, scale=16.0),
    "softmax-normalised": Rules(16, 3, "softmax", bias=False, groups=4, kept=2),
    "sigmoid-without-bias": Rules(16, 3, bias=False, groups=4, kept=2),
}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Three ulp where exp is within one of the CPU's, as it is interpreted; a GPU's is off by more, far from zero."""
    tolerance = 3 * 2**-23 if actual.device.type == "cpu" else 2**-19
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_against_reference(name: str, device: torch.device) -> None:
    rules = CASES[name]
    logits, bias = rules.inputs(12, device)
    ids, weights = rules.select(logits, bias)
    expected_ids, expected_weights = rules.select(logits, bias, reference=True)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert torch.equal(ids, expected_ids)
    close(weights, expected_weights)


@pytest.mark.parametrize("name", ["r1", "v2-group-limited"])
def test_rows_do_not_depend_on_their_company(name: str, device: torch.device) -> None:
    rules = CASES[name]
    logits, bias = rules.inputs(5, device)
    whole = rules.select(logits, bias)
    for row in range(5):
        alone = rules.select(logits[row : row + 1], bias)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("rules", [R1, Rules(12, 5, groups=3, kept=2), Rules(64, 6, "softmax", bias=False)], ids=str)
def test_of_equal_experts_the_lower_number_wins(rules: Rules, device: torch.device) -> None:
    """Scores from a handful of values, so that groups are equal too."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-1, 2, (6, rules.experts), generator=generator).float().to(device)
    logits[0] = 0.0
    bias = torch.zeros(rules.experts, device=device) if rules.bias else None
    ids, _ = rules.select(logits, bias)
    assert ids[0].tolist() == list(range(rules.top_k))
    assert torch.equal(ids, rules.select(logits, bias, reference=True)[0])


def test_zeros_of_either_sign_are_equal(device: torch.device) -> None:
    rules = Rules(4, 4, normalise=False)
    scores = rules.select(torch.zeros(1, 4, device=device), torch.zeros(4, device=device))[1] / rules.scale
    bias = -scores[0] * torch.tensor([1.0, 1.0, 1.0, 1.0], device=device)
    bias[1] = -INF
    assert rules.select(torch.zeros(1, 4, device=device), bias)[0].tolist() == [[0, 2, 3, 1]]


@pytest.mark.parametrize("rules", [R1, Rules(16, 4, "softmax", bias=False, groups=4, kept=2), Rules(5, 3)], ids=str)
def test_nan_and_infinity_stay_in_their_row(rules: Rules, device: torch.device) -> None:
    logits, bias = rules.inputs(7, device)
    clean = rules.select(logits, bias)
    last = rules.experts - 1
    logits[1, 2], logits[2], logits[3, 1], logits[4, last], logits[5, : rules.experts // 2] = NAN, NAN, INF, -INF, -INF
    ids, weights = rules.select(logits, bias)
    expected_ids, expected_weights = rules.select(logits, bias, reference=True)
    for row in (0, 6):
        assert torch.equal(ids[row], clean[0][row])
        assert torch.equal(weights[row], clean[1][row])
    assert torch.equal(ids, expected_ids)
    close(weights, expected_weights)
    assert weights[2].isnan().all()
    assert 0 <= int(ids.min()) <= int(ids.max()) <= last
    assert all(len(set(row)) == rules.top_k for row in ids.tolist())


def test_weights_where_scores_vanish(device: torch.device) -> None:
    rules = Rules(8, 2)
    _, weights = rules.select(torch.full((1, 8), -1000.0, device=device), torch.zeros(8, device=device))
    assert torch.isfinite(weights).all()


def test_no_tokens(device: torch.device) -> None:
    ids, weights = R1.select(*R1.inputs(0, device))
    assert (ids.shape, weights.shape) == ((0, 8), (0, 8))


def test_counts(device: torch.device) -> None:
    ids, _ = R1.select(*R1.inputs(20, device))
    counts = count_tokens(ids, 256)
    assert counts.dtype is torch.int32
    assert counts.tolist() == torch.bincount(ids.flatten().cpu(), minlength=256).tolist()
    assert counts.sum() == 160
