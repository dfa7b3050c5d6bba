from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moray.kernels.kv_pages import GROUP, KvFormat, quantize_groups
from moray.kernels.latent import write_latent, write_latent_reference
from moray.kernels.rope import inverse_frequencies, rotation_table

EPS = 1e-6
UNTOUCHED = 0x5A
SHAPES = [(512, 64), (128, 32), (64, 16), (45, 10), (200, 6)]


def inputs(
    tokens: int, kv_lora: int, rope: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens * 1009 + kv_lora)
    wide = torch.full((tokens, kv_lora + rope + 7), float("nan"), dtype=dtype, device=device)
    wide[:, : kv_lora + rope] = torch.randn(tokens, kv_lora + rope, device=device).to(dtype) * 3
    weight = torch.rand(kv_lora, device=device).to(dtype) + 0.5
    turn = rotation_table(inverse_frequencies(rope, 10000.0), 900 + tokens, 1.0)[900:].to(device)
    return wide[:, : kv_lora + rope], weight, turn


def untouched(form: KvFormat, pages: int, page_size: int, device: torch.device) -> torch.Tensor:
    cache = form.create(1, pages, page_size, device)[0]
    cache.view(torch.uint8).fill_(UNTOUCHED)
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("kv_lora", "rope"), SHAPES)
def test_plain_rows(kv_lora: int, rope: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rotated keys have torch's bits; latents differ by the order of one sum: an ulp, twice where two roundings meet."""
    compressed, weight, turn = inputs(4, kv_lora, rope, dtype, device)
    form = KvFormat(kv_lora, rope, dtype)
    rows = torch.tensor([37, -1, 0, 21], device=device)
    found, expected = (untouched(form, 3, 16, device) for _ in range(2))
    write_latent(compressed, weight, EPS, turn, found, rows)
    write_latent_reference(compressed, weight, EPS, turn, expected, rows)
    assert torch.equal(found[..., kv_lora:], expected[..., kv_lora:])
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-21}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    written = (found.view(torch.uint8) != UNTOUCHED).any(-1).flatten().nonzero().flatten().tolist()
    assert written == [0, 21, 37]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("kv_lora", "rope"), SHAPES)
def test_fp8_rows(
    kv_lora: int, rope: int, architecture: int, as_architecture: Callable[[int], None], device: torch.device
) -> None:
    as_architecture(architecture)
    compressed, weight, turn = inputs(3, kv_lora, rope, torch.bfloat16, device)
    form = KvFormat(kv_lora, rope, torch.uint8)
    rows = torch.tensor([20, 3, -5], device=device)
    found, expected = (untouched(form, 2, 16, device) for _ in range(2))
    write_latent(compressed, weight, EPS, turn, found, rows)
    write_latent_reference(compressed, weight, EPS, turn, expected, rows)
    for row in (20, 3):
        ours, theirs = (form.decode(c.view(-1, form.row)[row], torch.float32) for c in (found, expected))
        assert torch.equal(ours[kv_lora:], theirs[kv_lora:])
        # An ulp of bfloat16 may move a scale by as much, and a code to its neighbour: 1/8 of a small value, 1/16 of the
        # largest, or half a step of the subnormal codes, 2^-10 of 448.
        torch.testing.assert_close(
            ours[:kv_lora], theirs[:kv_lora], rtol=0.135, atol=float(theirs.abs().max()) * 2**-17
        )
        mean = (ours - theirs).abs().mean() / theirs.abs().mean()
        assert mean < 2e-3, "codes differ only where a rounding went the other way"
    changed = (found.view(-1, form.row) != UNTOUCHED).any(-1).nonzero().flatten().tolist()
    assert changed == [3, 20]


@pytest.mark.parametrize("kv_lora", [128, 300])
def test_every_code(kv_lora: int, device: torch.device) -> None:
    """Given the same numbers, the kernel's quantiser has torch's bytes: with a norm that does nothing."""
    torch.manual_seed(kv_lora)
    form, plain = KvFormat(kv_lora, 2, torch.uint8), KvFormat(kv_lora, 2, torch.float32)
    compressed = torch.randn(4, kv_lora + 2, device=device) * torch.logspace(-9, 1, kv_lora + 2, device=device)
    weight, turn = torch.ones(kv_lora, device=device), torch.ones(4, 1, 2, device=device)
    rows = torch.arange(4, device=device)
    packed, values = untouched(form, 1, 16, device), untouched(plain, 1, 16, device)
    write_latent(compressed, weight, EPS, turn, packed, rows)
    write_latent(compressed, weight, EPS, turn, values, rows)
    codes, scales = quantize_groups(values[0, :4, :kv_lora])
    assert torch.equal(packed[0, :4, :kv_lora], codes.view(torch.uint8))
    stored = packed[0, :4, form.scale_at : form.scale_at + 4 * form.groups].contiguous().view(torch.float32)
    assert torch.equal(stored, scales)


