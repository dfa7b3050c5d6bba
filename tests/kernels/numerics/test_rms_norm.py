from __future__ import annotations

import pytest
import torch

from moray.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference

EPS = 1e-6


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows * 10007 + width)
    x, residual = torch.randn(2, rows, width, device=device, dtype=dtype) * 3
    return x, residual, torch.rand(width, device=device, dtype=dtype) + 0.5


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of one fp32 sum: an ulp of the dtype, twice where two roundings meet."""
    tolerance = 2**-7 if actual.dtype == torch.bfloat16 else 2**-21
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "width"), [(1, 7168), (3, 1536), (5, 512), (2, 7), (4, 65), (1, 16384)])
def test_against_reference(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual, weight = inputs(rows, width, dtype, device)
    close(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))
    total, normed = add_rms_norm(residual, x, weight, EPS)
    torch.testing.assert_close(total, residual + x, rtol=0, atol=0)
    close(normed, rms_norm_reference(residual + x, weight, EPS))


def test_rows_do_not_depend_on_their_company(device: torch.device) -> None:
    x, _, weight = inputs(9, 96, torch.bfloat16, device)
    whole = rms_norm(x, weight, EPS)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, EPS)[0], whole[i]) for i in range(9))


def test_columns_of_a_wider_row(device: torch.device) -> None:
    """A slice has a row stride of its own, and its neighbours are not read."""
    x, _, weight = inputs(3, 48, torch.bfloat16, device)
    wide = torch.full((3, 80), float("nan"), dtype=x.dtype, device=device)
    wide[:, :48] = x
    close(rms_norm(wide[:, :48], weight, EPS), rms_norm_reference(x, weight, EPS))


def test_nan_infinity_and_zero_stay_in_their_row(device: torch.device) -> None:
    x, _, weight = inputs(4, 64, torch.float32, device)
    x[0, 3], x[1, 5], x[2] = float("nan"), float("inf"), 0.0
    actual = rms_norm(x, weight, EPS)
    close(actual, rms_norm_reference(x, weight, EPS))
    assert actual[0].isnan().all()
    assert torch.equal(actual[2], torch.zeros_like(actual[2]))


def test_no_rows(device: torch.device) -> None:
    assert rms_norm(torch.empty(0, 64, device=device), torch.ones(64, device=device), EPS).shape == (0, 64)


def test_rows_too_wide_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="rows of 20000 elements"):
        rms_norm(torch.ones(1, 20000, device=device), torch.ones(20000, device=device), EPS)


def test_tensors_on_two_devices_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"different devices: .*meta"):
        rms_norm(torch.ones(1, 8, device=device), torch.ones(8, device="meta"), EPS)
