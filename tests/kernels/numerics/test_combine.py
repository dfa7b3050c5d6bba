from __future__ import annotations

import pytest
import torch

from moray.kernels.combine import combine, combine_reference


def inputs(
    tokens: int, top_k: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens * 10007 + width)
    outputs = torch.randn(tokens, top_k, width, device=device) * torch.logspace(-3, 3, top_k, device=device)[:, None]
    return outputs.to(dtype), torch.rand(tokens, top_k, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(1, 8, 7168), (3, 8, 1025), (5, 1, 64), (2, 6, 7), (4, 2, 1024)]
)
def test_bits_of_the_reference(tokens: int, top_k: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    outputs, weights = inputs(tokens, top_k, width, dtype, device)
    total = combine(outputs, weights)
    assert total.dtype is torch.float32
    assert torch.equal(total, combine_reference(outputs, weights))
    assert torch.equal(combine(outputs[1:], weights[1:]), total[1:])


def test_the_order_is_that_of_the_top_k(device: torch.device) -> None:
    """Large terms that cancel: any other order of the sum gives another number."""
    outputs = torch.tensor([[[2.0**24], [1.0], [-(2.0**24)], [3.0]]], device=device)
    assert combine(outputs, torch.ones(1, 4, device=device)).item() == 3.0
    swapped = outputs[:, [0, 2, 1, 3]]
    assert combine(swapped, torch.ones(1, 4, device=device)).item() == 4.0


def test_products_are_rounded_before_they_are_added(device: torch.device) -> None:
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24 with a fused multiply-add and 0 with two roundings."""
    near = 1 + 2**-12
    outputs = torch.tensor([[[-(1 + 2**-11)], [near]]], device=device)
    assert combine(outputs, torch.tensor([[1.0, near]], device=device)).item() == 0.0


def test_negative_zero_nan_and_infinity(device: torch.device) -> None:
    outputs, weights = inputs(4, 3, 96, torch.float32, device)
    outputs[0], outputs[1, 2, 5], outputs[2, 0, 7], outputs[2, 1, 7] = -0.0, float("nan"), float("inf"), float("-inf")
    total, expected = combine(outputs, weights), combine_reference(outputs, weights)
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(total.signbit() | total.isnan(), expected.signbit() | expected.isnan())
    assert total.isnan().sum() == 2


def test_views_with_strides(device: torch.device) -> None:
    outputs, weights = inputs(3, 8, 64, torch.bfloat16, device)
    wide = torch.full((3, 8, 100), float("nan"), dtype=outputs.dtype, device=device)
    wide[..., :64] = outputs
    assert torch.equal(combine(wide[..., :64], weights.T.contiguous().T), combine_reference(outputs, weights))


def test_no_tokens(device: torch.device) -> None:
    outputs = torch.empty(0, 8, 64, dtype=torch.bfloat16, device=device)
    assert combine(outputs, torch.empty(0, 8, device=device)).shape == (0, 64)
