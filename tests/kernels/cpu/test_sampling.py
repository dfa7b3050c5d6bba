"""Native sampling against its definition: the same tokens, and the same bits where a test can make a token depend on them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.kernels import sampling
from moray.kernels.cpu import sampling as cpu_sampling
from moray.kernels.cpu.library import Instructions, NativeLibrary
from moray.kernels.exact_math import exp_of_negative
from moray.kernels.sampling import NOT_FINITE, RowSampling, _sample_reference, gumbel_noise, sample

INF = math.inf
VOCABULARIES = (1, 2, 15, 16, 17, 31, 33, 63, 65, 1000, 32000, 129280)
TEMPERATURES = (0.0, 1e-120, 0.05, 0.6, 1.0, 1.0, 1e6, 1e40, 1e120)
TOP_PS = (1.0, 0.999999, 0.95, 0.5, 1e-9, 0.0)
MIN_PS = (0.0, 0.0, 0.001, 0.05, 1.0)
SEEDS = (0, 7, -1, -(1 << 63), (1 << 64) - 1, 0x0123456789ABCDEF)
POSITIONS = (0, 1, -3, 1 << 20, 1 << 40)


def normal(vocab: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(vocab, generator=generator) * 3


Values = float | torch.Tensor


def either(first: Values, second: Values, vocab: int, generator: torch.Generator, share: float) -> torch.Tensor:
    """`first` in a share of the places, `second` in the others."""
    return torch.where(torch.rand(vocab, generator=generator) < share, first, second)


KINDS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "normal": normal,
    "narrow": lambda vocab, g: normal(vocab, g) * 1e-3,
    "wide": lambda vocab, g: (normal(vocab, g) * 1e38).clamp(-3e38, 3e38),
    "halves": lambda vocab, g: (normal(vocab, g) * 2).round() / 2,
    "bf16": lambda vocab, g: (normal(vocab, g) * 4).bfloat16().float(),
    "equal": lambda vocab, g: torch.full((vocab,), -2.5),
    "zeros": lambda vocab, g: either(0.0, -0.0, vocab, g, 0.5),
    "zeros-on-top": lambda vocab, g: either(either(0.0, -0.0, vocab, g, 0.5), -normal(vocab, g).abs(), vocab, g, 0.1),
    "subnormal": lambda vocab, g: either(1e-45, -1e-40, vocab, g, 0.5),
    "half-barred": lambda vocab, g: either(-INF, normal(vocab, g), vocab, g, 0.5),
    "almost-all-barred": lambda vocab, g: either(-INF, normal(vocab, g), vocab, g, 0.999),
    "one-far-below": lambda vocab, g: normal(vocab, g).index_fill(0, torch.tensor([vocab // 2]), -1e9),
}


def drawn_row(rng: random.Random, vocab: int) -> RowSampling:
    return RowSampling(
        temperature=rng.choice(TEMPERATURES),
        top_k=rng.choice((0, 0, 1, 2, 50, max(1, vocab // 2), vocab - 1, vocab, vocab + 1, 1 << 40)),
        top_p=rng.choice(TOP_PS),
        min_p=rng.choice(MIN_PS),
        seed=rng.choice(SEEDS),
        position=rng.choice(POSITIONS),
    )


def check(logits: torch.Tensor, rows: list[RowSampling]) -> list[int]:
    found, expected = sample(logits, rows), _sample_reference(logits, rows)
    assert found == expected, [row for row, a, b in zip(rows, found, expected, strict=True) if a != b]
    return found


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_tokens_are_those_of_the_definition(
    instructions: Instructions, library: NativeLibrary, vocab: int, kind: str
) -> None:
    rng = random.Random(f"{vocab} {kind}")
    count = 40 if vocab < 20_000 else 6 if vocab < 100_000 else 2
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.stack([KINDS[kind](vocab, generator) for _ in range(count)])
    rows = [drawn_row(rng, vocab) for _ in range(count)]
    library.set_threads(rng.choice((1, 2, 3)))
    check(logits, rows)


@pytest.mark.parametrize("row", [(1.0, 0, 1.0, 0.0), (0.6, 0, 0.95, 0.0), (0.8, 40, 1.0, 0.0), (1.0, 500, 0.9, 0.01)])
def test_many_rows_as_servers_sample_them(instructions: Instructions, row: tuple[float, int, float, float]) -> None:
    logits = torch.randn(500, 3000, generator=torch.Generator().manual_seed(1)) * 2.5
    chosen = check(logits, [RowSampling(*row, seed=i * 0x9E3779B97F4A7C15, position=i) for i in range(500)])
    assert len(set(chosen)) > 200


bounded = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    values=st.lists(bounded | st.sampled_from([0.0, -0.0, 1.0, -INF, INF, math.nan]), min_size=1, max_size=70)
    | st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=1, max_size=70),
    temperature=st.sampled_from(TEMPERATURES) | st.floats(0.0, 10.0),
    top_k=st.integers(0, 80) | st.just(1 << 62),
    top_p=st.sampled_from(TOP_PS) | st.floats(0.0, 1.0),
    min_p=st.sampled_from(MIN_PS) | st.floats(0.0, 1.0),
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    position=st.integers(-(1 << 40), 1 << 40),
)
def test_whatever_the_numbers(
    instructions: Instructions,
    values: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> None:
    check(torch.tensor([values]), [RowSampling(temperature, top_k, top_p, min_p, seed, position)])


@pytest.mark.parametrize("vocab", [2, 17, 64, 1000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_finite_maximum(instructions: Instructions, vocab: int, temperature: float) -> None:
    """A NaN anywhere, of either sign, at the ends and in between; an infinity; nothing."""
    row = RowSampling(temperature, 3, 0.9, 0.01, 1, 2)
    places = sorted({0, 1, vocab // 2, vocab - 1})
    logits = torch.randn(3 * len(places) + 2, vocab, generator=torch.Generator().manual_seed(vocab))
    for i, (bad, place) in enumerate((bad, place) for bad in (math.nan, -math.nan, INF) for place in places):
        logits[i, place] = bad
    logits[-2] = -INF
    chosen = check(logits, [row] * len(logits))
    assert chosen[:-1] == [NOT_FINITE] * (len(logits) - 1)
    assert chosen[-1] != NOT_FINITE


def test_weights_have_the_bits_of_the_definition(instructions: Instructions) -> None:
    """min_p compares them: the second of two tokens goes where min_p is one step above its weight."""
    count = 600
    below = -torch.rand(count, generator=torch.Generator().manual_seed(0)).double().pow(4) * 20
    logits = torch.stack([torch.zeros(count), below.float()], dim=1)
    weights = exp_of_negative(logits[:, 1].double())
    for limits, most in ((weights, 2), (weights.nextafter(torch.tensor(INF, dtype=torch.float64)), 1)):
        rows = [
            RowSampling(1.0, 0, 1.0, limit, seed, 0)
            for limit, seed in zip(limits.tolist(), winning_seeds(count), strict=True)
        ]
        chosen = check(logits, rows)
        assert sum(chosen) > count / 2 if most == 2 else sum(chosen) == 0


def winning_seeds(count: int) -> list[int]:
    """Seeds, again and again the same, with so much noise for token 1 of two that it mostly wins if it stays."""
    best = sorted(range(1000), key=lambda seed: float(gumbel_noise(seed, 0, 2).diff()), reverse=True)[:20]
    return [best[i % len(best)] for i in range(count)]


def test_masses_have_the_units_of_the_definition(instructions: Instructions) -> None:
    """top_p of two tokens so that the first one's mass just is what is wanted, or just is not: one unit of mass decides."""
    count, unit = 600, 2**45
    logits = torch.stack(
        [torch.zeros(count), -torch.rand(count, generator=torch.Generator().manual_seed(1)) * 4], dim=1
    )
    masses = (exp_of_negative(logits[:, 1].double()) * unit + 0.5).floor().to(torch.int64).tolist()
    outcomes = []
    for more in (False, True):
        rows = []
        for mass, seed in zip(masses, winning_seeds(count), strict=True):
            total = float(unit + mass)
            share = unit / total
            while math.ceil(share * total) > unit:
                share = math.nextafter(share, 0.0)
            while more and math.ceil(share * total) == unit:
                share = math.nextafter(share, 1.0)
            rows.append(RowSampling(1.0, 0, share, 0.0, seed, 0))
        outcomes.append(check(logits, rows))
    assert sum(outcomes[0]) == 0
    assert sum(outcomes[1]) > count / 2


