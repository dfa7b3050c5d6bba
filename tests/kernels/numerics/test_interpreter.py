"""The interpreter gives the numbers of a GPU, and refuses what a GPU would get wrong: one test per claim of its docstring."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moray.kernels import interpreter, launch
from moray.kernels.launch import Config, kernel

if TYPE_CHECKING:
    import triton.language as tl

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about the interpreter, which is not in use"),
    pytest.mark.usefixtures("device"),
]

CONFIG = Config(num_warps=4, num_stages=1, source="not compiled")


def run(what: launch.Kernel, *arguments: object, **constants: Any) -> None:
    launch.launch(what, (1,), *arguments, config=CONFIG, **constants)


def refused() -> Any:
    from triton.runtime.errors import InterpreterError  # carries the repr of what was raised in the kernel

    return InterpreterError


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers, all NaN alike."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return torch.where(x.float().isnan(), -1, x.view(kinds[x.element_size()]).to(torch.int64))


@kernel
def _cast(x_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@kernel
def _from_e4b15(x_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.float8e4b15, bitcast=True).to(tl.float16))


@kernel
def _arithmetic(a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a - b)
    tl.store(out_ptr + 2 * N + i, a * b)
    tl.store(out_ptr + 3 * N + i, tl.where(a < b, a, b))
    tl.store(out_ptr + 4 * N + i, -a)


@kernel
def _larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.maximum(a, b)


@kernel
def _reduce(x_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, N)), 0, _larger))


@kernel
def _library_max(x: tl.tensor) -> tl.tensor:
    return tl.max(x, axis=0)


@kernel
def _max(x_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    tl.store(out_ptr, _library_max(tl.load(x_ptr + tl.arange(0, N))).to(out_ptr.dtype.element_ty))


@kernel
def _dot(
    a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
) -> None:
    n, k = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + n[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + n[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


@kernel
def _fma(a_ptr: tl.tensor, b_ptr: tl.tensor, c_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)))


@kernel
def _copy(x_ptr: tl.tensor, out_ptr: tl.tensor, start: tl.int32, count: tl.int32, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + start + i, mask=i < count))


@kernel
def _count(out_ptr: tl.tensor, at: tl.int32) -> None:
    tl.atomic_add(out_ptr + at, 1)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x cast to dtype by the interpreter."""
    size = 1 << (x.numel() - 1).bit_length()
    padded = torch.zeros(size, dtype=x.dtype)
    padded[: x.numel()] = x
    out = torch.empty(size, dtype=dtype)
    run(_cast, padded, out, N=size)
    return out[: x.numel()]


def telling_numbers() -> torch.Tensor:
    """fp32: random over all exponents, the specials, and around the edges of e4m3 and bf16."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64).to(torch.int32)
    edges = [0.0, -0.0, 447.9, 448.0, 456.0, 463.9, 464.0, 465.0, 480.0, 500.0, 1e30, float("inf"), float("nan")]
    edges += [2.0**-6, 2.0**-9, 2.0**-10, 1.0001 * 2**-10, 0.99 * 2**-10, 3.39e38, 3.4028e38, 1e-40]
    near_one = torch.randn(4096, generator=generator)
    return torch.cat((random.view(torch.float32), near_one, near_one * 100, torch.tensor(edges), -torch.tensor(edges)))


def ties(codes: torch.Tensor) -> torch.Tensor:
    """The numbers half way between neighbours of these floating-point codes, which must be finite and in order."""
    values = codes.to(torch.float64)
    return ((values[1:] + values[:-1]) / 2).to(torch.float32)


def test_every_bf16_and_e4m3_code_decodes() -> None:
    bf16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    e4m3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    for codes in (bf16, e4m3):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(bits(converted(codes, dtype)), bits(codes.float().to(dtype)))


def test_every_finite_code_read_as_e4b15_is_256_times_smaller() -> None:
    codes = torch.arange(256).to(torch.uint8)
    out = torch.empty(256, dtype=torch.float16)
    run(_from_e4b15, codes, out, N=256)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = ~values.isnan()
    assert torch.equal(bits(out[finite] * 256), bits(values[finite].half())), "bits: minus zero too"


def test_fp32_to_bf16_rounds_to_nearest_even() -> None:
    halfway = ties(torch.arange(0x3F00, 0x4200).to(torch.int16).view(torch.bfloat16))
    for x in (telling_numbers(), halfway, -halfway):
        assert torch.equal(bits(converted(x, torch.bfloat16)), bits(x.to(torch.bfloat16)))
    assert torch.equal(bits(converted(halfway, torch.bfloat16)) % 2, torch.zeros(halfway.shape, dtype=torch.int64))


def test_fp32_to_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    """Against the definition: the nearest of the 127 magnitudes, of two the one with the even code."""
    table = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    halfway = ties(torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn))
    x = torch.cat((telling_numbers(), halfway, -halfway))
    magnitude = x.abs().double().nan_to_num(0, 448).clamp_max(448)
    upper = torch.searchsorted(table, magnitude)
    lower = (upper - 1).clamp_min(0)
    down, up = magnitude - table[lower], table[upper] - magnitude
    code = torch.where((down < up) | ((down == up) & (lower % 2 == 0)), lower, upper) + 128 * x.signbit()
    expected = code.to(torch.uint8).view(torch.float8_e4m3fn)
    expected.view(torch.uint8)[x.isnan()] = 0x7F
    assert torch.equal(bits(converted(x, torch.float8_e4m3fn)), bits(expected))


def test_bf16_arithmetic_rounds_once() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 1024, generator=generator).bfloat16()
    a[0], b[0], a[1], b[1] = float("inf"), float("-inf"), float("nan"), 1.0
    out = torch.empty(5, 1024, dtype=torch.bfloat16)
    run(_arithmetic, a, b, out, N=1024)
    for found, expected in zip(out, (a + b, a - b, a * b, torch.where(a < b, a, b), -a), strict=True):
        assert torch.equal(bits(found), bits(expected))


def test_fp8_arithmetic_is_refused() -> None:
    codes = torch.ones(16).to(torch.float8_e4m3fn)
    with pytest.raises(refused(), match="cast FP8 to a wider type first"):
        run(_arithmetic, codes, codes, torch.empty(80, dtype=torch.float8_e4m3fn), N=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_reductions_of_narrow_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(refused(), match="cast to fp32 first"):
        run(_reduce, torch.ones(16).to(dtype), torch.empty(1, dtype=dtype), N=16)


def test_reductions_in_fp32_and_from_device_functions() -> None:
    """The library's own maximum widens bf16 by itself; it is reached through a device function here."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(1, dtype=dtype)
        run(_max, x.to(dtype), out, N=64)
        assert out[0] == x.to(dtype).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_dot_is_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(16, 64, generator=generator).to(dtype), torch.randn(64, 16, generator=generator).to(dtype)
    out = torch.empty(16, 16)
    run(_dot, a, b, out, N=16, K=64, PRECISION="ieee")
    assert torch.equal(out, (a.double() @ b.double()).float())


