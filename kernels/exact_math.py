"""exp and log in fp64 with the same bits on every CPU and every GPU.

Libraries do not agree on the last bit of exp and log: SLEEF, glibc and CUDA differ. Here both are written out in additions,
multiplications and divisions, which IEEE 754 rounds alike everywhere, as long as no compiler contracts two of them into one:
kernels that call the device functions are launched with `fp_fusion=False`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .launch import kernel

if TYPE_CHECKING:
    import triton.language as tl

_EXP_TERMS, _LOG_TERMS = 13, 10
"""Terms of the series: the first one left out is below 2**-55 of the result."""

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931467056274414, 4.7493250390316726e-07
"""ln 2 in two parts; the first has 21 bits, so that its product with an exponent is exact."""

_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
"""The root of 1/2 as the bits of an fp64."""


def exp_of_negative(x: torch.Tensor) -> torch.Tensor:
    """exp of an fp64 tensor of values <= 0, to an ulp or two; 0 below -700.

    x = n ln 2 + r with |r| <= ln 2 / 2, Taylor's series for r, and 2**n put into the exponent.
    """
    x = x.clamp(min=-701.0)
    n = (x * _LOG2_E + 0.5).floor()
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = torch.ones_like(r)
    for k in range(_EXP_TERMS, 0, -1):
        series = series * r * (1.0 / k) + 1.0
    power = ((n.to(torch.int64) + 1023) << 52).view(torch.float64)
    return torch.where(x < -700.0, 0.0, series * power)


def log(x: torch.Tensor) -> torch.Tensor:
    """log of a contiguous fp64 tensor of positive normal values, to an ulp or two.

    x = 2**n m with m between the roots of 1/2 and 2, and log m = 2 artanh((m - 1) / (m + 1)) by its series.
    """
    bits = x.view(torch.int64)
    n = (bits - _SQRT_HALF_BITS) >> 52
    m = (bits - (n << 52)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = torch.zeros_like(s)
    for k in range(_LOG_TERMS, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    wide = n.double()
    return wide * _LN2_HIGH + (2.0 * s * series + wide * _LN2_LOW)


@kernel
def device_exp_of_negative(
    x: tl.tensor,
    TERMS: tl.constexpr = _EXP_TERMS,
    LOG2_E: tl.constexpr = _LOG2_E,
    HIGH: tl.constexpr = _LN2_HIGH,
    LOW: tl.constexpr = _LN2_LOW,
) -> tl.tensor:
    """`exp_of_negative`, operation by operation."""
    bounded = tl.where(x < -700.0, -701.0, x).to(tl.float64)
    n = tl.floor(bounded * LOG2_E + 0.5)
    r = (bounded - n * HIGH) - n * LOW
    series = r * 0.0 + 1.0
    for k in tl.static_range(TERMS, 0, -1):
        series = series * r * (1.0 / k) + 1.0
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x < -700.0, 0.0, series * power)


@kernel
def device_log(
    x: tl.tensor,
    TERMS: tl.constexpr = _LOG_TERMS,
    HIGH: tl.constexpr = _LN2_HIGH,
    LOW: tl.constexpr = _LN2_LOW,
    SQRT_HALF: tl.constexpr = _SQRT_HALF_BITS,
) -> tl.tensor:
    """`log`, operation by operation."""
    bits = x.to(tl.int64, bitcast=True)
    n = (bits - SQRT_HALF) >> 52
    m = (bits - (n << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = s * 0.0
    for k in tl.static_range(TERMS, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    wide = n.to(tl.float64)
    return wide * HIGH + (2.0 * s * series + wide * LOW)
