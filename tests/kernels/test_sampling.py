"""Sampling: the filters against brute force, the noise as a pure function of seed and position."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels.exact_math import exp_of_negative, log
from moray.kernels.sampling import NOT_FINITE, RowSampling, _mix, _mix_tensor, filtered_logits, gumbel_noise, sample

PLAIN = RowSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0)


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def brute_force(logits: list[float], row: RowSampling) -> set[int]:
    """Tokens that stay, by the words of the documentation."""
    scaled = [x / row.temperature for x in logits]
    left = sorted(range(len(logits)), key=lambda t: (-scaled[t], t))
    if row.top_k:
        border = scaled[left[min(row.top_k, len(left)) - 1]]
        left = [t for t in left if scaled[t] >= border]

    def probabilities() -> list[float]:
        total = sum(math.exp(scaled[t] - scaled[left[0]]) for t in left)
        return [math.exp(scaled[t] - scaled[left[0]]) / total for t in left]

    if row.top_p < 1:
        mass = 0.0
        kept: list[int] = []
        for token, probability in zip(left, probabilities(), strict=True):
            if mass >= row.top_p and kept:
                break
            kept.append(token)
            mass += probability
        left = kept
    if row.min_p > 0:
        found = probabilities()
        left = [t for t, p in zip(left, found, strict=True) if p >= row.min_p * found[0]] or left[:1]
    return set(left)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    # Multiples of 1/7: many ties, and no sum of probabilities that falls on a limit but for its rounding.
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 7), min_size=1, max_size=30),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([0.0, 0.1234, 0.5017, 0.9031, 0.9991, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123, 0.3007, 1.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
)
def test_filters(logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    row = RowSampling(temperature, top_k, top_p, min_p, 0, 0)
    found = filtered_logits(torch.tensor(logits), row)
    rounded = torch.tensor(logits).double().tolist()
    assert {i for i, x in enumerate(found.tolist()) if x > -math.inf} == brute_force(rounded, row)
    for before, after in zip(rounded, found.tolist(), strict=True):
        assert after in (-math.inf, pytest.approx(before / temperature))


def test_ties_at_the_border_of_top_k_stay() -> None:
    kept = filtered_logits(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), replace(PLAIN, top_k=2))
    assert (kept > -math.inf).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize(("top_p", "left"), [(0.25, 2), (0.5, 4), (0.75, 6), (0.7500001, 7), (1.0, 8)])
def test_equals_at_the_border_of_top_p_stay_by_id_as_far_as_needed(top_p: float, left: int) -> None:
    """Masses are integers: a sum that reaches the border exactly has reached it, however the sum was taken."""
    kept = filtered_logits(torch.tensor([9.0, -9.0] * 8), replace(PLAIN, top_k=8, top_p=top_p, temperature=0.3))
    assert (kept > -math.inf).nonzero()[:, 0].tolist() == [2 * i for i in range(left)]


def test_a_large_vocabulary_is_cut_where_fp64_cuts_it() -> None:
    """Fixed-point masses against the same sums in fp64; the border may fall between two tokens only where both agree."""
    logits = random_logits(1, 129280)[0]
    for top_p in (0.1, 0.5, 0.9, 0.999):
        kept = filtered_logits(logits, replace(PLAIN, top_p=top_p)) > -math.inf
        probabilities = logits.double().softmax(-1)
        mass, smallest = float(probabilities[kept].sum()), float(probabilities[kept].min())
        assert mass - smallest - 1e-9 < top_p < mass + 1e-9


@pytest.mark.parametrize("top_k", [5, 6, 1 << 30])
def test_top_k_beyond_the_vocabulary_keeps_all(top_k: int) -> None:
    assert torch.isfinite(filtered_logits(torch.randn(5), replace(PLAIN, top_k=top_k))).all()


@pytest.mark.parametrize(
    "row",
    [
        replace(PLAIN, temperature=0.0),
        replace(PLAIN, top_k=1),
        replace(PLAIN, top_p=0.0),
        replace(PLAIN, top_p=1e-9),
        replace(PLAIN, min_p=1.0),
        replace(PLAIN, temperature=1e-6),
    ],
    ids=["temperature-0", "top_k-1", "top_p-0", "top_p-tiny", "min_p-1", "temperature-tiny"],
)
def test_as_good_as_greedy(row: RowSampling) -> None:
    logits = random_logits(20, 50)
    rows = [replace(row, seed=seed, position=seed) for seed in range(20)]
    assert sample(logits, rows) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("row", [replace(PLAIN, temperature=0.0), PLAIN], ids=["greedy", "sampled"])
def test_rows_without_a_finite_maximum(row: RowSampling, bad: float) -> None:
    logits = random_logits(4, 9)
    logits[1, 4], logits[3] = bad, -math.inf
    chosen = sample(logits, [row] * 4)
    assert (chosen[1], chosen[3]) == (NOT_FINITE, NOT_FINITE)
    assert [chosen[0], chosen[2]] == sample(logits[[0, 2]], [row] * 2)


def test_greedy_takes_the_first_of_equals() -> None:
    assert sample(torch.tensor([[1.0, 5.0, 5.0, 0.0]]), [replace(PLAIN, temperature=0.0)]) == [1]


def test_rows_do_not_depend_on_each_other() -> None:
    logits = random_logits(12, 97)
    rows = [
        RowSampling(0.0 if i % 3 == 0 else 0.5 + i / 10, i % 4 * 5, 1.0 - i % 2 * 0.2, 0.01 * (i % 5), i << 40, i)
        for i in range(12)
    ]
    together = sample(logits, rows)
    assert [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(12)] == together
    order = [7, 3, 11, 0, 5]
    assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_the_same_seed_and_position_give_the_same_token() -> None:
    logits = random_logits(1, 200)
    assert len({sample(logits, [replace(PLAIN, seed=9, position=4)])[0] for _ in range(5)}) == 1
    by_position = {sample(logits, [replace(PLAIN, seed=9, position=p)])[0] for p in range(50)}
    by_seed = {sample(logits, [replace(PLAIN, seed=s, position=4)])[0] for s in range(50)}
    assert len(by_position) > 5
    assert len(by_seed) > 5


@pytest.mark.parametrize("other", [1 << 32, 1 << 63, (1 << 64) - 1])
def test_all_64_bits_of_the_seed_count(other: int) -> None:
    assert not torch.equal(gumbel_noise(0, 0, 50), gumbel_noise(other, 0, 50))


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_tokens_are_drawn_from_the_softmax(varied: str) -> None:
    """Chi-square over a fixed sweep; 48 is beyond 1 - 1e-7 of the distribution with 9 degrees of freedom."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.5, 0.9, -2.0, 1.7, 0.6])
    draws = 4000
    counts = torch.zeros(10, dtype=torch.float64)
    for i in range(draws):
        row = replace(PLAIN, temperature=0.8, **{varied: i})
        counts[sample(logits[None], [row])[0]] += 1
    expected = (logits.double() / 0.8).softmax(-1) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 48