def test_rounding_to_codes(device: torch.device) -> None:
    """All codes, all ties between neighbours, and what is just beside a tie."""
    codes = torch.arange(0, 0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat((codes, ties, ties * (1 + 2**-20), ties * (1 - 2**-20), -ties))
    group = numbers.new_zeros(-(-len(numbers) // (GROUP - 1)), GROUP)
    group[:, 0] = 448.0  # the scale of every group is 1
    flat = torch.nn.functional.pad(numbers, (0, group.shape[0] * (GROUP - 1) - len(numbers)))
    group[:, 1:] = flat.view(-1, GROUP - 1)
    kv_lora = group.numel()
    # eps makes up for the mean square, so that the norm divides by exactly 1024, and the weight multiplies by it again.
    eps = float(2.0**20 - group.square().mean().double())
    form = KvFormat(kv_lora, 2, torch.uint8)
    cache = untouched(form, 1, 16, device)
    zeros = torch.zeros(1, 2, device=device)
    weight = torch.full((kv_lora,), 1024.0, device=device)
    turn = torch.ones(1, 1, 2, device=device)
    write_latent(torch.cat((group.view(1, -1), zeros), 1), weight, eps, turn, cache, torch.tensor([0], device=device))
    expected = group.flatten().to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(cache[0, 0, :kv_lora], expected)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_nan_infinity_and_zero(fp8: bool, device: torch.device) -> None:
    form = KvFormat(256, 16, torch.uint8 if fp8 else torch.bfloat16)
    compressed, weight, turn = inputs(4, 256, 16, torch.bfloat16, device)
    compressed[0, 3], compressed[1, 200], compressed[2], compressed[3, 260] = (
        float("nan"),
        float("inf"),
        0.0,
        float("nan"),
    )
    cache = untouched(form, 1, 16, device)
    write_latent(compressed, weight, EPS, turn, cache, torch.arange(4, device=device))
    rows = form.decode(cache[0, :4], torch.float32)
    assert rows[0, :256].isnan().all()
    assert not rows[1, :256].isfinite()[128:].any() if fp8 else rows[1, 200].isnan()
    assert torch.equal(rows[2], torch.zeros_like(rows[2]))
    assert rows[3].isnan().nonzero().flatten().tolist() == [260, 261]


def test_rows_do_not_depend_on_their_company(device: torch.device) -> None:
    compressed, weight, turn = inputs(5, 512, 64, torch.bfloat16, device)
    form = KvFormat(512, 64, torch.uint8)
    whole, alone = (untouched(form, 1, 16, device) for _ in range(2))
    rows = torch.arange(5, device=device)
    write_latent(compressed, weight, EPS, turn, whole, rows)
    for i in range(5):
        part = slice(i, i + 1)
        write_latent(compressed[part], weight, EPS, turn[part], alone, rows[part])
    assert torch.equal(whole, alone)


def test_no_rows(device: torch.device) -> None:
    compressed, weight, turn = inputs(0, 64, 16, torch.bfloat16, device)
    cache = untouched(KvFormat(64, 16, torch.bfloat16), 1, 16, device)
    write_latent(compressed, weight, EPS, turn, cache, torch.empty(0, dtype=torch.int64, device=device))
    assert (cache.view(torch.uint8) == UNTOUCHED).all()


def test_caches_that_do_not_fit_are_refused(device: torch.device) -> None:
    compressed, weight, turn = inputs(1, 64, 16, torch.bfloat16, device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"rows of 81 .*; 64 \+ 16 need 80"):
        write_latent(compressed, weight, EPS, turn, torch.zeros(1, 16, 81, dtype=torch.bfloat16, device=device), rows)
    with pytest.raises(ValueError, match=r"a cache in torch\.float32, rows in torch\.bfloat16"):
        write_latent(compressed, weight, EPS, turn, torch.zeros(1, 16, 80, device=device), rows)


def test_the_layout_of_deepseek_r1() -> None:
    form = KvFormat(512, 64, torch.uint8)
    assert (form.scale_at, form.rope_at, form.row_bytes) == (512, 528, 656)
    assert KvFormat(512, 64, torch.bfloat16).row_bytes == 1152
    ragged = KvFormat(45, 10, torch.uint8)
    assert (ragged.groups, ragged.scale_at, ragged.rope_at, ragged.row) == (1, 48, 64, 96)