def test_dot_of_fp32_is_tf32_unless_told_otherwise() -> None:
    a, b, out = torch.zeros(16, 16), torch.eye(16), torch.empty(16, 16)
    a[0, :4] = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, float("inf")])  # kept; a tie, away from zero; dropped
    run(_dot, a, b, out, N=16, K=16, PRECISION=None)
    assert out[0, :3].isnan().all(), "infinity times zero"
    a[0, 3] = 0
    run(_dot, a, b, out, N=16, K=16, PRECISION=None)
    assert out[0, :4].tolist() == [1 + 2**-10, 1 + 2**-10, 1.0, 0.0]
    run(_dot, a, b, out, N=16, K=16, PRECISION="ieee")
    assert torch.equal(out, a)


def test_dot_over_less_than_sixteen_is_refused() -> None:
    with pytest.raises(refused(), match="inner dimension of 8: tensor cores need at least 16"):
        run(_dot, torch.ones(16, 8), torch.ones(8, 16), torch.empty(16, 16), N=16, K=8, PRECISION="ieee")


def test_fma_rounds_once() -> None:
    a = torch.full((16,), 1 + 2**-23)
    out = torch.empty(16)
    run(_fma, a, a, -a * a, out, N=16)
    assert out.tolist() == [2**-46] * 16, "what rounding a * a left out"


@pytest.mark.parametrize(("start", "count"), [(-1, 4), (0, 17), (16, 1), (10**6, 1)])
def test_loads_outside_are_refused(start: int, count: int) -> None:
    x, out = torch.zeros(1000)[500:516], torch.zeros(32)  # the storage goes on where the tensor ends
    with pytest.raises(refused(), match=r"IndexError.*load outside every tensor of the launch"):
        run(_copy, x, out, start, count, N=32)


def test_stores_and_atomics_outside_are_refused() -> None:
    x = torch.zeros(64)
    with pytest.raises(
        refused(), match=r"store outside every tensor of the launch: 24 of 64 lanes, the first 160 bytes"
    ):
        run(_copy, x, torch.zeros(1000)[:40], 0, 64, N=64)
    counts = torch.zeros(4, dtype=torch.int32)
    run(_count, counts, 3)
    with pytest.raises(refused(), match="atomic outside every tensor"):
        run(_count, counts, 4)
    assert counts.tolist() == [0, 0, 0, 1]


def test_tensors_reached_through_pointers_can_be_named() -> None:
    x, out = torch.arange(48.0), torch.empty(16)
    with pytest.raises(refused(), match="load outside"):
        run(_copy, x[:16], out, 32, 16, N=16)
    launch.launch(_copy, (1,), x[:16], out, 32, 16, N=16, config=CONFIG, reads=[x])
    assert torch.equal(out, x[32:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_undefined_lanes_hold_nan(dtype: torch.dtype) -> None:
    out = torch.zeros(16, dtype=dtype)
    run(_copy, torch.ones(16).to(dtype), out, 0, 5, N=16)
    assert out.float().isnan().tolist() == [False] * 5 + [True] * 11


def test_undefined_lanes_hold_absurd_integers() -> None:
    out = torch.zeros(16, dtype=torch.int32)
    run(_copy, torch.ones(16, dtype=torch.int32), out, 0, 5, N=16)
    assert out.tolist() == [1] * 5 + [0x7F7F7F7F] * 11


def test_install_needs_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before the process starts"):
        interpreter.install()