def test_filtered_tokens_are_never_drawn() -> None:
    logits = random_logits(1, 40)
    allowed = set(logits[0].topk(3).indices.tolist())
    assert {sample(logits, [replace(PLAIN, top_k=3, seed=s)])[0] for s in range(200)} == allowed


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=20))
def test_the_hash_on_tensors_is_the_hash_on_integers(values: list[int]) -> None:
    assert _mix_tensor(torch.tensor(values)).tolist() == [_mix(value) for value in values]


def test_exp_and_log_are_those_of_the_library_but_for_the_last_bits() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.rand(20_000, dtype=torch.float64) * 700, 2.0 ** torch.arange(-60, 9, dtype=torch.float64)])
    ulp = 2.0**-52
    torch.testing.assert_close(exp_of_negative(-x), (-x).exp(), rtol=2 * ulp, atol=0.0)
    assert exp_of_negative(torch.tensor([0.0, -701.0, -math.inf], dtype=torch.float64)).tolist() == [1.0, 0.0, 0.0]
    near_one = 1.0 - torch.rand(20_000, dtype=torch.float64) * 2.0**-20
    for positive in (x, near_one, torch.rand(20_000, dtype=torch.float64) * 1e-300):
        torch.testing.assert_close(log(positive), positive.log(), rtol=2 * ulp, atol=0.0)


def test_the_noise_is_finite_even_at_the_ends_of_the_hash() -> None:
    uniform = (torch.tensor([0, 0xFFFFFFFF]).double() + 0.5) / 2.0**32
    assert torch.isfinite(-(-uniform.log()).log()).all()
    noise = gumbel_noise(1, 2, 100_000)
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)


def test_the_noise_never_changes() -> None:
    """Another hash would change every sampled answer that a request with a seed has ever got."""
    assert [_mix(0), _mix(1), _mix(0xDEADBEEF)] == KNOWN_HASHES
    found = [
        gumbel_noise(seed, position, 3).tolist() for seed, position in ((0, 0), (7, 100), ((1 << 64) - 1, 1 << 20))
    ]
    assert [x for row in found for x in row] == pytest.approx(KNOWN_NOISE, rel=1e-12)


KNOWN_HASHES = [0, 1753845952, 3861431939]
KNOWN_NOISE = [
    -3.129994640884816,
    -0.05544547877210711,
    -0.4382031578116871,
    2.050521821069037,
    1.7979848778441927,
    0.3072959334980189,
    0.4553256062366913,
    0.1715062380302588,
    -0.26506892864523,
]