def test_noise_has_the_bits_of_the_definition(instructions: Instructions) -> None:
    """Temperatures between which, of all fp64, none lies, and the second of two tokens begins to win."""
    noise = np.array([gumbel_noise(seed, 5, 2).tolist() for seed in range(1200)])
    seeds = np.flatnonzero(noise[:, 1] > noise[:, 0] + 1e-3)
    first, second = noise[seeds].T
    loses, wins = np.full(len(seeds), 1e-2), np.full(len(seeds), 1e4)
    for _ in range(80):  # -1 / temperature + second > first
        middle = (loses + wins) / 2
        ahead = -1.0 / middle + second > first
        loses, wins = np.where(ahead, loses, middle), np.where(ahead, middle, wins)
    logits = torch.tensor([[0.0, -1.0]]).expand(len(seeds), -1)
    for temperatures, expected in ((loses, 0), (wins, 1)):
        rows = [
            RowSampling(t, 0, 1.0, 0.0, int(s), 5) for t, s in zip(temperatures.tolist(), seeds.tolist(), strict=True)
        ]
        assert set(check(logits, rows)) == {expected}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_do_not_depend_on_the_batch(library: NativeLibrary, threads: int) -> None:
    library.set_threads(threads)
    rng, vocab = random.Random(threads), 1003
    logits = torch.randn(24, vocab, generator=torch.Generator().manual_seed(threads)) * 3
    rows = [drawn_row(rng, vocab) for _ in range(24)]
    together = check(logits, rows)
    assert [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(24)] == together
    order = rng.sample(range(24), 24)
    assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_rows_may_lie_anywhere(instructions: Instructions) -> None:
    """Apart, one upon another, and with their logits apart; what lies between them is poison."""
    poisoned = torch.full((6, 80), math.nan)
    poisoned[::2, 3:50] = torch.randn(3, 47, generator=torch.Generator().manual_seed(0))
    logits = poisoned[::2, 3:50]
    rows = [RowSampling(1.0, 20, 0.9, 0.01, seed, seed) for seed in range(3)]
    expected = check(logits.contiguous(), rows)
    assert sample(logits, rows) == expected
    assert sample(logits.T.contiguous().T, rows) == expected
    assert sample(logits[:1].expand(3, -1), [rows[0]] * 3) == expected[:1] * 3
    assert sample(logits[:0], []) == []


def test_without_a_library_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [RowSampling(1.0, 20, 0.9, 0.01, seed, seed) for seed in range(3)]
    expected = sample(logits, rows)
    monkeypatch.setattr(sampling, "native", lambda: None)
    monkeypatch.setattr(cpu_sampling, "choose", None)
    assert sample(logits, rows) == expected
