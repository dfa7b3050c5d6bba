"""Sampling on the device against the CPU's: the same tokens, not similar ones.

One row costs some twenty interpreted launches, so the batches are small and every row has a purpose.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from moray.kernels import launch
from moray.kernels.exact_math import device_exp_of_negative, device_log, exp_of_negative
from moray.kernels.exact_math import log as exact_log
from moray.kernels.launch import Config, kernel
from moray.kernels.sampling import NOT_FINITE, RowSampling, _sample_reference, gumbel_noise, kept_tokens, sample
from moray.kernels.sampling_kernels import MAX_VOCABULARY

if TYPE_CHECKING:
    import triton.language as tl

PLAIN = RowSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0)
GREEDY = replace(PLAIN, temperature=0.0)


def reference(logits: torch.Tensor, rows: list[RowSampling]) -> list[int]:
    """What the definition chooses."""
    return _sample_reference(logits.cpu(), rows)


def random_logits(rows: int, vocab: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(device)


def test_every_filter_alone_and_all_together(device: torch.device) -> None:
    """37 tokens: one program a row, with a ragged end."""
    rows = [
        GREEDY,
        replace(PLAIN, seed=1),
        replace(PLAIN, seed=2, top_k=5, temperature=3.0),
        replace(PLAIN, seed=3, top_p=0.7, temperature=2.0),
        replace(PLAIN, seed=4, min_p=0.1, temperature=2.0),
        replace(PLAIN, seed=(1 << 64) - 1, position=1 << 20, top_k=20, top_p=0.9, min_p=0.02, temperature=4.0),
        replace(PLAIN, seed=-5, top_k=1 << 40, temperature=1e-9),
    ]
    logits = random_logits(len(rows), 37, device)
    assert sample(logits, rows) == reference(logits, rows)


def test_parts_of_a_row_find_its_borders_together(device: torch.device) -> None:
    """Three programs a row, the last one with three tokens; borders that lie anywhere in 4099 tokens."""
    logits = random_logits(2, 4099, device)
    rows = [
        replace(PLAIN, seed=7, top_k=300, top_p=0.93, temperature=2.5),
        replace(PLAIN, seed=8, top_p=0.999, min_p=0.001, temperature=3.0),
    ]
    assert sample(logits, rows) == reference(logits, rows)


def drawn(logits: torch.Tensor, row: RowSampling, seeds: int, device: torch.device) -> set[int]:
    rows = [replace(row, seed=seed) for seed in range(seeds)]
    batch = logits.expand(seeds, -1).to(device)
    tokens = sample(batch, rows)
    assert tokens == reference(batch, rows)
    return set(tokens)


def test_ties_across_parts_at_the_border_of_top_p(device: torch.device) -> None:
    """4100 equal tokens: half of the mass are the first 2050, two of which are in the second part. Noise decides."""
    logits = torch.zeros(1, 4100)
    row = replace(PLAIN, top_p=0.5)
    assert kept_tokens(logits[0], row).nonzero()[:, 0].tolist() == list(range(2050))
    # Find a position at which the 2050th token wins, so that the border decides; leave it out, and another does.
    first, later = gumbel_noise(0, 0, 4100)[:2050], 0
    while int(first.argmax()) != 2049:
        later += 1
        first = gumbel_noise(0, later, 4100)[:2050]
    assert drawn(logits, replace(row, position=later), 1, device) == {2049}
    assert drawn(logits, replace(row, position=later, top_p=2049 / 4100), 1, device) != {2049}


def test_ties_at_the_border_of_top_k_stay(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, -5.0, 2.0]])
    assert drawn(logits, replace(PLAIN, top_k=2, temperature=9.0), 12, device) == {1, 2, 3, 5}


def test_both_zeros_are_one_value(device: torch.device) -> None:
    assert sample(torch.tensor([[-1.0, -0.0, 0.0]], device=device), [GREEDY]) == [1]
    assert drawn(torch.tensor([[-1.0, 0.0, -0.0, -2.0]]), replace(PLAIN, top_k=1), 8, device) == {1, 2}


@pytest.mark.parametrize("vocab", [1, 2048, 2049])
def test_greedy_takes_the_first_of_equals(vocab: int, device: torch.device) -> None:
    logits = torch.full((2, vocab), -7.0, device=device)
    logits[1, vocab // 2 :] = 5.0
    assert sample(logits, [GREEDY, GREEDY]) == [0, vocab // 2]


def test_extremes_of_what_a_request_may_ask(device: torch.device) -> None:
    """Every filter that leaves one token, temperatures beyond fp64's quotients, and logits at fp32's ends and at -inf."""
    logits = random_logits(7, 20, device, seed=3)
    logits[4:, 3] = float("-inf")
    logits[5, 0], logits[5, 1] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).min
    rows = [
        replace(PLAIN, top_p=0.0),
        replace(PLAIN, top_p=math.nextafter(1.0, 0.0), temperature=4.0),
        replace(PLAIN, min_p=1.0),
        replace(PLAIN, temperature=5e-324),
        replace(PLAIN, temperature=1e308, top_k=5, seed=1),
        replace(PLAIN, temperature=1e38, top_p=0.9, seed=3),
        replace(PLAIN, top_k=1),
    ]
    assert sample(logits, rows) == reference(logits, rows)
    assert [sample(logits[i : i + 1], [rows[i]])[0] for i in (0, 2, 3, 6)] == logits[[0, 2, 3, 6]].argmax(-1).tolist()


def test_rows_do_not_depend_on_their_company(device: torch.device) -> None:
    """Nor on which passes the company makes necessary."""
    logits = random_logits(4, 70, device, seed=4)
    rows = [
        GREEDY,
        replace(PLAIN, seed=1),
        replace(PLAIN, seed=2, top_k=9, temperature=2.0),
        replace(PLAIN, seed=3, top_p=0.8, temperature=2.0),
    ]
    together = sample(logits, rows)
    assert [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(4)] == together
    assert sample(logits[[3, 1]], [rows[3], rows[1]]) == [together[3], together[1]]


@pytest.mark.parametrize("bad", ["nan", "-nan", "inf", "only -inf"])
def test_rows_without_a_finite_maximum(bad: str, device: torch.device) -> None:
    """In the batch of a sampled row, whose neighbours are nothing to it; greedy rows are checked alike."""
    logits = random_logits(3, 40, device)
    if bad == "only -inf":
        logits[2] = float("-inf")
    else:  # all ones, as an integer, is a NaN with its sign bit set
        negative_nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
        logits[2, 17] = negative_nan if bad == "-nan" else float(bad)
    for rows in ([GREEDY, PLAIN, GREEDY], [GREEDY, GREEDY, replace(PLAIN, top_p=0.5)]):
        for choose in (sample, reference):
            first, second, third = choose(logits, rows)
            assert (first >= 0, second >= 0, third) == (True, True, NOT_FINITE)


def test_only_a_row_s_own_logits_are_read(device: torch.device) -> None:
    """Columns of a wider tensor: what lies beside them is NaN, and a NaN anywhere in a row is an error."""
    wide = torch.full((2, 64), math.nan, device=device)
    wide[:, 5:55] = random_logits(2, 50, device, seed=6)
    rows = [GREEDY, replace(PLAIN, seed=1, temperature=2.0)]
    assert sample(wide[:, 5:55], rows) == reference(wide[:, 5:55], rows)
    transposed = wide[:, 5:55].t().contiguous().t()
    assert sample(transposed, rows) == reference(wide[:, 5:55], rows)


def test_sizes(device: torch.device) -> None:
    assert sample(torch.empty(0, 10, device=device), []) == []
    for logits, rows in (
        (torch.zeros(2, 3, device=device), [PLAIN]),
        (torch.zeros(1, 3, device=device, dtype=torch.float64), [PLAIN]),
        (torch.zeros(1, 0, device=device), [PLAIN]),
        (torch.zeros(1, MAX_VOCABULARY + 1, device=device), [PLAIN]),
    ):
        with pytest.raises(ValueError, match="rows to sample from logits"):
            sample(logits, rows)


@kernel
def _both(x_ptr: tl.tensor, exp_ptr: tl.tensor, log_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(exp_ptr + at, device_exp_of_negative(-x))
    tl.store(log_ptr + at, device_log(x))


def test_exp_and_log_have_the_same_bits_everywhere(device: torch.device) -> None:
    torch.manual_seed(1)
    x = torch.cat(
        [
            torch.rand(1020, dtype=torch.float64) * 25,
            torch.rand(1020, dtype=torch.float64) * 710,
            1.0 - torch.rand(1020, dtype=torch.float64) * 2.0**-20,
            2.0 ** torch.arange(-30, 31, dtype=torch.float64),
            torch.tensor([700.0, math.nextafter(700.0, 0.0), 701.0, 1e300, 1e-300], dtype=torch.float64),
        ]
    )
    x = torch.cat([x, x.new_ones(-x.numel() % 1024)]).to(device)
    exp, log = torch.empty_like(x), torch.empty_like(x)
    config = Config(num_warps=4, num_stages=1, source="any", tiles={"BLOCK": 1024}, fp_fusion=False)
    launch.launch(_both, (x.numel() // 1024,), x, exp, log, config=config)
    assert torch.equal(exp.cpu(), exp_of_negative(-x.cpu()))
    assert torch.equal(log.cpu(), exact_log(x.cpu()))
